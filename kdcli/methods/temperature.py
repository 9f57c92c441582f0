"""Methods that find the temperature themselves: CTKD learns it against the student, DTKD reads it off the logits."""

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from kdcli import losses
from kdcli.methods.base import Epochs, Lesson, Method, Phase, Temperature, Terms
from kdcli.methods.logits import warm_up


class CTKD(Method):
    """Li et al. 2023, Curriculum Temperature for Knowledge Distillation, arXiv 2211.16231, with one global temperature.

    T = t_start + t_end * sigmoid(r), in (1, 21) by default; r learns with the student's optimiser, but its gradient is
    multiplied by a cosine from decay_max to decay_min over the first decay_loops epochs (counted from 1): in the end it
    makes the student's task as hard as it can. r starts at 1 (T = 15.6) and is decayed like every other parameter, as
    in the authors' code, which draws T towards the middle of its range; `train.decay_norm_and_bias = false` spares it.
    alpha, beta: weights of the labels and of the teacher.
    """

    capturable = False

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 0.9,
        t_start: Temperature = 1.0,
        t_end: Annotated[float, Field(ge=0)] = 20.0,
        decay_max: float = 0.0,
        decay_min: float = -1.0,
        decay_loops: Epochs = 10,
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.t_start, self.t_end = alpha, beta, t_start, t_end
        self.decay_max, self.decay_min, self.decay_loops = decay_max, decay_min, decay_loops
        self.r = nn.Parameter(torch.ones(()))

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        student, teacher = lesson.student.out, lesson.mentors_out[0]
        factor = losses.reversal(
            int(lesson.epoch) + 1, decay_max=self.decay_max, decay_min=self.decay_min, decay_loops=self.decay_loops
        )
        tau = self.t_start + self.t_end * losses.reversed_gradient(self.r, factor).sigmoid()
        lesson.notes["temperature"] = tau.detach()
        return {
            "hard": self.alpha * lesson.task.hard(student, lesson.target).mean(),
            "teacher": self.beta * lesson.task.soft(student, teacher, tau).mean(),
        }


class DTKD(Method):
    """Wei and Bai 2024, Dynamic Temperature Knowledge Distillation, arXiv 2404.12711.

    alpha: weight of the term whose temperatures follow the logits, each sample's own; beta: of plain distillation at
    tau (the authors take 1 and 0.5 for ResNet-110 to ResNet-32). warmup: epochs over which both grow to their full
    weight. ce_weight: of the labels.
    """

    tasks = frozenset({"classify"})

    def __init__(
        self,
        tau: Temperature = 4.0,
        alpha: float = 3.0,
        beta: float = 1.0,
        warmup: Epochs = 20,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.tau, self.alpha, self.beta, self.warmup, self.ce_weight = tau, alpha, beta, warmup, ce_weight
        self.capturable = not warmup

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        student, teacher, grown = lesson.student.out, lesson.mentors_out[0], warm_up(lesson, self.warmup)
        tau_s, tau_t = losses.dynamic_temperatures(student, teacher, tau=self.tau)
        lesson.notes |= {"temperature": tau_t.detach().mean(), "student_temperature": tau_s.detach().mean()}
        dynamic = losses.dtkd_loss(student, teacher, tau_s=tau_s, tau_m=tau_t)
        return {
            "hard": self.ce_weight * lesson.task.hard(student, lesson.target).mean(),
            "dynamic": grown * self.alpha * dynamic.mean(),
            "teacher": grown * self.beta * lesson.task.soft(student, teacher, self.tau).mean(),
        }
