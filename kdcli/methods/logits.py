"""Single-teacher methods that read logits alone: DKD, NKD, DIST, WSLD. Each adds its own term to cross-entropy."""

from kdcli import losses
from kdcli.methods.base import Epochs, Lesson, Method, Phase, Temperature, Terms


def warm_up(lesson: Lesson, epochs: int) -> float:
    """A weight that grows evenly to 1 over the first `epochs`, an epoch at a time and counted from 1."""
    return min((int(lesson.epoch) + 1) / epochs, 1.0) if epochs else 1.0


class DKD(Method):
    """Zhao et al. 2022, Decoupled Knowledge Distillation, arXiv 2203.08679.

    alpha: weight of the target class's part. beta: of the other classes'; the paper's is 2 for ResNet pairs (R56-R20,
    R110-R32), 6 for VGG and WRN pairs of one kind, 8 for ResNet-32x4's students and pairs of two kinds (the default).
    warmup: epochs over which both grow to their full weight. ce_weight: of the labels.
    """

    tasks = frozenset({"classify"})

    needs = frozenset({"hard_target"})

    def __init__(
        self,
        tau: Temperature = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        warmup: Epochs = 20,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.tau, self.alpha, self.beta, self.warmup, self.ce_weight = tau, alpha, beta, warmup, ce_weight
        self.capturable = not warmup

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        student, grown = lesson.student.out, warm_up(lesson, self.warmup)
        target_class, others = losses.dkd_loss(student, lesson.mentors_out[0], lesson.target, tau=self.tau)
        return {
            "hard": self.ce_weight * lesson.task.hard(student, lesson.target).mean(),
            "target_class": grown * self.alpha * target_class.mean(),
            "other_classes": grown * self.beta * others.mean(),
        }


class NKD(Method):
    """Yang et al. 2023, normalised knowledge distillation, arXiv 2303.13005.

    gamma: weight of the non-target classes. tau: their temperature. ce_weight: of the labels.
    """

    tasks = frozenset({"classify"})

    needs = frozenset({"hard_target"})

    def __init__(self, tau: Temperature = 1.0, gamma: float = 1.5, ce_weight: float = 1.0) -> None:
        super().__init__()
        self.tau, self.gamma, self.ce_weight = tau, gamma, ce_weight

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        student = lesson.student.out
        target_class, others = losses.nkd_loss(student, lesson.mentors_out[0], lesson.target, tau=self.tau)
        return {
            "hard": self.ce_weight * lesson.task.hard(student, lesson.target).mean(),
            "target_class": target_class.mean(),
            "other_classes": self.gamma * others.mean(),
        }


class DIST(Method):
    """Huang et al. 2022, Knowledge Distillation from A Stronger Teacher, arXiv 2205.10536.

    beta: weight of the correlation between classes of a sample; gamma: between samples of a class; kd_weight: of both.
    The authors' CIFAR recipe is tau 4, their ImageNet recipe tau 1. Columns run over the batch, so it needs two images.
    """

    tasks = frozenset({"classify"})

    needs = frozenset({"full_batches", "pairs"})

    def __init__(
        self,
        tau: Temperature = 4.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        kd_weight: float = 2.0,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.tau, self.beta, self.gamma, self.kd_weight, self.ce_weight = tau, beta, gamma, kd_weight, ce_weight

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        student = lesson.student.out
        inter, intra = losses.dist_loss(student, lesson.mentors_out[0], tau=self.tau)
        return {
            "hard": self.ce_weight * lesson.task.hard(student, lesson.target).mean(),
            "inter": self.kd_weight * self.beta * inter,
            "intra": self.kd_weight * self.gamma * intra,
        }


class WSLD(Method):
    """Zhou et al. 2021, weighted soft labels, arXiv 2102.00650; published on ImageNet.

    alpha: weight of the soft labels. The marks that weigh samples are cross-entropies without label smoothing.
    """

    tasks = frozenset({"classify"})

    def __init__(self, tau: Temperature = 2.0, alpha: float = 2.5, ce_weight: float = 1.0) -> None:
        super().__init__()
        self.tau, self.alpha, self.ce_weight = tau, alpha, ce_weight

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        student = lesson.student.out
        soft = losses.wsld_loss(student, lesson.mentors_out[0], lesson.target, tau=self.tau)
        return {
            "hard": self.ce_weight * lesson.task.hard(student, lesson.target).mean(),
            "teacher": self.alpha * soft.mean(),
        }
