"""What a method is: an equation over a lesson, and whatever it alone must own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

if TYPE_CHECKING:
    from kdcli.classroom import Member
    from kdcli.data import DataSet
    from kdcli.recipe import TrainConfig
    from kdcli.tasks import Classify

Terms = dict[str, Tensor]
"""Named weighted scalar terms; their sum is the loss. `hard` is the task's own, all others teach."""
Temperature = Annotated[float, Field(gt=0)]
"""An option that logits are divided by."""


@dataclass
class View:
    """One model's answer to one batch, or all mentors' answers stacked.

    out: logits [B, K]; stacked mentors [M, B, K], the teacher first.
    pooled: penultimate vectors [B, D], of mentors one tensor each, for their D differ; and maps: intermediate maps by
        stage name. Both only for methods that need them.
    """

    out: Tensor
    pooled: Tensor | tuple[Tensor, ...] | None = None
    maps: dict[str, Tensor] | None = None

    def of_mentors(self, rows: slice) -> "View":
        """The mentors' answers to some images of the batch."""
        assert self.pooled is None or isinstance(self.pooled, tuple)
        pooled = None if self.pooled is None else tuple(each[rows] for each in self.pooled)
        return View(self.out[:, rows], pooled)


@dataclass
class Lesson:
    """Everything a method may look at in one step."""

    target: Tensor  # [B] class numbers, or [B, K] shares after mixup
    index: Tensor  # [B] each sample's number in its data set
    epoch: float  # epochs since the start, with the share of this one
    step: int  # updates since the start
    task: "Classify"
    generator: torch.Generator  # this learner's own noise, a function of (train.seed, step)
    student: View
    views: dict[str, View]  # of every learner that reads pixels, the student included
    mentors: View | None  # None in a classroom without mentors
    notes: dict[str, Tensor] = field(default_factory=dict)
    """What the method wants logged: [M] per mentor, [M+1] student first, or a scalar; averaged over the epoch."""

    @property
    def mentors_out(self) -> Tensor:
        """All mentors' logits [M, B, K]; a method with `teachers` >= 1 never meets a classroom without them."""
        assert self.mentors is not None
        return self.mentors.out


@dataclass
class Room:
    """What a method may build from at `setup`."""

    student: "Member"
    mentors: "list[Member]"
    data: "DataSet"
    task: "Classify"

    @property
    def teacher(self) -> "Member | None":
        return self.mentors[0] if self.mentors else None


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs in which some learners learn."""

    name: str
    epochs: int
    learners: tuple[str, ...]
    train: "TrainConfig"  # its optimiser and schedule


class Method(nn.Module):
    """One way to learn from mentors. Most are `loss` alone.

    Options are the constructor's keyword arguments. Parameters of the method itself (adapters) are trained with the
    learners of every phase; buffers are saved with the run.
    """

    needs: frozenset[str] = frozenset()
    """Beyond logits: maps, pooled, head, index, two_views, hard_target, full_batches."""
    teachers: int = 1
    """How many mentors it needs at least."""
    capturable: bool = True
    """Whether `loss` and `after` are the same arithmetic at every step, so that a CUDA graph may replay them: they read
    neither lesson.epoch nor lesson.step and change nothing but tensors, in place."""
    room: Room

    def setup(self, room: Room, lesson: Lesson | None) -> None:
        """Size whatever depends on the networks, from one real lesson (None when nothing was asked for)."""

    def learners(self) -> dict[str, nn.Module]:
        """Name -> module that learns; those that read pixels appear in `lesson.views`."""
        return {"student": self.room.student}

    def phases(self, train: "TrainConfig") -> list[Phase]:
        """The stretches of training; by default one with all learners for the recipe's epochs."""
        return [Phase("main", train.epochs, tuple(self.learners()), train)]

    def begin_epoch(self, epoch: int, sweep: Callable[[], Iterator[Lesson]]) -> None:
        """Called once before every epoch; `sweep()` reads the training set once without gradient.

        What it changes belongs in buffers: a run resumed within the epoch loads them and does not call this again.
        """

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        """The named terms of one batch. No value may be read back to the host here."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def after(self, lesson: Lesson) -> None:
        """Called after the update: memories, moving averages."""

    def graduate(self) -> "Member":
        """What is evaluated, kept as the student and exported."""
        return self.room.student
