"""What a training loses nothing by: which batch is learned and which is saved, what is due, and who asked to stop."""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import TypeVar

from kdcli.errors import DataError, DivergedError, InterruptedRun, KdcliError, OutOfMemory
from kdcli.system import device as devices, distributed
from kdcli.system.interrupts import Signals, Stop
from kdcli.training.learner import Learner
from kdcli.training.session import Session

CHECK_EVERY = 50  # steps between checks that the losses are finite: a check waits for the device

T = TypeVar("T")


class Guard:
    """Around a training loop: its position, its checkpoints, and the way it ends.

    `epoch` and `done`: the learners have learned `done` batches of `epoch` (from 0). A signal, an image that cannot be
    read and a diverged loss leave through here: what is not saved yet is saved first where that is possible.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.signals = session, Signals()
        self.epoch = self.done = self.images = 0
        self.saved, self.since = (0, 0), time.monotonic()  # where and when the last checkpoint was written
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @property
    def unsaved(self) -> bool:
        return self.saved != (self.epoch, self.done)

    def breakable(self, when: bool = True) -> AbstractContextManager[None]:
        """A block that a signal may break off (`when`: if at all), because nothing in it would be lost."""
        return self.signals.breakable(when)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The batches with their outputs; drawing and answering them may be broken off by a signal.

        Raises DataError (after saving) for an image that can no longer be read, OutOfMemory where the mentors do not
        fit.
        """
        source, nothing = iter(items), object()
        while True:
            try:
                with self.breakable():
                    item = next(source, nothing)
            except DataError as error:
                raise _Unreadable(error.message, hint=error.hint) from error
            except RuntimeError as error:
                if not devices.out_of_memory(error):
                    raise
                break  # after the except block, since the error keeps the failed pass's tensors
            if item is nothing:
                return
            yield item  # pyright: ignore[reportReturnType]
        images = self.session.config.batch_size * max(self.session.mentors.ahead, 1)
        raise OutOfMemory(
            f"out of memory while the mentors answered {images} images",
            hint="Fewer mentors, a smaller --set train.batch_size, --set classroom.ahead=1 or "
            "--set classroom.precision=bf16.",
        )

    def advance(self, images: int) -> None:
        """Count a learned batch; with several ranks all stop together or none."""
        self.done, self.images = self.done + 1, self.images + images
        if not distributed.alone() and distributed.any_rank(bool(self.signals.caught)):
            raise Stop

    def check_or_save(self, active: list[Learner]) -> None:
        """Raise DivergedError where a loss is not finite, looking now and then; save when it is time to."""
        minutes = self.session.config.checkpoint_minutes
        due = distributed.any_rank(time.monotonic() - self.since >= 60 * minutes)
        if due or self.done == len(self.session.stream):  # a checkpoint follows, and must be a good one
            check(active)
        elif self.done % CHECK_EVERY == 0:
            for learner in active:
                learner.check()
        if due:
            self.save()

    def end_epoch(self) -> None:
        self.epoch, self.done = self.epoch + 1, 0

    def save(self) -> None:
        """Write a checkpoint of the present position."""
        self.session.mentors.flush()
        self.session.checkpoint(self.epoch, self.done)
        self.saved, self.since = (self.epoch, self.done), time.monotonic()

    def stop_if_asked(self) -> None:
        """A signal that came after the last step stops the run too."""
        if distributed.any_rank(bool(self.signals.caught)):
            raise Stop

    def __enter__(self) -> "Guard":
        self.signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, _Unreadable):
                self._leave_unreadable(error)
            if isinstance(error, Stop):
                self._leave_stopped()
        except DivergedError as diverged:
            self._note_divergence(diverged)
            raise
        finally:
            self.signals.__exit__()
        if isinstance(error, DivergedError):
            self._note_divergence(error)

    def _leave_unreadable(self, error: "_Unreadable") -> None:
        path = self.session.run.path
        if not distributed.alone():  # the other ranks are waiting in the middle of the next step
            raise DataError(error.message, hint=error.hint) from error
        self._save_rest()
        raise DataError(
            f"{error.message}\nStopped before batch {self.done + 1} of epoch {self.epoch + 1}; saved in {path}",
            hint=f"{error.hint} Then continue with --resume {path}",
        ) from error

    def _leave_stopped(self) -> None:
        self._save_rest()
        path, caught = self.session.run.path, self.signals.caught
        where = f"epoch {self.epoch}" if self.epoch else "the start"
        where = f"batch {self.done} of epoch {self.epoch + 1}" if self.done else where
        raise InterruptedRun(
            f"stopped by {caught[0] if caught else 'a signal to another rank'} after {where}; saved in {path}",
            hint=f"Continue with --resume {path}",
        ) from None

    def _save_rest(self) -> None:
        if self.unsaved:
            check(self.session.learners)
            self.save()

    def _note_divergence(self, error: DivergedError) -> None:
        """Record in the provenance that the training diverged, so that resuming it can say so."""
        for run in self.session.runs.values() if distributed.rank() == 0 else ():
            with suppress(KdcliError):  # a full disk must not hide the error itself
                run.amend(diverged=error.message)


class _Unreadable(DataError):
    """A batch that could not be drawn: what was learned before it can be saved."""


def check(learners: list[Learner]) -> None:
    """Raise DivergedError unless all learners are fit for a checkpoint."""
    for learner in learners:
        learner.check()
        learner.check_weights()
