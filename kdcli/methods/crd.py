"""Contrastive representation distillation: a student's vector is told from other classes' among the teacher's."""

from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses import crd as losses
from kdcli.methods.base import Count, Lesson, Method, Phase, SetupContext, Temperature, Terms, Weight
from kdcli.system import device as devices

Momentum = Annotated[float, Field(ge=0, lt=1)]


class Contrast(nn.Module):
    """Both networks' embeddings, and a memory of the last ones of every training image.

    embed, rows -> parts -> (the update of the weights) -> remember. Memories' rows are sorted by class, so that other
    classes' rows can be drawn without a search; `row_of` says where an image's row is.
    """

    row_of: Tensor  # [full] row of the image with that number in the full set, -1 for one that is not trained on
    first: Tensor  # [K] a class's first row
    count: Tensor  # [K] and how many it has
    student_memory: Tensor  # [N, D]
    teacher_memory: Tensor
    log_z: Tensor  # [2] normalisers of the student's and the teacher's scores, of the first batch ever seen
    started: Tensor  # [] whether that batch was seen

    def __init__(
        self,
        context: SetupContext,
        dims: tuple[int, int],
        feat_dim: int,
        nce_k: int,
        temperature: float,
        momentum: float,
    ) -> None:
        """`dims`: lengths of the student's and the teacher's vectors.

        Raises RecipeError for data of one class, and where the memories would not fit.
        """
        super().__init__()
        train = context.data.train
        self.n_data, self.nce_k, self.temperature, self.momentum = len(train), nce_k, temperature, momentum
        count = torch.bincount(train.targets, minlength=context.task.num_classes)
        if int(count.max()) == self.n_data:
            raise RecipeError(
                f"data: all {self.n_data} training images are of one class, and a contrast needs images of others",
                hint="Choose data with two classes or more, or a method without negatives (kd, pkt).",
            )
        others = self.n_data - int(count[count > 0].min())
        self.draws = min(nce_k, others)  # where there are fewer than nce_k, each counts for several
        fits_in(context, self.n_data, feat_dim, self.draws)
        self.student = nn.Linear(dims[0], feat_dim)
        self.teacher = nn.Linear(dims[1], feat_dim)
        row_of = torch.full((train.full,), -1)
        row_of[train.index[train.targets.argsort(stable=True)]] = torch.arange(self.n_data)
        self.register_buffer("row_of", row_of)
        self.register_buffer("first", count.cumsum(0) - count)
        self.register_buffer("count", count)
        for side in ("student_memory", "teacher_memory"):  # directions at random, until an image is met
            memory = torch.randn(self.n_data, feat_dim, device=context.device)
            self.register_buffer(side, memory.div_(torch.linalg.vector_norm(memory, dim=1, keepdim=True)))
        self.register_buffer("log_z", torch.zeros(2))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def embed(
        self, student: Float[Tensor, "B Ds"], teacher: Float[Tensor, "B Dt"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """Unit vectors of both networks in one space."""
        return F.normalize(self.student(student), dim=1), F.normalize(self.teacher(teacher), dim=1)

    def rows(self, lesson: Lesson) -> Int[Tensor, "B 1+R"]:
        """Each sample's own row, then drawn rows of other classes."""
        first, count = self.first[lesson.target], self.count[lesson.target]
        others = losses.draw_negatives(first, count, n_data=self.n_data, draws=self.draws, generator=lesson.generator)
        return torch.cat([self.row_of[lesson.index][:, None], others], 1)

    def parts(
        self, a: Float[Tensor, "B D"], b: Float[Tensor, "B D"], rows: Int[Tensor, "B 1+R"]
    ) -> tuple[Tensor, Tensor]:
        """The student's part (its `a` against the teacher's memory) and the teacher's (its `b` against the student's).

        The first call ever fixes the normalisers.
        """
        n, k = self.n_data, self.nce_k
        mine = losses.log_scores(a, self.teacher_memory, rows, temperature=self.temperature)
        theirs = losses.log_scores(b, self.student_memory, rows, temperature=self.temperature)
        fresh = torch.stack([losses.log_normaliser(scores, nce_k=k, n_data=n) for scores in (mine, theirs)])
        log_z = torch.where(self.started, self.log_z, fresh)
        self.log_z.copy_(log_z)
        self.started.fill_(True)
        student, teacher = (
            losses.contrast(scores - z, nce_k=k, n_data=n) for scores, z in zip((mine, theirs), log_z, strict=True)
        )
        return student, teacher

    @torch.no_grad()
    def remember(self, a: Tensor, b: Tensor, lesson: Lesson) -> None:
        """Move the batch's rows of both memories towards its embeddings."""
        rows = self.row_of[lesson.index]
        for memory, new in ((self.student_memory, a), (self.teacher_memory, b)):
            memory.index_copy_(0, rows, losses.remembered(memory[rows], new, momentum=self.momentum))


def fits_in(context: SetupContext, n_data: int, feat_dim: int, draws: int) -> None:
    """Refuse memories, and a batch's scores against them, that are larger than what is free. Allocates nothing.

    Raises RecipeError.
    """
    batch = context.train.batch_size
    memories, scores = 8 * n_data * feat_dim, 4 * batch * (n_data + 32 * draws)
    free = devices.free_memory(context.device)
    if free is not None and memories + scores > free:
        raise RecipeError(
            f"method.feat_dim: memories of {n_data} images' vectors of {feat_dim} numbers, of both networks, take "
            f"{_gib(memories)} and a batch's scores {_gib(scores)}; {_gib(free)} are free on {context.device}",
            hint=f"A smaller --set method.feat_dim (now {feat_dim}), method.nce_k ({draws}) or train.batch_size "
            f"({batch}), or fewer images: --set data.per_class.",
        )


def _gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"


class CRD(Method):
    """Contrastive representation distillation, Tian et al. 2020, arXiv 1910.10699, with negatives of other classes.

    The batch is scored against the memories as they are, then the weights are updated, then the batch's embeddings
    (those that were scored) enter the memories. Z is the first batch's.

    feat_dim: length of the embeddings. nce_k: negatives of a sample, drawn from other classes without a row coming
    twice; where there are no nce_k images of other classes all of them are used and weighed up to that number.
    """

    tasks = frozenset({"classify"})

    reads_logits = False

    needs = frozenset({"pooled", "index", "hard_target", "full_batches"})

    def __init__(
        self,
        feat_dim: Count = 128,
        nce_k: Count = 16384,
        temperature: Temperature = 0.07,
        momentum: Momentum = 0.5,
        ce_weight: Weight = 1.0,
        outer_weight: Weight = 0.8,
    ) -> None:
        super().__init__()
        self.feat_dim, self.nce_k, self.temperature, self.momentum = feat_dim, nce_k, temperature, momentum
        self.ce_weight, self.outer_weight = ce_weight, outer_weight
        self.met: tuple[Tensor, Tensor]  # the batch's embeddings, from `loss` to `after`

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        dims = (lesson.student.vectors.shape[1], lesson.teacher.vectors.shape[1])
        self.contrast = Contrast(context, dims, self.feat_dim, self.nce_k, self.temperature, self.momentum)

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        a, b = self.contrast.embed(lesson.student.vectors, lesson.teacher.vectors)
        student, teacher = self.contrast.parts(a, b, self.contrast.rows(lesson))
        self.met = a.detach(), b.detach()
        return {
            "hard": self.ce_weight * lesson.task.hard(lesson.student.out, lesson.target).mean(),
            "contrast": self.outer_weight * (student + teacher),
        }

    def after(self, lesson: Lesson) -> None:
        self.contrast.remember(*self.met, lesson)
