"""Assistants between a large teacher and a small student: TAKD and DGKD. They are trained first, as stages."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdcli.methods.base import Lesson, Method, Phase, Temperature, Terms
from kdcli.recipe import STAGE, Recipe


class Assisted(Method):
    """What TAKD and DGKD share: a chain of assistants, from the largest to the smallest.

    assistants: their architectures; each is trained by the same method, and they take the peers' place. Without any
    the classroom's mentors teach as they are. lambda_: the share of the teaching.
    variant: `official` averages the divergence over batch and classes: K times less than the papers' batch mean.
    """

    def __init__(
        self, assistants: tuple[str, ...], tau: float, lambda_: float, variant: Literal["paper", "official"]
    ) -> None:
        super().__init__()
        self.assistants, self.tau, self.lambda_, self.official = assistants, tau, lambda_, variant == "official"

    @staticmethod
    def taught_by(teacher: str, trained: list[str]) -> tuple[str, list[str]]:
        """Teacher and peers of who comes next, when the assistants `trained` are there: here all."""
        return teacher, list(trained)

    @classmethod
    def expand(cls, recipe: Recipe) -> Recipe:
        """The recipe with a stage for every assistant."""
        options, teacher = recipe.method.options, recipe.classroom.teacher
        names = options.get("assistants") or []
        if not names or not teacher:
            return recipe
        method = {"name": recipe.method.name, **{k: x for k, x in options.items() if k != "assistants"}}
        stages: list[dict[str, Any]] = [one.model_dump(exclude_none=True) for one in recipe.stage]
        trained: list[str] = []
        for n, arch in enumerate(names, 1):
            above, peers = cls.taught_by(teacher, trained)
            name = f"assistant{n}"
            stages.append({"name": name, "student": arch, "teacher": above, "peers": peers, "method": method})
            trained.append(f"{STAGE}{name}")
        above, peers = cls.taught_by(teacher, trained)
        return recipe.with_(**{"stage": stages, "classroom.teacher": above, "classroom.peers": peers})

    def terms(self, lesson: Lesson, each: Tensor) -> Terms:
        """`each`: what is to be learned from every mentor [M, B], tau^2 KL."""
        taught = each.sum(0).mean()
        if self.official:
            taught = taught / lesson.student.out.shape[-1]
        return {
            "hard": (1 - self.lambda_) * lesson.task.hard(lesson.student.out, lesson.target).mean(),
            "mentors": self.lambda_ * taught,
        }


class TAKD(Assisted):
    """Mirzadeh et al. 2020, "Improved Knowledge Distillation via Teacher Assistant", arXiv 1902.03393.

    Each assistant learns from the one before, the student from the last. Peers are not heard.
    """

    def __init__(
        self,
        assistants: tuple[str, ...] = (),
        tau: Temperature = 5.0,
        lambda_: Annotated[float, Field(ge=0, le=1)] = 0.5,
        variant: Literal["paper", "official"] = "paper",
    ) -> None:
        super().__init__(assistants, tau, lambda_, variant)

    @staticmethod
    def taught_by(teacher: str, trained: list[str]) -> tuple[str, list[str]]:
        return (trained[-1] if trained else teacher), []

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        return self.terms(lesson, lesson.task.soft(lesson.student.out, lesson.mentors_out[:1], self.tau))


class DGKD(Assisted):
    """Son et al. 2021, "Densely Guided Knowledge Distillation using Multiple Teacher Assistants", arXiv 2009.08825.

    Every assistant, and the student, learns from the teacher and all assistants before it. drop_num: how many of these
    are left out, another choice for every sample (`official`: for every batch); one always stays.
    """

    def __init__(
        self,
        assistants: tuple[str, ...] = (),
        tau: Temperature = 5.0,
        lambda_: Annotated[float, Field(ge=0, le=1)] = 0.5,
        drop_num: Annotated[int, Field(ge=0)] = 1,
        variant: Literal["paper", "official"] = "paper",
    ) -> None:
        super().__init__(assistants, tau, lambda_, variant)
        self.drop_num = drop_num

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        each = lesson.task.soft(lesson.student.out, lesson.mentors_out, self.tau)  # [M, B]
        m, b = each.shape
        dropped = min(self.drop_num, m - 1)
        draw = torch.rand(m, 1 if self.official else b, generator=lesson.generator, device=each.device)
        kept = draw.argsort(0).argsort(0) >= dropped  # all but the `dropped` that drew least
        return self.terms(lesson, each * kept)
