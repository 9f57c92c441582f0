"""What a method is: an equation over a lesson, and whatever it alone must own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

if TYPE_CHECKING:
    from kdcli.data import DataSet
    from kdcli.mentors.classroom import Member
    from kdcli.recipe import TrainConfig
    from kdcli.tasks import Classify

Terms = dict[str, Tensor]
"""Named weighted scalar terms; their sum is the loss. `hard` is the task's own, all others teach."""
Temperature = Annotated[float, Field(gt=0)]
"""An option that logits are divided by."""
Weight = Annotated[float, Field(ge=0)]
"""An option that a term is multiplied by."""
Share = Annotated[float, Field(ge=0, le=1)]
"""An option that divides 1 among two."""
Count = Annotated[int, Field(ge=1)]
Epochs = Annotated[int, Field(ge=0)]
"""An option that counts epochs; 0: none."""


Maps = dict[str, Tensor]
"""One model's intermediate maps [B, C, H, W] by tap: `stage1`, ... in order, with `pre` also `stage1.pre`, ...; a
transformer's tokens come as a grid, without class token."""


@dataclass
class View:
    """One model's answer to one batch, or all mentors' answers stacked.

    out: logits [B, K]; stacked mentors [M, B, K], the teacher first.
    pooled: penultimate vectors [B, D], of mentors one tensor each, for their D differ; and maps: intermediate maps, of
        mentors one dict each. Both only for methods that need them.
    strong: the same model's answer to the batch's strongly augmented view, only for methods that need two views.
    deep: of mentors, the answer for learners who need more than logits, where others beside them do not: a network that
        is read within is not folded, and rounds otherwise.
    """

    out: Tensor
    pooled: Tensor | tuple[Tensor, ...] | None = None
    maps: Maps | tuple[Maps, ...] | None = None
    strong: "View | None" = None
    deep: "View | None" = None

    @property
    def vectors(self) -> Tensor:
        """One model's penultimate vectors [B, D], in float32; a method that needs `pooled` never meets None."""
        assert isinstance(self.pooled, Tensor)
        return self.pooled.float()

    @property
    def stages(self) -> dict[str, Tensor]:
        """One model's maps in float32 by tap, in order; a method that needs `maps` never meets None."""
        assert isinstance(self.maps, dict)
        return {name: x.float() for name, x in self.maps.items()}

    def of(self, m: int) -> "View":
        """One mentor's own answer, out of all mentors' stacked: 0 is the teacher's."""
        pooled = self.pooled[m] if isinstance(self.pooled, tuple) else None
        maps = self.maps[m] if isinstance(self.maps, tuple) else None
        return View(self.out[m], pooled, maps, None if self.strong is None else self.strong.of(m))

    def of_mentors(self, rows: slice) -> "View":
        """The mentors' answers to some images of the batch."""
        assert not isinstance(self.pooled, Tensor)
        assert not isinstance(self.maps, dict)
        pooled = None if self.pooled is None else tuple(each[rows] for each in self.pooled)
        maps = None if self.maps is None else tuple({k: x[rows] for k, x in each.items()} for each in self.maps)
        strong = None if self.strong is None else self.strong.of_mentors(rows)
        return View(self.out[:, rows], pooled, maps, strong, None if self.deep is None else self.deep.of_mentors(rows))


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

    @property
    def teacher(self) -> View:
        """The teacher's own answer."""
        assert self.mentors is not None
        return self.mentors.of(0)


@dataclass
class Room:
    """What a method may build from at `setup`.

    seat: another student like the one that learns, or of another architecture, from scratch: seat(seed, name | None).
    """

    student: "Member"
    mentors: "list[Member]"
    data: "DataSet"
    task: "Classify"
    train: "TrainConfig"
    device: torch.device
    seat: "Callable[[int, str | None], Member]"

    @property
    def teacher(self) -> "Member | None":
        return self.mentors[0] if self.mentors else None


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs in which some learners learn.

    Phases of the same name are one training in pieces: its optimiser keeps its state, its schedule spans the sum of
    their epochs.
    """

    name: str
    epochs: int
    learners: tuple[str, ...]
    train: "TrainConfig"  # its optimiser and schedule; phases of one name go on with both


class Method(nn.Module):
    """One way to learn from mentors. Most are `loss` alone.

    Options are the constructor's keyword arguments. Parameters of the method itself (adapters) are trained with the
    learners of every phase; buffers are saved with the run.
    """

    needs: frozenset[str] = frozenset()
    """Beyond logits: maps (every stage's), pre (also before the stages' last activation), pooled, index (each sample's
    number), two_views, hard_target (no mixup), full_batches (no micro-batches), pairs (never a batch of one)."""
    teachers: int = 1
    """How many mentors it needs at least."""
    capturable: bool = True
    """Whether `loss` and `after` are the same arithmetic at every step, so that a CUDA graph may replay them: they read
    neither lesson.epoch nor lesson.step and change nothing but tensors, in place."""
    room: Room

    def setup(self, room: Room, lesson: Lesson | None) -> None:
        """Size whatever depends on the networks, from one real lesson (None when nothing was asked for)."""

    def learners(self) -> dict[str, nn.Module]:
        """Name -> module that learns; those that read pixels (a Member) appear in `lesson.views`.

        A module of the method's own that is named here learns only in the phases that name it.
        """
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
