"""The loop and the step: learners that share one stream of batches and one answer of the mentors."""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from kdcli.data import Batch, DataSet, Stream
from kdcli.errors import DataError, DivergedError, InterruptedRun, KdcliError, RecipeError, WeightsError
from kdcli.mentors.mentors import FARTHEST, Mentors
from kdcli.methods import Lesson, View
from kdcli.recipe import TrainConfig
from kdcli.system import distributed, shards
from kdcli.system.interrupts import Signals, Stop
from kdcli.training import out_of_memory, tensorboard
from kdcli.training.evaluate import Score, score
from kdcli.training.learner import Learner, keep
from kdcli.training.run import Run

LONG = 1000  # updates from which measuring how far to look ahead is worth its few passes
CHECK_EVERY = 50  # steps between looks at whether a loss is still a number: a look waits for the device


@dataclass
class Step:
    """After an update: where the loop is. `learners` may be read (slowly: it waits for the device)."""

    epoch: int  # from 1
    epochs: int
    batch: int  # from 1, within the epoch
    batches: int
    images: int  # seen by this call so far
    seconds: float  # of this call so far
    learners: list[Learner]


@dataclass
class EpochEnd:
    """After an epoch: the metrics row of every learner."""

    epoch: int
    epochs: int
    rows: dict[str, dict[str, Any]]


@dataclass
class Notice:
    """Something that went another way than asked, and what was done about it."""

    text: str


Event = Step | EpochEnd | Notice


@dataclass
class Session:
    """Learners over one stream, with where they keep what they become."""

    learners: list[Learner]
    stream: Stream
    mentors: Mentors
    data: DataSet
    run: Run  # holds the checkpoint
    runs: dict[str, Run]  # each learner's own folder, by learner
    config: TrainConfig
    keep: set[int] = field(default_factory=set)  # epochs whose weights are kept
    compiled: list[str] = field(default_factory=list)  # mentors to compile

    @property
    def epochs(self) -> int:
        return max(learner.epochs for learner in self.learners)

    def settle(self, epoch: int) -> list[str]:
        """Decide, once a training, how the mentors answer: how many batches at once, and compiled for that many.

        Returns what should be said.
        """
        if not self.mentors.ahead:
            asked = self.mentors.members and not self.mentors.banks
            long = (self.epochs - epoch) * len(self.stream) >= LONG
            self.mentors.ahead = distributed.first(lambda: self._far_ahead(epoch)) if long and asked else 1
        failed = self.mentors.compile(self.config.batch_size, self.compiled)
        self.compiled = [name for name in self.compiled if name not in failed]
        return [f"{name} is not compiled: {why}" for name, why in failed.items()]

    def _far_ahead(self, epoch: int) -> int:
        return self.mentors.measure_ahead(list(itertools.islice(self.stream.epoch(epoch), FARTHEST)))

    def checkpoint(self, epoch: int, batch: int) -> None:
        def save() -> None:
            learners = {one.name: one.state() for one in self.learners}
            state = {"epoch": epoch, "batch": batch, "ahead": self.mentors.ahead, "learners": learners}
            self.run.checkpoint(state)

        distributed.first(save)

    def resume(self) -> tuple[int, int, list[str]]:
        """Go back to the last good checkpoint, or to the beginning where there is none yet.

        Returns the epoch (from 0) and batch to continue with, and what should be said.
        """
        folders = [self.run, *(run for run in self.runs.values() if run is not self.run)]
        state = distributed.first(lambda: self._stands(folders))
        if "learners" in state:
            self.mentors.ahead = state["ahead"]
            for learner in self.learners:
                self._load(learner, state["learners"])
        distributed.first(lambda: [run.forget_after(state["epoch"]) for run in self.runs.values()])
        notices = [state["notice"]] if "notice" in state else []
        failures = {run.provenance["diverged"] for run in folders if run.begun and "diverged" in run.provenance}
        notices += [
            f"{self.run.path} went on until its training diverged ({failure}); resumed, it repeats itself: the cure is "
            "a new run with a lower --set train.lr or with --set train.clip_grad=1"
            for failure in failures
        ]
        return state["epoch"], state["batch"], notices

    def _stands(self, folders: list[Run]) -> dict[str, Any]:
        """The last good checkpoint, or where there is none the beginning; the folders are mended on the way."""
        for run in folders:
            run.mend()
        if self.run.has_checkpoint:
            return self.run.load_checkpoint()
        said = f"{self.run.path} had no checkpoint yet: it starts from the beginning"
        return {"epoch": 0, "batch": 0, "notice": said}

    def _load(self, learner: Learner, states: dict[str, Any]) -> None:
        if learner.name not in states:
            raise RecipeError(
                f"{self.run.path}/last.ckpt knows nothing of {learner.name}",
                hint="Resume with the same --methods and --seeds.",
            )
        try:
            learner.load(states[learner.name])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            raise WeightsError(
                f"{self.run.path}/last.ckpt is not a checkpoint of this recipe: {type(error).__name__}: {reason}",
                hint="Put back the recipe.toml that was written with it, or start a new run.",
            ) from None


