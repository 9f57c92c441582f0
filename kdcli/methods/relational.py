"""Methods that match how a batch's pooled vectors lie to each other: the two networks' widths may differ."""

from kdcli.losses import relational as losses
from kdcli.methods.base import Lesson, Method, Phase, Terms, Weight


class PKT(Method):
    """Probabilistic knowledge transfer, Passalis and Tefas 2018, arXiv 1803.10837, on pooled vectors."""

    reads_logits = False

    needs = frozenset({"pooled", "full_batches", "pairs"})

    def __init__(self, ce_weight: Weight = 1.0, outer_weight: Weight = 30000.0) -> None:
        super().__init__()
        self.ce_weight, self.outer_weight = ce_weight, outer_weight

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        taught = losses.probabilistic_loss(lesson.student.vectors, lesson.teacher.vectors)
        return {
            "hard": self.ce_weight * lesson.task.hard(lesson.student.out, lesson.target).mean(),
            "neighbours": self.outer_weight * taught,
        }


class RKD(Method):
    """Relational knowledge distillation, Park et al. 2019, arXiv 1904.05068, on pooled vectors.

    Memory grows with the cube of the batch: the angles of 256 samples are 64 MiB of numbers, several times over;
    beyond `losses.relations.PART` numbers they are computed in parts.
    """

    reads_logits = False

    needs = frozenset({"pooled", "full_batches", "pairs"})

    def __init__(
        self,
        w_distance: Weight = 25.0,
        w_angle: Weight = 50.0,
        ce_weight: Weight = 1.0,
        outer_weight: Weight = 1.0,
    ) -> None:
        super().__init__()
        self.w_distance, self.w_angle = w_distance, w_angle
        self.ce_weight, self.outer_weight = ce_weight, outer_weight

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        distance, angle = losses.relational_loss(
            lesson.student.vectors, lesson.teacher.vectors, w_distance=self.w_distance, w_angle=self.w_angle
        )
        return {
            "hard": self.ce_weight * lesson.task.hard(lesson.student.out, lesson.target).mean(),
            "distance": self.outer_weight * distance,
            "angle": self.outer_weight * angle,
        }
