"""Methods for one teacher that read only logits: DKD, NKD, DIST, WSLD, CTKD, DTKD, MLKD."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcli.losses import logits as losses
from kdcli.methods.base import Epochs, Lesson, Method, Need, Phase, Temperature, Terms

STRONG = (3.0, 4.0, 5.0)  # temperatures at which MLKD's official code takes the instance term from the strong view


def warm_up(lesson: Lesson, epochs: int) -> float:
    """A weight that grows linearly to 1 over the first `epochs`, in steps of an epoch, counted from 1."""
    return min((int(lesson.epoch) + 1) / epochs, 1.0) if epochs else 1.0


class DKD(Method):
    """Zhao et al. 2022, Decoupled Knowledge Distillation (arXiv 2203.08679).

    The paper's beta is 2 for ResNet pairs (R56-R20, R110-R32), 6 for VGG and WRN pairs of one family, and 8 for
    ResNet-32x4's students and pairs of two families (the default).
    """

    tasks = frozenset({"classify"})
    needs = frozenset({Need.HARD_TARGET})

    tau: Temperature = 4.0
    """Temperature of the teacher and the student."""
    alpha: float = 1.0
    """Weight of the target class's part."""
    beta: float = 8.0
    """Weight of the other classes' part."""
    warmup: Epochs = 20
    """Epochs over which both parts grow to their full weight."""
    ce_weight: float = 1.0
    """Weight of the loss with the labels."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.capturable = not self.warmup

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        target_class, others = losses.dkd_loss(lesson.student.out, lesson.teacher.out, lesson.target, tau=self.tau)
        grown = warm_up(lesson, self.warmup)
        return {
            "hard": self.ce_weight * lesson.hard(),
            "target_class": grown * self.alpha * target_class.mean(),
            "other_classes": grown * self.beta * others.mean(),
        }


class NKD(Method):
    """Yang et al. 2023, normalised knowledge distillation (arXiv 2303.13005)."""

    tasks = frozenset({"classify"})
    needs = frozenset({Need.HARD_TARGET})

    tau: Temperature = 1.0
    """Temperature of the non-target classes."""
    gamma: float = 1.5
    """Weight of the non-target classes."""
    ce_weight: float = 1.0
    """Weight of the loss with the labels."""

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        target_class, others = losses.nkd_loss(lesson.student.out, lesson.teacher.out, lesson.target, tau=self.tau)
        return {
            "hard": self.ce_weight * lesson.hard(),
            "target_class": target_class.mean(),
            "other_classes": self.gamma * others.mean(),
        }


class DIST(Method):
    """Huang et al. 2022, Knowledge Distillation from A Stronger Teacher (arXiv 2205.10536).

    The authors' CIFAR recipe uses tau 4, their ImageNet recipe tau 1. Columns run over the batch, so it needs two
    images.
    """

    tasks = frozenset({"classify"})
    needs = frozenset({Need.FULL_BATCHES, Need.PAIRS})

    tau: Temperature = 4.0
    """Temperature of the teacher and the student."""
    beta: float = 1.0
    """Weight of the correlation between the classes of a sample."""
    gamma: float = 1.0
    """Weight of the correlation between the samples of a class."""
    kd_weight: float = 2.0
    """Weight of both correlations."""
    ce_weight: float = 1.0
    """Weight of the loss with the labels."""

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        inter, intra = losses.dist_loss(lesson.student.out, lesson.teacher.out, tau=self.tau)
        return {
            "hard": self.ce_weight * lesson.hard(),
            "inter": self.kd_weight * self.beta * inter,
            "intra": self.kd_weight * self.gamma * intra,
        }


class WSLD(Method):
    """Zhou et al. 2021, weighted soft labels (arXiv 2102.00650); published on ImageNet.

    The cross-entropies that weight the samples are without label smoothing.
    """

    tasks = frozenset({"classify"})

    tau: Temperature = 2.0
    """Temperature of the teacher and the student."""
    alpha: float = 2.5
    """Weight of the soft labels."""
    ce_weight: float = 1.0
    """Weight of the loss with the labels."""

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        soft = losses.wsld_loss(lesson.student.out, lesson.teacher.out, lesson.target, tau=self.tau)
        return {"hard": self.ce_weight * lesson.hard(), "teacher": self.alpha * soft.mean()}


class CTKD(Method):
    """Li et al. 2023, Curriculum Temperature for Knowledge Distillation (arXiv 2211.16231), one global temperature.

    T = t_start + t_end * sigmoid(r), in (1, 21) by default. r learns with the student's optimizer, but its gradient is
    multiplied by a cosine from decay_max to decay_min over the first decay_loops epochs (counted from 1), so that in
    the end it makes the student's task as hard as it can. r starts at 1 (T = 15.6) and, as in the authors' code, has
    weight decay like every other parameter, which draws T towards the middle of its range;
    `train.decay_norm_and_bias = false` exempts it.
    """

    capturable = False

    alpha: float = 0.1
    """Weight of the loss with the labels."""
    beta: float = 0.9
    """Weight of the distillation loss."""
    t_start: Temperature = 1.0
    """Lower bound of the temperature."""
    t_end: Annotated[float, Field(ge=0)] = 20.0
    """Range of the temperature above t_start."""
    decay_max: float = 0.0
    """Factor of the temperature's gradient at the start."""
    decay_min: float = -1.0
    """Factor of the temperature's gradient after decay_loops epochs."""
    decay_loops: Epochs = 10
    """Epochs over which the factor changes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.r = nn.Parameter(torch.ones(()))

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        factor = losses.reversal(
            int(lesson.epoch) + 1, decay_max=self.decay_max, decay_min=self.decay_min, decay_loops=self.decay_loops
        )
        tau = self.t_start + self.t_end * losses.reversed_gradient(self.r, factor).sigmoid()
        lesson.notes["temperature"] = tau.detach()
        soft = lesson.task.soft(lesson.student.out, lesson.teacher.out, tau)
        return {"hard": self.alpha * lesson.hard(), "teacher": self.beta * soft.mean()}


class DTKD(Method):
    """Wei and Bai 2024, Dynamic Temperature Knowledge Distillation (arXiv 2404.12711).

    For ResNet-110 to ResNet-32 the authors use alpha 1 and beta 0.5.
    """

    tasks = frozenset({"classify"})

    tau: Temperature = 4.0
    """Mean temperature of the teacher and the student."""
    alpha: float = 3.0
    """Weight of the term whose temperatures follow the logits of each sample."""
    beta: float = 1.0
    """Weight of plain distillation at tau."""
    warmup: Epochs = 20
    """Epochs over which both grow to their full weight."""
    ce_weight: float = 1.0
    """Weight of the loss with the labels."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.capturable = not self.warmup

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        student, teacher, grown = lesson.student.out, lesson.teacher.out, warm_up(lesson, self.warmup)
        tau_s, tau_t = losses.dynamic_temperatures(student, teacher, tau=self.tau)
        lesson.notes |= {"temperature": tau_t.detach().mean(), "student_temperature": tau_s.detach().mean()}
        dynamic = losses.dtkd_loss(student, teacher, tau_s=tau_s, tau_m=tau_t)
        return {
            "hard": self.ce_weight * lesson.hard(),
            "dynamic": grown * self.alpha * dynamic.mean(),
            "teacher": grown * self.beta * lesson.task.soft(student, teacher, self.tau).mean(),
        }