def train(session: Session, *, resume: bool = False) -> Iterator[Event]:
    """Train every learner of the session to its end, yielding after each update and each epoch.

    A checkpoint is written after every epoch, every `train.checkpoint_minutes`, and on SIGINT or SIGTERM before
    leaving, which waits for nothing but the update under way.

    Raises:
        DivergedError: a loss is no longer finite (exit 4); the last good checkpoint stays.
        InterruptedRun: after a signal (exit 130); `--resume` continues to the same end.
        DataError: an image can no longer be read (exit 3); saved as it stood, so `--resume` continues too.
        OutOfMemory: networks and batch do not fit (exit 3); the last checkpoint stays.
    """
    learners, stream, signals = session.learners, session.stream, Signals()
    began, images, batches = time.perf_counter(), 0, len(stream)
    epoch = done = 0  # where the learners stand: `done` batches of `epoch` are learned
    saved, since = (0, 0), time.monotonic()  # where and when the last checkpoint was written

    def sweep(learner: Learner) -> Iterator[Lesson]:
        for batch in session.data.train.plain(session.config.batch_size, stream.device):
            yield learner.lesson(batch, session.mentors.answer(batch), epoch, 0)

    def save() -> None:
        nonlocal saved, since
        session.mentors.flush()
        session.checkpoint(epoch, done)
        saved, since = (epoch, done), time.monotonic()

    with signals, _divergence(session):
        try:
            if resume:
                with signals.breakable():
                    at, batch, notices = session.resume()
                epoch, done = saved = at, batch
                yield from map(Notice, notices)
            with signals.breakable():
                told = session.settle(epoch)
            yield from map(Notice, told)
            while epoch < session.epochs:
                active = [learner for learner in learners if epoch < learner.epochs]
                with signals.breakable():
                    for learner in active:
                        learner.begin_epoch(epoch, sweep, again=done > 0)
                first = done - done % session.mentors.ahead  # batches are answered with those they ever were
                drawn = _readable(stream.epoch(epoch, first))
                answered = out_of_memory.accounted(session, session.mentors.taught(drawn))
                for number, (batch, taught) in enumerate(signals.each(answered), first):
                    if number < done:
                        continue
                    taught = None if taught is None else shards.whole(taught, batch, dim=1)
                    place = (epoch, number, epoch * batches + number)
                    with signals.breakable(saved == (epoch, done)):  # then nothing would be lost
                        told = _step(session, active, batch, taught, place)
                    done, images = number + 1, images + len(batch.names.index)
                    due = distributed.anyone(time.monotonic() - since >= 60 * session.config.checkpoint_minutes)
                    if not distributed.alone() and distributed.anyone(
                        bool(signals.caught)
                    ):  # ranks stop together or not at all
                        raise Stop
                    if due or done == batches:  # a checkpoint follows, and must be a good one
                        _check(active)
                    elif done % CHECK_EVERY == 0:
                        for learner in active:
                            learner.check()
                    if due:
                        save()
                    yield from _halved(session, active, told)
                    seconds = time.perf_counter() - began
                    yield Step(epoch + 1, session.epochs, done, batches, images, seconds, active)
                with signals.breakable():
                    results = [_score(session, learner, epoch + 1) for learner in active]
                epoch, done = epoch + 1, 0
                rows = {one.name: _record(session, one, epoch, r) for one, r in zip(active, results, strict=True)}
                save()
                yield EpochEnd(epoch, session.epochs, rows)
            if distributed.anyone(bool(signals.caught)):  # a signal that came last of all is not forgotten either
                raise Stop
        except _Unreadable as error:
            if not distributed.alone():  # the other ranks are waiting in the middle of the next step
                raise DataError(error.message, hint=error.hint) from error
            if saved != (epoch, done):
                _check(learners)
                save()
            raise DataError(
                f"{error.message}\nStopped before batch {done + 1} of epoch {epoch + 1}; saved in {session.run.path}",
                hint=f"{error.hint} When the pictures are as they were, continue with --resume {session.run.path}",
            ) from error
        except Stop:
            if saved != (epoch, done):
                _check(learners)
                save()
            where = f"batch {done} of epoch {epoch + 1}" if done else f"epoch {epoch}" if epoch else "the start"
            why = signals.caught[0] if signals.caught else "a signal to another rank"
            raise InterruptedRun(
                f"stopped by {why} after {where}; saved in {session.run.path}",
                hint=f"Continue with --resume {session.run.path}",
            ) from None


