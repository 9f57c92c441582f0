"""The control and the two plain ways to learn from mentors: alone, from the teacher, from all alike."""

from typing import Literal

from kdcli.methods.base import Lesson, Method, Phase, Temperature, Terms


class NoKD(Method):
    """No teacher at all: cross-entropy with the labels. The control of every comparison."""

    symmetric = True

    teachers = 0

    def __init__(self) -> None:
        super().__init__()

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        return {"hard": lesson.task.hard(lesson.student.out, lesson.target).mean()}


class KD(Method):
    """Hinton's distillation from the teacher alone; peers are not heard.

    Hinton et al. 2015 (arXiv 1503.02531). Weights and temperature are the CIFAR recipe's (papers.md section 5):
    0.1 cross-entropy, 0.9 distillation, temperature 4.
    """

    symmetric = True

    def __init__(self, tau: Temperature = 4.0, alpha: float = 0.1, beta: float = 0.9) -> None:
        super().__init__()
        self.tau, self.alpha, self.beta = tau, alpha, beta

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        student, teacher = lesson.student.out, lesson.mentors_out[0]
        return {
            "hard": self.alpha * lesson.task.hard(student, lesson.target).mean(),
            "teacher": self.beta * lesson.task.soft(student, teacher, self.tau).mean(),
        }


class Aver(Method):
    """All mentors weighted alike at one temperature: the baseline of ClassroomKD, Eq. 12.

    The published figures came from code whose temperature was 1 whatever its `tau` (papers.md section 2.1): set
    `tau = 1` to mimic them. `form = "mean"` is the AVER of CA-MKD and AE-KD (with tau 4).
    """

    symmetric = True

    def __init__(self, tau: Temperature = 4.0, form: Literal["sum", "mean"] = "sum") -> None:
        super().__init__()
        self.tau, self.form = tau, form

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        each = lesson.task.soft(lesson.student.out, lesson.mentors_out, self.tau).mean(-1)  # [M]
        return {
            "hard": lesson.task.hard(lesson.student.out, lesson.target).mean(),
            "mentors": each.sum() if self.form == "sum" else each.mean(),  # Eq. 12
        }
