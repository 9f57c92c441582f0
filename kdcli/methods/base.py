"""What a method is: an equation over a lesson, and what it alone must own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from kdcli.data.dataset import DataSet
from kdcli.models.member import Member
from kdcli.models.outputs import Output
from kdcli.recipe import Recipe, TrainConfig
from kdcli.tasks import TASKS, Task

Terms = dict[str, Tensor]
"""Named weighted scalar terms; their sum is the loss. `hard` is the task's own, all others are distillation."""
Temperature = Annotated[float, Field(gt=0)]
"""An option that logits are divided by."""
Weight = Annotated[float, Field(ge=0)]
"""An option that a term is multiplied by."""
Share = Annotated[float, Field(ge=0, le=1)]
"""An option that splits 1 between two parts."""
Count = Annotated[int, Field(ge=1)]
Epochs = Annotated[int, Field(ge=0)]
"""An option that counts epochs; 0: none."""
ANY: frozenset[str] = frozenset(TASKS)
"""Every task: for methods whose equation asks only what the task protocol offers."""


class Need(StrEnum):
    """What a method needs beyond logits."""

    MAPS = "maps"  # every stage's map
    PRE = "pre"  # also the maps before the stages' last activation
    POOLED = "pooled"  # penultimate vectors
    INDEX = "index"  # each sample's number in its data set
    TWO_VIEWS = "two_views"  # a second, strongly augmented view of every image
    HARD_TARGET = "hard_target"  # labels that are not mixed
    FULL_BATCHES = "full_batches"  # the loss couples the batch: no gradient accumulation
    PAIRS = "pairs"  # the loss compares images: never a batch of one


@dataclass
class Lesson:
    """Everything a method may look at in one step."""

    target: Tensor  # [B, ...] as the task has it: class numbers [B], or [B, K]
    index: Tensor  # [B] each sample's number in its data set
    epoch: float  # epochs since the start, with the fraction of this one
    step: int  # updates since the start
    task: Task
    generator: torch.Generator  # this learner's own noise, a function of (train.seed, step)
    student: Output
    outputs: dict[str, Output]  # of every learner that reads images, the student included
    mentors: list[Output]  # the teacher first; empty in a classroom without mentors
    notes: dict[str, Tensor] = field(default_factory=dict)
    """What the method wants logged: [M] per mentor, [M+1] student first, or a scalar; averaged over the epoch."""

    @cached_property
    def mentors_out(self) -> Float[Tensor, "M B ..."]:
        """All mentors' outputs; a method with `teachers` >= 1 never meets a classroom without mentors."""
        return torch.stack([mentor.out for mentor in self.mentors])

    @property
    def teacher(self) -> Output:
        """The teacher's output."""
        return self.mentors[0]

    def hard(self) -> Float[Tensor, ""]:
        """The task's loss of the student with the labels, batch mean."""
        return self.task.hard(self.student.out, self.target).mean()

    def soft(self, tau: float | Tensor) -> Float[Tensor, "M B"]:
        """The task's distillation loss of the student against every mentor, of every image."""
        return self.task.soft(self.student.out, self.mentors_out, tau)


@dataclass
class SetupContext:
    """What a method may build from at `setup`.

    new_student: another student like the one that learns, or of another architecture, from scratch:
        new_student(seed, architecture or None).
    """

    student: Member
    mentors: list[Member]
    data: DataSet
    task: Task
    train: TrainConfig
    device: torch.device
    new_student: Callable[[int, str | None], Member]

    @property
    def teacher(self) -> Member | None:
        return self.mentors[0] if self.mentors else None


@dataclass(frozen=True)
class Phase:
    """A run of epochs in which some learners learn.

    Phases of the same name are one training in pieces: its optimizer keeps its state, its schedule spans the sum of
    their epochs.
    """

    name: str
    epochs: int
    learners: tuple[str, ...]
    train: TrainConfig  # its optimizer and schedule; phases of one name share both


class Method(nn.Module):
    """One way to learn from mentors. Most are `loss` alone.

    Parameters of the method itself (adapters) are trained with the learners of every phase; buffers are saved with the
    run.
    """

    needs: frozenset[Need] = frozenset()
    """What it needs beyond logits."""
    tasks: frozenset[str] = ANY
    """The tasks that its equation means; others are refused."""
    teachers: int = 1
    """The least number of mentors."""
    capturable: bool = True
    """Whether `loss` and `after` are the same arithmetic at every step, so that a CUDA graph may replay them: they read
    neither lesson.epoch nor lesson.step and change nothing but tensors, in place."""
    reads_logits: ClassVar[bool] = True
    """Whether it learns from the mentors' logits, so that TeKAP's noise on them makes a difference."""
    symmetric: ClassVar[bool] = False
    """Whether two peers may change places: no peer has a part of its own."""
    runs_networks: ClassVar[bool] = False
    """Whether `loss` runs networks of the method's own in the student's precision."""
    cures: ClassVar[dict[Need, str]] = {}
    """For a need that a recipe cannot meet, the option that removes the need."""
    context: SetupContext

    @classmethod
    def expand(cls, recipe: Recipe) -> Recipe:
        """The recipe with the stages that the method's options stand for."""
        return recipe

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        """Size whatever depends on the networks, from one real lesson (None when the method needs nothing of it)."""

    def learners(self) -> dict[str, nn.Module]:
        """Name -> module that learns; those that read images (a Member) appear in `lesson.outputs`.

        A module of the method's own that is named here learns only in the phases that name it.
        """
        return {"student": self.context.student}

    def phases(self, train: TrainConfig) -> list[Phase]:
        """The phases of the training; by default one with all learners for the recipe's epochs."""
        return [Phase("main", train.epochs, tuple(self.learners()), train)]

    def begin_epoch(self, epoch: int, train_pass: Callable[[], Iterator[Lesson]]) -> None:
        """Called once before every epoch; `train_pass()` iterates the training set once without gradient.

        What it changes belongs in buffers: a run resumed within the epoch loads them and does not call this again.
        """

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        """The named terms of one batch. No value may be read back to the host here."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def after(self, lesson: Lesson) -> None:
        """Called after the update: memories, moving averages."""

    def graduate(self) -> Member:
        """What is evaluated, kept as the student and exported."""
        return self.context.student
