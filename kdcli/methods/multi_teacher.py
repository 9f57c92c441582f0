"""Several teachers, and on every sample or batch a judgement whom to believe: EBKD, CA-MKD, AEKD."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses.multi_teacher import confidence_weights, entropy_weights, least_norm_weights, mean_gradients
from kdcli.methods import pairing
from kdcli.methods.base import Lesson, Method, Phase, SetupContext, Temperature, Terms
from kdcli.models import layers
from kdcli.models.member import Member
from kdcli.models.outputs import Output
from kdcli.models.split import Tail


class EBKD(Method):
    """Kwon et al. 2020, "Adaptive Knowledge Distillation Based on Entropy": the surer a teacher, the more it weighs.

    The equation is that of the public code (papers.md section 8): the weights sum to M - 1 and the mean over teachers
    is taken, so that all teachers together weigh (M - 1) / M.
    """

    tasks = frozenset({"classify"})

    symmetric = True

    teachers = 2

    def __init__(self, tau: Temperature = 4.0, alpha: float = 1.0, beta: float = 1.0) -> None:
        super().__init__()
        self.tau, self.alpha, self.beta = tau, alpha, beta

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        student, mentors = lesson.student.out, lesson.mentors_out
        w = entropy_weights(mentors)  # [M, B]
        lesson.notes["weight"] = w.mean(-1)
        return {
            "hard": self.alpha * lesson.task.hard(student, lesson.target).mean(),
            "mentors": self.beta * (w * lesson.task.soft(student, mentors, self.tau)).mean(),
        }


class CAMKD(Method):
    """Zhang et al. 2022, arXiv 2201.00007, "Confidence-Aware Multi-Teacher Knowledge Distillation".

    beta, feature: weights of the logit part and of the feature part. wide: the projectors' three-convolution form.
    The student's map, projected, is judged by what the teacher does with its own last map, frozen and in eval mode.
    variant: `official` divides both parts by M once more, and lets gradient flow through the feature part's weights.
    Every teacher's map is met by the student's original one: the authors' code goes on from the copy it resized for
    the teacher before.
    """

    tasks = frozenset({"classify"})

    teachers = 2
    projectors: nn.ModuleList

    def __init__(
        self,
        tau: Temperature = 4.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        feature: Annotated[float, Field(ge=0)] = 50.0,
        wide: bool = False,
        variant: Literal["paper", "official"] = "paper",
    ) -> None:
        super().__init__()
        self.tau, self.alpha, self.beta, self.feature, self.wide = tau, alpha, beta, feature, wide
        self.official = variant == "official"
        self.needs = frozenset({"maps", "pairs"} if feature else ())

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        self.projectors = nn.ModuleList()
        self.rests: list[Tail] = []
        if not self.feature:
            return
        assert lesson is not None
        width = _last(lesson.student).shape[1]
        for m, mentor in enumerate(context.mentors):
            map_ = _last(lesson.mentors[m])
            self.rests.append(_rest(mentor, map_))
            self.projectors.append(_projector(width, map_.shape[1], wide=self.wide))

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        student, mentors = lesson.student.out, lesson.mentors_out
        share = 1 / len(mentors) if self.official else 1.0
        w = confidence_weights(self._wrong(mentors, lesson.target))  # [M, B]
        lesson.notes["weight"] = w.mean(-1)
        soft = lesson.task.soft(student, mentors, self.tau)
        terms = {
            "hard": self.alpha * lesson.task.hard(student, lesson.target).mean(),
            "mentors": self.beta * share * (w * soft).sum(0).mean(),
        }
        if self.feature:
            terms["feature"] = self.feature * share * self._features(lesson)
        return terms

    def _features(self, lesson: Lesson) -> Float[Tensor, ""]:
        ours, far, probes = _last(lesson.student), [], []
        for m, (mentor, project, rest) in enumerate(
            zip(self.context.mentors, self.projectors, self.rests, strict=True)
        ):
            theirs = _last(lesson.mentors[m])
            mine = project(layers.resized_to(ours, (theirs.shape[2], theirs.shape[3])))
            far.append((mine - theirs).square().flatten(1).mean(1))  # [B]
            probe, _, _ = rest(mine)
            probes.append(probe if mentor.class_index is None else probe.index_select(-1, mentor.class_index))
        w = confidence_weights(self._wrong(torch.stack(probes), lesson.target))
        if not self.official:
            w = w.detach()
        return (w * torch.stack(far)).sum(0).mean()

    @staticmethod
    def _wrong(out: Float[Tensor, "M B K"], target: Tensor) -> Float[Tensor, "M B"]:
        return torch.stack([F.cross_entropy(one.float(), target, reduction="none") for one in out])


class AEKD(Method):
    """Du et al. 2020, "Agree to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient Space".

    Teachers are weighed so that their gradients together are shortest: the direction that none of them contradicts.
    C: the largest weight; 1 and more let one teacher have it all. normalise: gradients are compared at equal length.
    """

    tasks = frozenset({"classify"})

    symmetric = True

    teachers = 2
    needs = frozenset({"full_batches"})  # one mean gradient of the batch decides for all its samples

    def __init__(
        self,
        tau: Temperature = 4.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        C: Annotated[float, Field(gt=0)] = 0.6,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        self.tau, self.alpha, self.beta, self.C, self.normalise = tau, alpha, beta, C, normalise

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        m = len(context.mentors)
        if self.C * m < 1:
            raise RecipeError(
                f"method.C = {self.C}: {m} teachers of at most this weight cannot sum to 1",
                hint=f"--set method.C={1 / m:.2g} weighs all alike, anything from 1 sets no limit; the default is 0.6.",
            )

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        student, mentors = lesson.student.out, lesson.mentors_out
        g = mean_gradients(student.detach(), mentors, tau=self.tau)
        w = least_norm_weights(g, C=self.C, normalise=self.normalise)  # [M]
        lesson.notes["weight"] = w
        each = lesson.task.soft(student, mentors, self.tau).mean(-1)  # [M]
        return {
            "hard": self.alpha * lesson.task.hard(student, lesson.target).mean(),
            "mentors": self.beta * (w * each).sum(),
        }


def _last(output: Output) -> Float[Tensor, "B C H W"]:
    stages = output.stages
    return stages[pairing.tap(stages, "last", "the network", "tap")]


def _projector(cin: int, cout: int, *, wide: bool) -> nn.Module:
    """From the student's channels to a teacher's; its size is met before."""
    if not wide:
        return layers.conv_bn_relu(cin, cout, bias=True)
    half = max(cin // 2, 1)
    return nn.Sequential(
        layers.conv_bn_relu(cin, half), layers.conv_bn_relu(half, half, 3), layers.conv_bn_relu(half, cout)
    )


def _rest(mentor: Member, map_: Float[Tensor, "B C H W"]) -> Tail:
    """What the mentor makes of its last map: pooling and classifier, and what may come before those.

    Raises RecipeError where that is more than its last map.
    """
    try:
        stages = [stage for stage in mentor.taps() if stage.startswith("stage")]
        return Tail(mentor.net, mentor.head, mentor.input_size, mentor.name, stages[-1])
    except RecipeError as error:
        raise RecipeError(
            f"method.feature: the classifier of {mentor.name} does not take its last map "
            f"({'x'.join(map(str, map_.shape[1:]))}) alone, so it cannot judge the student's",
            hint="--set method.feature=0 leaves the feature part out, or choose a convolutional teacher.",
        ) from error
