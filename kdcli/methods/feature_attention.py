"""Feature methods in which an attention decides what goes with what: SMKD over positions, SemCKD over stages."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses.feature_attention import semckd_loss, similarity, spatial_matching, stage_attention
from kdcli.methods.base import Lesson, Method, Phase, SetupContext, Temperature, Terms, Weight
from kdcli.methods.pairing import last, stages
from kdcli.models.layers import conv_bn_relu, fit, pooled_to


class SMKD(Method):
    """Every position of the last map is matched by a mixture of all the student's positions (one-to-all matching).

    TaT, Lin et al. 2022 (arXiv 2205.10793). Query and value are 3x3 convolutions with batch norm of the student's map,
    the key is the teacher's map; maps of different sizes are pooled to the smaller. The authors publish no CIFAR
    weights: 0.2 beside a CE weight of 1 (papers.md section 8).

    form: `official` normalises over the teacher's positions as the authors' code does, `transposed` over the student's
        as the paper's words have it.
    """

    reads_logits = False

    needs = frozenset({"maps", "pairs"})

    def __init__(
        self,
        outer_weight: Weight = 0.2,
        ce_weight: Weight = 1.0,
        kd_weight: Weight = 0.0,
        tau: Temperature = 4.0,
        form: Literal["official", "transposed"] = "official",
    ) -> None:
        super().__init__()
        self.outer_weight, self.ce_weight, self.kd_weight, self.tau = outer_weight, ce_weight, kd_weight, tau
        self.form: Literal["official", "transposed"] = form

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        cin, cout = last(lesson.student).shape[1], last(lesson.teacher).shape[1]

        def embedding() -> nn.Module:
            return nn.Sequential(nn.Conv2d(cin, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout))

        self.query, self.value = embedding(), embedding()

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        out = lesson.student.out.float()
        ours, theirs = fit(last(lesson.student), last(lesson.teacher))
        matched = spatial_matching(self.query(ours), theirs, self.value(ours), form=self.form)
        terms = {
            "hard": self.ce_weight * lesson.task.hard(out, lesson.target).mean(),
            "features": self.outer_weight * F.mse_loss(matched, theirs),
        }
        if self.kd_weight:
            terms["teacher"] = self.kd_weight * lesson.task.soft(out, lesson.teacher.out, self.tau).mean()
        return terms


class SemCKD(Method):
    """Every stage of the student learns from all the teacher's, as much from each as an attention says.

    Chen et al. 2021 (arXiv 2012.03236). What goes into the attention is a batch's similarity matrix, so its layers are
    as wide as a batch: a batch of another size (the short last one) brings its CE and KD terms alone, as the public
    loop leaves such batches out. A data set smaller than one batch is refused.

    detach: whether the student's similarity matrices are a description only. The definition says neither; with a
        gradient through them the published rate and weight diverged on the digits.
    """

    needs = frozenset({"maps", "full_batches", "pairs"})

    def __init__(
        self,
        outer_weight: Weight = 400.0,
        ce_weight: Weight = 1.0,
        kd_weight: Weight = 1.0,
        tau: Temperature = 4.0,
        factor: Annotated[int, Field(ge=1)] = 4,
        soft: Annotated[float, Field(gt=0)] = 1.0,
        detach: bool = True,
    ) -> None:
        super().__init__()
        self.outer_weight, self.ce_weight, self.kd_weight, self.tau = outer_weight, ce_weight, kd_weight, tau
        self.factor, self.soft, self.detach = factor, soft, detach

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        self.batch = context.train.batch_size
        if len(context.data.train) < self.batch:
            raise RecipeError(
                f"train.batch_size = {self.batch}: method semckd learns from whole batches, and there are "
                f"{len(context.data.train)} images",
                hint=f"--set train.batch_size={len(context.data.train)}",
            )
        ours, theirs = stages(lesson.student), stages(lesson.teacher)
        width = max(self.batch // self.factor, 1)

        def embedding() -> nn.Module:
            return nn.Sequential(nn.Linear(self.batch, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

        self.queries = nn.ModuleList([embedding() for _ in ours])
        self.keys = nn.ModuleList([embedding() for _ in theirs])
        self.projectors = nn.ModuleList([
            nn.ModuleList([_projector(s.shape[1], t.shape[1]) for t in theirs.values()]) for s in ours.values()
        ])  # fmt: skip

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        out = lesson.student.out.float()
        terms = {
            "hard": self.ce_weight * lesson.task.hard(out, lesson.target).mean(),
            "teacher": self.kd_weight * lesson.task.soft(out, lesson.teacher.out, self.tau).mean(),
        }
        if len(out) == self.batch:
            ours, theirs = list(stages(lesson.student).values()), list(stages(lesson.teacher).values())
            described = [x.detach() for x in ours] if self.detach else ours
            attention = stage_attention(
                torch.stack([_embedded(mlp, x) for mlp, x in zip(self.queries, described, strict=True)]),
                torch.stack([_embedded(mlp, x) for mlp, x in zip(self.keys, theirs, strict=True)]),
                soft=self.soft,
            )
            rows = [
                torch.stack([_distance(one, x, t) for one, t in zip(some, theirs, strict=True)], -1)  # pyright: ignore
                for some, x in zip(self.projectors, ours, strict=True)
            ]
            terms["features"] = self.outer_weight * semckd_loss(attention, torch.stack(rows, 1))
        return terms


def _embedded(mlp: nn.Module, x: Tensor) -> Tensor:
    return F.normalize(mlp(similarity(x)), dim=1)


def _projector(cin: int, cout: int) -> nn.Sequential:
    inner = 2 * cout
    return nn.Sequential(conv_bn_relu(cin, inner), conv_bn_relu(inner, inner, 3), nn.Conv2d(inner, cout, 1, bias=False))


def _distance(projector: nn.Module, ours: Tensor, theirs: Tensor) -> Tensor:
    """Each sample's mean squared error [B] between a projected stage and a teacher's."""
    size = (min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3]))
    return (projector(pooled_to(ours, size)) - pooled_to(theirs, size)).square().flatten(1).mean(1)
