"""MLKD: what the teacher says of each image, of images relative to each other and of classes, over two views."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdcli import losses
from kdcli.methods.base import Lesson, Method, Phase, Temperature, Terms

STRONG = (3.0, 4.0, 5.0)  # temperatures at which the authors' code takes the instance term from the strong view


class MLKD(Method):
    """Jin et al. 2023, Multi-level Logit Distillation (CVPR 2023); papers.md section 8 calls it MLLD.

    Three levels, each summed over the temperatures: every image's own KL, the batch's samples among each other, the
    classes among each other; of the weak view and of the strong one (RandAugment, two operations of magnitude 10).
    ce_weight, kd_weight: of the labels (of both views) and of all that teaches. So many terms are large: the authors
    halve the learning rate (0.025 where others take 0.05).
    variant: `paper` is that equation on both views, without masks. `official` is what the authors' code evaluates: the
    instance term of the strong view only at 3, 4 and 5, the weak one's a second time at the other temperatures; class
    and batch terms of the weak view alone; and the weak view's terms times the share of samples (for the class term: of
    classes) of which the teacher is not surer than of their median, for its masks fall on sums already taken.
    """

    tasks = frozenset({"classify"})

    needs = frozenset({"two_views", "full_batches"})

    def __init__(
        self,
        temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)] = (2.0, 3.0, 4.0, 5.0, 6.0),
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        variant: Literal["paper", "official"] = "paper",
    ) -> None:
        super().__init__()
        self.temperatures, self.ce_weight, self.kd_weight = temperatures, ce_weight, kd_weight
        self.official = variant == "official"

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        student, teacher = lesson.student, lesson.teacher
        assert student.strong is not None
        assert teacher.strong is not None
        weak, strong = (student.out, teacher.out), (student.strong.out, teacher.strong.out)
        hard = lesson.task.hard(weak[0], lesson.target).mean() + lesson.task.hard(strong[0], lesson.target).mean()
        if self.official:
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
        """Of one view (student's logits, teacher's) for each temperature."""
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
