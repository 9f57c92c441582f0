"""Methods that compare how the pooled vectors of a batch lie relative to each other; their widths may differ."""

from kdcli.losses import relational as losses
from kdcli.methods.base import Lesson, Method, Need, Phase, Terms, Weight


class PKT(Method):
    """Probabilistic knowledge transfer, Passalis and Tefas 2018 (arXiv 1803.10837), on pooled vectors."""

    reads_logits = False
    needs = frozenset({Need.POOLED, Need.FULL_BATCHES, Need.PAIRS})

    ce_weight: Weight = 1.0
    """Weight of the loss with the labels."""
    outer_weight: Weight = 30000.0
    """Weight of the relational loss."""

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        neighbours = losses.probabilistic_loss(lesson.student.vectors, lesson.teacher.vectors)
        return {"hard": self.ce_weight * lesson.hard(), "neighbours": self.outer_weight * neighbours}


class RKD(Method):
    """Relational knowledge distillation, Park et al. 2019 (arXiv 1904.05068), on pooled vectors.

    Memory grows with the cube of the batch: the angles of 256 samples are 64 MiB of numbers, several times over. Beyond
    `losses.relational.PART` numbers they are computed in parts.
    """

    reads_logits = False
    needs = frozenset({Need.POOLED, Need.FULL_BATCHES, Need.PAIRS})

    w_distance: Weight = 25.0
    """Weight of the distance term."""
    w_angle: Weight = 50.0
    """Weight of the angle term."""
    ce_weight: Weight = 1.0
    """Weight of the loss with the labels."""
    outer_weight: Weight = 1.0
    """Weight of both relational terms."""

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        distance, angle = losses.relational_loss(
            lesson.student.vectors, lesson.teacher.vectors, w_distance=self.w_distance, w_angle=self.w_angle
        )
        return {
            "hard": self.ce_weight * lesson.hard(),
            "distance": self.outer_weight * distance,
            "angle": self.outer_weight * angle,
        }
