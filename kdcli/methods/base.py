"""The interface of a method: an equation over a lesson, and the networks and memories that only this method has."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from kdcli.data.dataset import DataSet
from kdcli.methods import fields
from kdcli.methods.fields import Option
from kdcli.models.member import Member
from kdcli.models.outputs import Output
from kdcli.recipe import Recipe, TrainConfig
from kdcli.tasks import TASKS, Task

Terms = dict[str, Tensor]
"""Named weighted scalar terms; their sum is the loss. `hard` is the task's own, all others are distillation."""
Temperature = Annotated[float, Field(gt=0)]
"""Type of an option that divides logits."""
Weight = Annotated[float, Field(ge=0)]
"""Type of an option that multiplies a term."""
Share = Annotated[float, Field(ge=0, le=1)]
"""Type of an option that splits 1 between two parts."""
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Epochs = Annotated[int, Field(ge=0)]
"""Type of an option that counts epochs; 0: none."""
ANY: frozenset[str] = frozenset(TASKS)
"""Every task: for methods whose equation uses only what the task protocol offers."""


class Need(StrEnum):
    """What a method needs beyond logits."""

    MAPS = "maps"
    """The intermediate map of every stage."""
    PRE = "pre"
    """Also the maps before the last activation of each stage."""
    POOLED = "pooled"
    """Penultimate vectors."""
    INDEX = "index"
    """The number of each sample in its data set; mixup and cutmix are refused."""
    TWO_VIEWS = "two_views"
    """A second, strongly augmented view of every image; mixup and cutmix are refused."""
    HARD_TARGET = "hard_target"
    """Labels that are not mixed; mixup and cutmix are refused."""
    FULL_BATCHES = "full_batches"
    """Whole batches, because the loss couples their samples; gradient accumulation is refused."""
    PAIRS = "pairs"
    """At least two images in every batch, because the loss compares them."""


@dataclass
class Lesson:
    """Everything a method may read in one step."""

    target: Tensor  # [B, ...] in the task's form: class numbers [B], or [B, K]
    index: Tensor  # [B] each sample's number in its data set
    epoch: float  # epochs since the start, including the fraction of the current one
    step: int  # updates since the start
    task: Task
    generator: torch.Generator  # source of this learner's noise, seeded by (train.seed, step)
    student: Output
    outputs: dict[str, Output]  # of every learner that reads images, the student included
    mentors: list[Output]  # the teacher first; empty in a classroom without mentors
    notes: dict[str, Tensor] = field(default_factory=dict)
    """Values to log: [M] per mentor, [M+1] with the student first, or a scalar; averaged over the epoch."""

    @cached_property
    def mentors_out(self) -> Float[Tensor, "M B ..."]:
        """All mentors' outputs, stacked; a method with `teachers` >= 1 always has mentors."""
        return torch.stack([mentor.out for mentor in self.mentors])

    @property
    def teacher(self) -> Output:
        """The teacher's output."""
        return self.mentors[0]

    def hard(self) -> Float[Tensor, ""]:
        """The task's loss between the student's output and the labels, averaged over the batch."""
        return self.task.hard(self.student.out, self.target).mean()

    def soft(self, tau: float | Tensor) -> Float[Tensor, "M B"]:
        """The task's distillation loss between the student and every mentor, for each image."""
        return self.task.soft(self.student.out, self.mentors_out, tau)


@dataclass
class SetupContext:
    """What a method may use at `setup`.

    new_student: creates another untrained student: new_student(seed, architecture), where the architecture None is the
        student's.
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
    """Consecutive epochs in which some of the learners are trained.

    Phases with the same name are one training in pieces: its optimizer keeps its state, and its schedule spans the sum
    of their epochs.
    """

    name: str
    epochs: int
    learners: tuple[str, ...]
    train: TrainConfig  # its optimizer and schedule; phases with the same name share both


class Method(nn.Module):
    """One way to learn from mentors. Most methods define only `loss`.

    Options are annotated fields of the class with a default and a docstring; `__init__` validates them and sets each as
    an attribute. A method that derives something from its options overrides `__init__(self, **options)` and calls
    `super().__init__(**options)` first.
    The method's own parameters (adapters) are trained together with the learners of every phase; its buffers are saved
    with the run.
    """

    needs: frozenset[Need] = frozenset()
    """What it needs beyond logits."""
    tasks: frozenset[str] = ANY
    """The tasks for which its equation is defined; others are refused."""
    teachers: int = 1
    """The smallest number of mentors."""
    capturable: bool = True
    """Whether `loss` and `after` are the same arithmetic at every step, so that a CUDA graph may replay them: they read
    neither lesson.epoch nor lesson.step and change only tensors, in place."""
    reads_logits: ClassVar[bool] = True
    """Whether it learns from the mentors' logits, so that noise added to them changes the loss."""
    runs_networks: ClassVar[bool] = False
    """Whether `loss` runs the method's own networks in the student's precision."""
    cures: ClassVar[dict[Need, str]] = {}
    """For a need that a recipe may not meet, the option that removes the need."""
    context: SetupContext

    def __init__(self, **options: Any) -> None:
        """Set every option, given or default. Raises RecipeError for an unknown one and for a value out of bounds."""
        super().__init__()
        for key, value in fields.validated(type(self).__name__, self.options(), options, "method").items():
            setattr(self, key, value)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The options by name."""
        return fields.collect(cls, Method)

    @classmethod
    def expand(cls, recipe: Recipe) -> Recipe:
        """The recipe with the stages that the method's options require."""
        return recipe

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        """Create what depends on the networks' sizes, from one real lesson (None if the method has no `needs`)."""

    def learners(self) -> dict[str, nn.Module]:
        """Name -> module that learns; the outputs of those that read images (a Member) are in `lesson.outputs`.

        A module of the method that is named here is trained only in the phases that name it.
        """
        return {"student": self.context.student}

    def phases(self, train: TrainConfig) -> list[Phase]:
        """The phases of the training; by default a single one with all learners for the recipe's epochs."""
        return [Phase("main", train.epochs, tuple(self.learners()), train)]

    def begin_epoch(self, epoch: int, train_pass: Callable[[], Iterator[Lesson]]) -> None:
        """Called once before every epoch; `train_pass()` iterates the training set once without gradient.

        What it changes belongs in buffers: a run that resumes within the epoch loads them and does not call it again.
        """

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        """The named terms of one batch. It must not copy any value back to the host."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def after(self, lesson: Lesson) -> None:
        """Called after the update, for memories and moving averages."""

    def graduate(self) -> Member:
        """The model that is evaluated, saved as the student and exported."""
        return self.context.student
