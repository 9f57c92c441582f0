"""Several teachers, weighted for each sample or batch: EBKD, CA-MKD, AEKD."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses.multi_teacher import confidence_weights, entropy_weights, least_norm_weights, mean_gradients
from kdcli.methods import pairing
from kdcli.methods.base import Lesson, Method, Need, Phase, Positive, SetupContext, Temperature, Terms, Weight
from kdcli.models import layers
from kdcli.models.member import Member
from kdcli.models.split import Tail


class EBKD(Method):
    """Kwon et al. 2020, "Adaptive Knowledge Distillation Based on Entropy": certain teachers have more weight.

    As in the public code, the weights sum to M - 1 and the mean over teachers is taken, so that all teachers together
    have the weight (M - 1) / M.
    """

    tasks = frozenset({"classify"})
    teachers = 2

    tau: Temperature = 4.0
    """Temperature of the teachers and the student."""
    alpha: float = 1.0
    """Weight of the loss with the labels."""
    beta: float = 1.0
    """Weight of the distillation loss."""

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        w = entropy_weights(lesson.mentors_out)  # [M, B]
        lesson.notes["weight"] = w.mean(-1)
        return {"hard": self.alpha * lesson.hard(), "mentors": self.beta * (w * lesson.soft(self.tau)).mean()}


class CAMKD(Method):
    """Zhang et al. 2022, "Confidence-Aware Multi-Teacher Knowledge Distillation" (arXiv 2201.00007).

    The student's map, projected to a teacher's, is judged by what that teacher makes of its own last map, frozen and in
    eval mode. Each teacher's map is compared with the student's original map: the authors' code continues with the copy
    that it resized for the teacher before.
    """

    tasks = frozenset({"classify"})
    teachers = 2
    projectors: nn.ModuleList

    tau: Temperature = 4.0
    """Temperature of the teachers and the student."""
    alpha: float = 1.0
    """Weight of the loss with the labels."""
    beta: float = 1.0
    """Weight of the logit part."""
    feature: Weight = 50.0
    """Weight of the feature part; 0 leaves it out."""
    wide: bool = False
    """Whether projectors have three convolutions instead of one."""
    variant: Literal["paper", "official"] = "paper"
    """`official` divides both parts by M once more, and lets gradient flow through the feature part's weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.official = self.variant == "official"
        self.needs = frozenset({Need.MAPS, Need.PAIRS} if self.feature else ())

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        self.projectors = nn.ModuleList()
        self.rests: list[Tail] = []
        if not self.feature:
            return
        assert lesson is not None
        width = pairing.last(lesson.student).shape[1]
        for m, mentor in enumerate(context.mentors):
            map_ = pairing.last(lesson.mentors[m])
            self.rests.append(_rest(mentor, map_))
            self.projectors.append(_projector(width, map_.shape[1], wide=self.wide))

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        share = 1 / len(lesson.mentors) if self.official else 1.0
        w = confidence_weights(_cross_entropies(lesson.mentors_out, lesson.target))  # [M, B]
        lesson.notes["weight"] = w.mean(-1)
        terms = {
            "hard": self.alpha * lesson.hard(),
            "mentors": self.beta * share * (w * lesson.soft(self.tau)).sum(0).mean(),
        }
        if self.feature:
            terms["feature"] = self.feature * share * self._features(lesson)
        return terms

    def _features(self, lesson: Lesson) -> Float[Tensor, ""]:
        ours, far, probes = pairing.last(lesson.student), [], []
        for m, (mentor, project, rest) in enumerate(
            zip(self.context.mentors, self.projectors, self.rests, strict=True)
        ):
            theirs = pairing.last(lesson.mentors[m])
            mine = project(layers.resized_to(ours, (theirs.shape[2], theirs.shape[3])))
            far.append((mine - theirs).square().flatten(1).mean(1))  # [B]
            probe, _, _ = rest(mine)
            probes.append(probe if mentor.class_index is None else probe.index_select(-1, mentor.class_index))
        w = confidence_weights(_cross_entropies(torch.stack(probes), lesson.target))  # [M, B]
        if not self.official:
            w = w.detach()
        return (w * torch.stack(far)).sum(0).mean()


class AEKD(Method):
    """Du et al. 2020, "Agree to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient Space".

    The teachers are weighted so that the sum of their gradients is shortest: the direction that none of them opposes.
    """

    tasks = frozenset({"classify"})
    teachers = 2
    needs = frozenset({Need.FULL_BATCHES})  # the mean gradient of the batch decides for all its samples

    tau: Temperature = 4.0
    """Temperature of the teachers and the student."""
    alpha: float = 1.0
    """Weight of the loss with the labels."""
    beta: float = 1.0
    """Weight of the distillation loss."""
    C: Positive = 0.6
    """Largest weight of a teacher; from 1 on it sets no limit."""
    normalise: bool = False
    """Whether gradients are compared at equal length."""

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        m = len(context.mentors)
        if self.C * m < 1:
            raise RecipeError(
                f"method.C = {self.C}: the weights of {m} teachers, each at most C, cannot sum to 1",
                hint=f"--set method.C={1 / m:.2g} gives all the same weight, from 1 on there is no limit; default 0.6.",
            )

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        g = mean_gradients(lesson.student.out.detach(), lesson.mentors_out, tau=self.tau)  # [M, K]
        w = least_norm_weights(g, C=self.C, normalise=self.normalise)  # [M]
        lesson.notes["weight"] = w
        each = lesson.soft(self.tau).mean(-1)  # [M]
        return {"hard": self.alpha * lesson.hard(), "mentors": self.beta * (w * each).sum()}


def _cross_entropies(out: Float[Tensor, "M B K"], target: Tensor) -> Float[Tensor, "M B"]:
    return torch.stack([F.cross_entropy(one.float(), target, reduction="none") for one in out])


def _projector(cin: int, cout: int, *, wide: bool) -> nn.Module:
    """From the student's channels to a teacher's, at the teacher's size."""
    if not wide:
        return layers.conv_bn_relu(cin, cout, bias=True)
    half = max(cin // 2, 1)
    return nn.Sequential(
        layers.conv_bn_relu(cin, half), layers.conv_bn_relu(half, half, 3), layers.conv_bn_relu(half, cout)
    )


def _rest(mentor: Member, map_: Float[Tensor, "B C H W"]) -> Tail:
    """The mentor's layers after its last map: pooling and classifier, and what may come before those.

    Raises RecipeError if they take more than the last map.
    """
    try:
        stages = [stage for stage in mentor.taps() if stage.startswith("stage")]
        return Tail(mentor.net, mentor.head, mentor.input_size, mentor.name, stages[-1])
    except RecipeError as error:
        raise RecipeError(
            f"method.feature: the classifier of {mentor.name} reads more than its last map "
            f"({'x'.join(map(str, map_.shape[1:]))}), so it cannot be applied to the student's",
            hint="--set method.feature=0 leaves the feature part out, or choose a convolutional teacher.",
        ) from error