class _Unreadable(DataError):
    """A batch that could not be drawn: what was learned before it can be saved."""


def _readable(batches: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except DataError as error:
        raise _Unreadable(error.message, hint=error.hint) from error


def _step(
    session: Session, active: list[Learner], batch: Batch, taught: View | None, place: tuple[int, int, int]
) -> list[str]:
    """One update of every learner; on CUDA side by side, each on a stream of its own. Returns what should be said."""
    here = torch.cuda.current_stream(active[0].device) if active[0].stream is not None and len(active) > 1 else None
    told = []
    for learner in active:
        if here is not None and learner.stream is not None:
            learner.stream.wait_stream(here)
        with torch.cuda.stream(learner.stream if here is not None else None):
            told.append(out_of_memory.step(session, learner, batch, taught, *place))
    for learner in active:  # the batch may not be overwritten before all have read it
        if here is not None and learner.stream is not None:
            here.wait_stream(learner.stream)
    return told


def _check(learners: list[Learner]) -> None:
    """Raise DivergedError unless all learners are fit for a checkpoint."""
    for learner in learners:
        learner.check()
        learner.check_weights()


def _halved(session: Session, learners: list[Learner], told: list[str]) -> Iterator[Notice]:
    """Tell, here and in the provenance, whose batches go through in more parts than the recipe says."""
    for learner, text in zip(learners, told, strict=True):
        if text:
            session.runs[learner.name].amend(accumulate=learner.accumulate)
            yield Notice(text)


def _score(session: Session, learner: Learner, epoch: int) -> dict[str, Score]:
    """The scores that are due after an epoch (counted from 1), by split; nothing is changed by it."""
    data = session.data
    if epoch % session.config.eval_every and epoch != learner.epochs and epoch not in session.keep:
        return {}
    graduate = learner.graduate()
    splits = {"test": data.test, **({"holdout": data.holdout} if data.holdout else {})}
    result = {name: score(graduate, split, learner.device) for name, split in splits.items()}
    if not math.isfinite(result["test"].loss):
        raise DivergedError(
            f"{learner.name}: the student's answers are no longer numbers after epoch {epoch}",
            hint="Lower --set train.lr or add --set train.clip_grad=1; the last good checkpoint is kept.",
        )
    return result


def _record(session: Session, learner: Learner, epoch: int, result: dict[str, Score]) -> dict[str, Any]:
    """Log and remember an epoch (counted from 1) of one learner."""
    run, data = session.runs[learner.name], session.data
    if result:
        chosen = result["holdout" if data.holdout else "test"].top1
        if chosen > learner.best.get("chosen", -1.0):
            learner.best = {"epoch": epoch, "chosen": chosen, "top1": result["test"].top1}
            if data.holdout:  # the test set only reports, so only a held-out slice may choose what is kept
                learner.best["weights"] = learner.weights()
        if epoch in session.keep:
            top1 = result["test"].top1
            distributed.first(lambda: keep(run, f"epoch-{epoch:03d}", learner, epoch, top1, learner.weights()))
    row = learner.row(epoch, result)
    distributed.first(lambda: run.log(row))
    if session.config.tensorboard:
        distributed.first(lambda: tensorboard.write(run.path, row))
    return row


@contextlib.contextmanager
def _divergence(session: Session) -> Iterator[None]:
    """Note a training that diverged, so that resuming it can say so."""
    try:
        yield
    except DivergedError as error:
        for run in session.runs.values() if distributed.rank() == 0 else ():
            with contextlib.suppress(KdcliError):  # a full disk must not hide the news
                run.amend(diverged=error.message)
        raise
