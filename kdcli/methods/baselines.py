"""The control and the two baselines: no mentor, the teacher alone, all mentors with equal weights."""

from typing import Literal

from kdcli.methods.base import Lesson, Method, Phase, Temperature, Terms


class NoKD(Method):
    """The loss with the labels alone, without mentors: the control of every comparison."""

    teachers = 0

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        return {"hard": lesson.hard()}


class KD(Method):
    """Distillation from the teacher alone, Hinton et al. 2015 (arXiv 1503.02531); peers are ignored.

    The defaults are the weights and the temperature of the CIFAR recipe.
    """

    tau: Temperature = 4.0
    """Temperature of the teacher and the student."""
    alpha: float = 0.1
    """Weight of the loss with the labels."""
    beta: float = 0.9
    """Weight of the distillation loss."""

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        soft = lesson.task.soft(lesson.student.out, lesson.teacher.out, self.tau)  # [B]
        return {"hard": self.alpha * lesson.hard(), "teacher": self.beta * soft.mean()}


class Aver(Method):
    """All mentors with equal weights at one temperature: the baseline of ClassroomKD (arXiv 2409.20237), Eq. 12.

    The published figures came from code whose temperature was always 1: `tau = 1` reproduces them. `form = "mean"` is
    the AVER of CA-MKD and AE-KD (with tau 4).
    """

    tau: Temperature = 4.0
    """Temperature of the mentors and the student."""
    form: Literal["sum", "mean"] = "sum"
    """Whether the mentors' losses are summed (Eq. 12) or averaged."""

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        each = lesson.soft(self.tau).mean(-1)  # [M]
        return {
            "hard": lesson.hard(),
            "mentors": each.sum() if self.form == "sum" else each.mean(),  # Eq. 12
        }
