"""The loop and the step: learners that share one stream of batches and one answer of the mentors."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kdcli import board, dist, shares
from kdcli.data import DataSet, Stream
from kdcli.errors import DataError, DivergedError, InterruptedRun, RecipeError, WeightsError
from kdcli.evaluate import Score, score
from kdcli.learner import Learner, keep
from kdcli.mentors import Mentors
from kdcli.methods import Lesson
from kdcli.recipe import TrainConfig
from kdcli.run import Run

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

    @property
    def epochs(self) -> int:
        return max(learner.epochs for learner in self.learners)

    def checkpoint(self, epoch: int, batch: int) -> None:
        def save() -> None:
            state = {"epoch": epoch, "batch": batch, "learners": {one.name: one.state() for one in self.learners}}
            self.run.checkpoint(state)

        dist.first(save)

    def resume(self) -> tuple[int, int]:
        """Load last.ckpt; the epoch (from 0) and batch to continue with."""
        state = dist.first(self.run.load_checkpoint)
        for learner in self.learners:
            if learner.name not in state["learners"]:
                raise RecipeError(
                    f"{self.run.path}/last.ckpt knows nothing of {learner.name}",
                    hint="Resume with the same --methods and --seeds.",
                )
            try:
                learner.load(state["learners"][learner.name])
            except (KeyError, RuntimeError, ValueError, TypeError) as error:
                reason = (str(error).splitlines() or [""])[0][:200]
                raise WeightsError(
                    f"{self.run.path}/last.ckpt is not a checkpoint of this recipe: {type(error).__name__}: {reason}",
                    hint="Put back the recipe.toml that was written with it, or start a new run.",
                ) from None
        dist.first(lambda: [run.forget_after(state["epoch"]) for run in self.runs.values()])
        return state["epoch"], state["batch"]


def train(session: Session, *, resume: bool = False) -> Iterator[Step | EpochEnd]:
    """Train every learner of the session to its end, yielding after each update and each epoch.

    A checkpoint is written after every epoch, and on SIGINT or SIGTERM before leaving.

    Raises:
        DivergedError: a loss is no longer finite (exit 4); the last good checkpoint stays.
        InterruptedRun: after a signal (exit 130); `--resume` continues to the same end.
    """
    epoch, first = session.resume() if resume else (0, 0)
    learners, stream = session.learners, session.stream
    began, images, batches = time.perf_counter(), 0, len(stream)

    def sweep(learner: Learner) -> Iterator[Lesson]:
        for batch in session.data.train.plain(session.config.batch_size, stream.device):
            views = {"student": learner.look(batch)}
            yield learner._lesson(batch, views, session.mentors.answer(batch), epoch, 0)

    with _signals() as caught, _worker_deaths(caught, session.run):
        while epoch < session.epochs:
            active = [learner for learner in learners if epoch < learner.epochs]
            for learner in active:
                learner.begin_epoch(epoch, sweep)
            for number, batch in enumerate(stream.epoch(epoch, first), start=first):
                taught = session.mentors.answer(batch)
                if taught is not None:
                    taught = shares.whole(taught, batch, dim=1)
                for learner in active:
                    learner.step(batch, taught, epoch, number, epoch * batches + number)
                images += len(batch.names.index)
                if (number + 1) % CHECK_EVERY == 0:
                    for learner in active:
                        learner.check()
                stopped = dist.anyone(bool(caught))
                if stopped or number + 1 == batches:  # a checkpoint follows, and must be a good one
                    for learner in active:
                        learner.check()
                        learner.check_weights()
                if stopped:
                    session.checkpoint(epoch, number + 1)
                    why = caught[0] if caught else "a signal to another rank"
                    raise InterruptedRun(
                        f"stopped by {why} after batch {number + 1} of epoch {epoch + 1}; saved in {session.run.path}",
                        hint=f"Continue with --resume {session.run.path}",
                    )
                seconds = time.perf_counter() - began
                yield Step(epoch + 1, session.epochs, number + 1, batches, images, seconds, active)
            epoch, first = epoch + 1, 0
            rows = {learner.name: _end_epoch(session, learner, epoch) for learner in active}
            session.checkpoint(epoch, 0)
            yield EpochEnd(epoch, session.epochs, rows)


def _end_epoch(session: Session, learner: Learner, epoch: int) -> dict[str, Any]:
    """Score, log and remember an epoch (counted from 1) of one learner."""
    run, data = session.runs[learner.name], session.data
    result: dict[str, Score] = {}
    if epoch % session.config.eval_every == 0 or epoch == learner.epochs or epoch in session.keep:
        graduate = learner.graduate()
        splits = {"test": data.test, **({"holdout": data.holdout} if data.holdout else {})}
        result = {name: score(graduate, split, learner.device) for name, split in splits.items()}
        if not math.isfinite(result["test"].loss):
            raise DivergedError(
                f"{learner.name}: the student's answers are no longer numbers after epoch {epoch}",
                hint="Lower --set train.lr or add --set train.clip_grad=1; the checkpoint of the epoch before is kept.",
            )
        chosen = result["holdout" if data.holdout else "test"].top1
        if chosen > learner.best.get("chosen", -1.0):
            learner.best = {"epoch": epoch, "chosen": chosen, "top1": result["test"].top1}
            if data.holdout:  # the test set only reports, so only a held-out slice may choose what is kept
                dist.first(lambda: keep(run, "best", learner, epoch, result["test"]))
        if epoch in session.keep:
            dist.first(lambda: keep(run, f"epoch-{epoch:03d}", learner, epoch, result["test"]))
    row = learner.row(epoch, result)
    dist.first(lambda: run.log(row))
    if session.config.tensorboard:
        dist.first(lambda: board.write(run.path, row))
    return row


@contextlib.contextmanager
def _worker_deaths(caught: list[str], run: Run) -> Iterator[None]:
    """A signal to the whole process group also ends the processes that decode files, and torch says so with an error
    raised anywhere, in the middle of a step too: then nothing more is saved, and the last checkpoint counts."""
    try:
        yield
    except (DataError, RuntimeError) as error:
        if not caught or "worker" not in str(error):
            raise
        raise InterruptedRun(
            f"stopped by {caught[0]}, which ended the decoding processes too; the last checkpoint in {run.path} stands",
            hint=f"Continue with --resume {run.path}",
        ) from None


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """SIGINT and SIGTERM noted instead of obeyed, so that the step under way ends; a second SIGINT breaks in."""
    caught: list[str] = []

    def note(number: int, _frame: object) -> None:
        if caught and number == signal.SIGINT and dist.alone():  # a launcher passes on what the terminal sent to all
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, where signals cannot be caught
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
