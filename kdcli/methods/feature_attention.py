"""Feature methods that pair by attention: SMKD the positions of the last map, SemCKD the stages."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses.feature_attention import semckd_loss, similarity, spatial_matching, stage_attention
from kdcli.methods.base import Count, Lesson, Method, Need, Phase, Positive, SetupContext, Temperature, Terms, Weight
from kdcli.methods.pairing import last, stages
from kdcli.models.layers import conv_bn_relu, fit, pooled_to


class SMKD(Method):
    """TaT, Lin et al. 2022 (arXiv 2205.10793), one-to-all matching: every position of the last map is matched by a
    mixture of all positions of the student.

    Query and value are 3x3 convolutions with batch norm on the student's map, the key is the teacher's map; maps of
    different sizes are pooled to the smaller one. The authors publish no weights for CIFAR: 0.2 with a weight of 1 for
    the labels is ours.
    """

    reads_logits = False
    needs = frozenset({Need.MAPS, Need.PAIRS})

    outer_weight: Weight = 0.2
    """Weight of the matching."""
    ce_weight: Weight = 1.0
    """Weight of the loss with the labels."""
    kd_weight: Weight = 0.0
    """Weight of the distillation of logits."""
    tau: Temperature = 4.0
    """Temperature of the distillation of logits."""
    form: Literal["official", "transposed"] = "official"
    """Softmax over the teacher's positions as in the authors' code, or over the student's as in the paper's text."""

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        cin, cout = last(lesson.student).shape[1], last(lesson.teacher).shape[1]

        def embedding() -> nn.Module:
            return nn.Sequential(nn.Conv2d(cin, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout))

        self.query, self.value = embedding(), embedding()

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        ours, theirs = fit(last(lesson.student), last(lesson.teacher))
        matched = spatial_matching(self.query(ours), theirs, self.value(ours), form=self.form)
        terms = {"hard": self.ce_weight * lesson.hard(), "features": self.outer_weight * F.mse_loss(matched, theirs)}
        if self.kd_weight:
            soft = lesson.task.soft(lesson.student.out, lesson.teacher.out, self.tau)
            terms["teacher"] = self.kd_weight * soft.mean()
        return terms


class SemCKD(Method):
    """Chen et al. 2021 (arXiv 2012.03236): every stage of the student learns from all stages of the teacher, weighted
    by an attention.

    The attention reads the similarity matrix of a batch, so its layers are as wide as a batch: a batch of another size
    (the short last one) contributes only the labels and KD, as the public loop drops such batches. A data set smaller
    than one batch is refused.
    """

    needs = frozenset({Need.MAPS, Need.FULL_BATCHES, Need.PAIRS})

    outer_weight: Weight = 400.0
    """Weight of the feature loss."""
    ce_weight: Weight = 1.0
    """Weight of the loss with the labels."""
    kd_weight: Weight = 1.0
    """Weight of the distillation of logits."""
    tau: Temperature = 4.0
    """Temperature of the distillation of logits."""
    factor: Count = 4
    """Queries and keys have the length of a batch divided by this."""
    soft: Positive = 1.0
    """Temperature of the attention."""
    detach: bool = True
    """No gradient through the student's similarity matrices: with it the published weight diverges on the digits."""

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        self.batch = context.train.batch_size
        if len(context.data.train) < self.batch:
            raise RecipeError(
                f"train.batch_size = {self.batch}: method semckd learns only from whole batches, and there are only "
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
        out, task = lesson.student.out, lesson.task
        terms = {
            "hard": self.ce_weight * lesson.hard(),
            "teacher": self.kd_weight * task.soft(out, lesson.teacher.out, self.tau).mean(),
        }
        if len(out) == self.batch:
            ours, theirs = list(stages(lesson.student).values()), list(stages(lesson.teacher).values())
            described = [x.detach() if self.detach else x for x in ours]
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
    """The mean squared error [B] of each sample between a projected stage and one of the teacher's."""
    size = (min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3]))
    return (projector(pooled_to(ours, size)) - pooled_to(theirs, size)).square().flatten(1).mean(1)
