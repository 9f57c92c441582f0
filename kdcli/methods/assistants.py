"""Assistants between a large teacher and a small student: TAKD and DGKD. They are trained first, as stages."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdcli.methods.base import Lesson, Method, Phase, Share, Temperature, Terms
from kdcli.recipe import STAGE, Recipe


class Assisted(Method):
    """What TAKD and DGKD share: a chain of assistants, from the largest to the smallest.

    Each assistant is trained by the same method, and they replace the peers. Without assistants the mentors of the
    classroom teach.
    """

    assistants: tuple[str, ...] = ()
    """Architectures of the assistants, the largest first."""
    tau: Temperature = 5.0
    """Temperature of the mentors and the student."""
    lambda_: Share = 0.5
    """Weight of the distillation; 1 - lambda_ is that of the labels."""
    variant: Literal["paper", "official"] = "paper"
    """`official` averages the divergence over batch and classes: K times less than the papers' batch mean."""

    @staticmethod
    def mentors_of(teacher: str, trained: list[str]) -> tuple[str, list[str]]:
        """Teacher and peers of the next student after the assistants `trained`."""
        return teacher, list(trained)

    @classmethod
    def expand(cls, recipe: Recipe) -> Recipe:
        """The recipe with one stage per assistant."""
        options, teacher = recipe.method.options, recipe.classroom.teacher
        names = options.get("assistants") or []
        if not names or not teacher:
            return recipe
        method = {"name": recipe.method.name, **{k: x for k, x in options.items() if k != "assistants"}}
        stages: list[dict[str, Any]] = [one.model_dump(exclude_none=True) for one in recipe.stage]
        trained: list[str] = []
        for n, arch in enumerate(names, 1):
            above, peers = cls.mentors_of(teacher, trained)
            name = f"assistant{n}"
            stages.append({"name": name, "student": arch, "teacher": above, "peers": peers, "method": method})
            trained.append(f"{STAGE}{name}")
        above, peers = cls.mentors_of(teacher, trained)
        return recipe.with_(**{"stage": stages, "classroom.teacher": above, "classroom.peers": peers})

    def terms(self, lesson: Lesson, each: Tensor) -> Terms:
        """The terms from `each` mentor's tau^2 KL [M, B]."""
        soft = each.sum(0).mean()
        if self.variant == "official":
            soft = soft / lesson.student.out.shape[-1]
        return {"hard": (1 - self.lambda_) * lesson.hard(), "mentors": self.lambda_ * soft}


class TAKD(Assisted):
    """Mirzadeh et al. 2020, "Improved Knowledge Distillation via Teacher Assistant" (arXiv 1902.03393).

    Each assistant learns from the one before it, the student from the last one. Peers are ignored.
    """

    @staticmethod
    def mentors_of(teacher: str, trained: list[str]) -> tuple[str, list[str]]:
        return (trained[-1] if trained else teacher), []

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        return self.terms(lesson, lesson.task.soft(lesson.student.out, lesson.mentors_out[:1], self.tau))


class DGKD(Assisted):
    """Son et al. 2021, "Densely Guided Knowledge Distillation using Multiple Teacher Assistants" (arXiv 2009.08825).

    Every assistant, and the student, learns from the teacher and all assistants before it.
    """

    drop_num: Annotated[int, Field(ge=0)] = 1
    """How many mentors are left out, drawn for each sample (`official`: for each batch); at least one always stays."""

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        each = lesson.soft(self.tau)  # [M, B]
        m, b = each.shape
        dropped = min(self.drop_num, m - 1)
        draw = torch.rand(m, 1 if self.variant == "official" else b, generator=lesson.generator, device=each.device)
        kept = draw.argsort(0).argsort(0) >= dropped  # all but the `dropped` smallest draws
        return self.terms(lesson, each * kept)
