"""Contrastive representation distillation: the student's vector has to match the teacher's vector of the same image,
among the teacher's vectors of other classes."""

from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses import crd as losses
from kdcli.methods.base import Count, Lesson, Method, Need, Phase, SetupContext, Temperature, Terms, Weight
from kdcli.system import device as devices

Momentum = Annotated[float, Field(ge=0, lt=1)]


class Contrast(nn.Module):
    """The embeddings of both networks, and memories of the latest embedding of every training image.

    Used in this order: embed, rows, parts, (the update of the weights), remember. The rows of the memories are sorted
    by class, so that rows of other classes can be drawn without a search; `row_of` gives the row of an image.
    """

    row_of: Tensor  # [full] row of the image with that number in the full set, -1 for an image outside the training set
    first: Tensor  # [K] first row of a class
    count: Tensor  # [K] number of rows of a class
    student_memory: Tensor  # [N, D]
    teacher_memory: Tensor  # [N, D]
    log_z: Tensor  # [2] normalisers of the student's and the teacher's scores, from the first batch
    started: Tensor  # [] whether there has been a batch

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

        Raises RecipeError for data with a single class, and if the memories would not fit.
        """
        super().__init__()
        train = context.data.train
        self.n_data, self.nce_k, self.temperature, self.momentum = len(train), nce_k, temperature, momentum
        count = torch.bincount(train.targets, minlength=context.task.num_classes)
        if int(count.max()) == self.n_data:
            raise RecipeError(
                f"data: all {self.n_data} training images are of one class, and a contrast needs other classes",
                hint="Choose data with at least two classes, or a method without negatives (kd, pkt).",
            )
        others = self.n_data - int(count[count > 0].min())
        self.draws = min(nce_k, others)  # if there are fewer than nce_k, each has a larger weight
        fits_in(context, self.n_data, feat_dim, self.draws)
        self.student = nn.Linear(dims[0], feat_dim)
        self.teacher = nn.Linear(dims[1], feat_dim)
        row_of = torch.full((train.full,), -1)
        row_of[train.index[train.targets.argsort(stable=True)]] = torch.arange(self.n_data)
        self.register_buffer("row_of", row_of)
        self.register_buffer("first", count.cumsum(0) - count)
        self.register_buffer("count", count)
        for side in ("student_memory", "teacher_memory"):  # random directions until the image has been trained on
            memory = torch.randn(self.n_data, feat_dim, device=context.device)
            self.register_buffer(side, memory.div_(torch.linalg.vector_norm(memory, dim=1, keepdim=True)))
        self.register_buffer("log_z", torch.zeros(2))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def embed(
        self, student: Float[Tensor, "B Ds"], teacher: Float[Tensor, "B Dt"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """Unit vectors of both networks in a common space."""
        return F.normalize(self.student(student), dim=1), F.normalize(self.teacher(teacher), dim=1)

    def rows(self, lesson: Lesson) -> Int[Tensor, "B 1+R"]:
        """The row of each sample, then drawn rows of other classes."""
        first, count = self.first[lesson.target], self.count[lesson.target]
        others = losses.draw_negatives(first, count, n_data=self.n_data, draws=self.draws, generator=lesson.generator)
        return torch.cat([self.row_of[lesson.index][:, None], others], 1)

    def parts(
        self, a: Float[Tensor, "B D"], b: Float[Tensor, "B D"], rows: Int[Tensor, "B 1+R"]
    ) -> tuple[Tensor, Tensor]:
        """The student's part (`a` against the teacher's memory) and the teacher's part (`b` against the student's).

        The very first call sets the normalisers.
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
        """Move the rows of the batch in both memories towards its embeddings."""
        rows = self.row_of[lesson.index]
        for memory, new in ((self.student_memory, a), (self.teacher_memory, b)):
            memory.index_copy_(0, rows, losses.remembered(memory[rows], new, momentum=self.momentum))


def fits_in(context: SetupContext, n_data: int, feat_dim: int, draws: int) -> None:
    """Raise RecipeError if the memories and a batch's scores need more memory than is free. Allocates nothing."""
    batch = context.train.batch_size
    memories, scores = 8 * n_data * feat_dim, 4 * batch * (n_data + 32 * draws)
    free = devices.free_memory(context.device)
    if free is not None and memories + scores > free:
        raise RecipeError(
            f"method.feat_dim: the memories of both networks ({n_data} images x {feat_dim} numbers) take "
            f"{_gib(memories)} and a batch's scores {_gib(scores)}; {_gib(free)} are free on {context.device}",
            hint=f"A smaller --set method.feat_dim (now {feat_dim}), method.nce_k ({draws}) or train.batch_size "
            f"({batch}), or fewer images: --set data.per_class.",
        )


def _gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"


class CRD(Method):
    """Contrastive representation distillation, Tian et al. 2020 (arXiv 1910.10699), with negatives of other classes.

    The batch is scored against the memories, then the weights are updated, then the batch's embeddings (those that
    were scored) enter the memories. Z is that of the first batch.
    """

    tasks = frozenset({"classify"})
    reads_logits = False
    needs = frozenset({Need.POOLED, Need.INDEX, Need.HARD_TARGET, Need.FULL_BATCHES})

    feat_dim: Count = 128
    """Length of the embeddings."""
    nce_k: Count = 16384
    """Negatives per sample, distinct rows of other classes; if there are fewer, all are used with a larger weight."""
    temperature: Temperature = 0.07
    """Temperature of the scores."""
    momentum: Momentum = 0.5
    """Momentum of the memories."""
    ce_weight: Weight = 1.0
    """Weight of the loss with the labels."""
    outer_weight: Weight = 0.8
    """Weight of the contrast."""

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        dims = (lesson.student.vectors.shape[1], lesson.teacher.vectors.shape[1])
        self.contrast = Contrast(context, dims, self.feat_dim, self.nce_k, self.temperature, self.momentum)

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        a, b = self.contrast.embed(lesson.student.vectors, lesson.teacher.vectors)
        student, teacher = self.contrast.parts(a, b, self.contrast.rows(lesson))
        self.embedded = a.detach(), b.detach()  # until `after`
        return {"hard": self.ce_weight * lesson.hard(), "contrast": self.outer_weight * (student + teacher)}

    def after(self, lesson: Lesson) -> None:
        self.contrast.remember(*self.embedded, lesson)