class MLKD(Method):
    """Jin et al. 2023, Multi-level Logit Distillation (CVPR 2023).

    Three levels, each summed over the temperatures: the KL of every image, the similarities of the samples of a batch,
    the similarities of the classes; each of the weak view and of the strong one (RandAugment, two operations of
    magnitude 10). The many terms add up to a large loss: the authors halve the learning rate (0.025 instead of 0.05).
    variant: `paper` is that equation on both views, without masks. `official` is what the authors' code computes: the
        strong view's instance term only at 3, 4 and 5, with the weak view's a second time at the other temperatures;
        class and batch terms of the weak view alone; and the weak view's terms times the share of samples (for the
        class term: of classes) for which the teacher's confidence is at most the median, because its masks multiply
        sums that are already taken.
    """

    tasks = frozenset({"classify"})
    needs = frozenset({Need.TWO_VIEWS, Need.FULL_BATCHES})

    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)] = (2.0, 3.0, 4.0, 5.0, 6.0)
    """Temperatures over which every level is summed."""
    ce_weight: float = 0.1
    """Weight of the loss with the labels, of both views."""
    kd_weight: float = 0.9
    """Weight of the three levels."""
    variant: Literal["paper", "official"] = "paper"
    """The paper's equation, or what the authors' code computes."""

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        student, teacher = lesson.student, lesson.teacher
        assert student.strong is not None
        assert teacher.strong is not None
        weak, strong = (student.out, teacher.out), (student.strong.out, teacher.strong.out)
        hard = lesson.hard() + lesson.task.hard(strong[0], lesson.target).mean()
        if self.variant == "official":
            unsure, rare = masks(teacher.out)
            again = [strong if tau in STRONG else weak for tau in self.temperatures]
            instance = unsure * self._instance(lesson, [weak] * len(again)) + self._instance(lesson, again)
            batch, classes = unsure * self._batch(weak), rare * self._classes(weak)
        else:
            each = [self._instance(lesson, [view] * len(self.temperatures)) for view in (weak, strong)]
            instance = each[0] + each[1]
            batch, classes = self._batch(weak) + self._batch(strong), self._classes(weak) + self._classes(strong)
        return {
            "hard": self.ce_weight * hard,
            "instance": self.kd_weight * instance,
            "batch": self.kd_weight * batch,
            "class": self.kd_weight * classes,
        }

    def _instance(self, lesson: Lesson, views: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The KL of one view (student's logits, teacher's) for each temperature, summed."""
        pairs = zip(self.temperatures, views, strict=True)
        return torch.stack([lesson.task.soft(s, t, tau).mean() for tau, (s, t) in pairs]).sum()

    def _batch(self, view: tuple[Tensor, Tensor]) -> Tensor:
        return torch.stack([losses.batch_level_loss(*view, tau=tau) for tau in self.temperatures]).sum()

    def _classes(self, view: tuple[Tensor, Tensor]) -> Tensor:
        return torch.stack([losses.class_level_loss(*view, tau=tau) for tau in self.temperatures]).sum()


@torch.no_grad()
def masks(teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The share of samples whose largest probability, and of classes whose mass in the batch, is at most the median."""
    p = teacher.float().softmax(-1)
    sure, mass = p.amax(-1), p.sum(0)
    return (sure <= sure.quantile(0.5)).float().mean(), (mass <= mass.quantile(0.5)).float().mean()
