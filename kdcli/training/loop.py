"""The training loop: any number of learners over one stream, one update each per batch."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kdcli.data import Batch
from kdcli.errors import DivergedError
from kdcli.mentors.mentors import Answers
from kdcli.methods import Lesson
from kdcli.system import distributed
from kdcli.tasks import Score
from kdcli.training import tensorboard
from kdcli.training.evaluate import score
from kdcli.training.gather import all_rows
from kdcli.training.guard import Guard
from kdcli.training.learner import Learner
from kdcli.training.session import EpochEnd, Event, Notice, Session, Step
from kdcli.training.student import save_student


def train(session: Session, *, resume: bool = False) -> Iterator[Event]:
    """Train every learner of the session to its end, yielding after each update and each epoch.

    A checkpoint is written after every epoch, every `train.checkpoint_minutes`, and on SIGINT or SIGTERM before
    leaving, which waits for nothing but the update under way.

    Raises:
        DivergedError: a loss is no longer finite (exit 4); the last good checkpoint stays.
        InterruptedRun: after a signal (exit 130); `--resume` continues to the same end.
        DataError: an image can no longer be read (exit 3); the state before it is saved, so `--resume` continues.
        OutOfMemory: networks and batch do not fit (exit 3); the last checkpoint stays.
    """
    stream, mentors = session.stream, session.mentors
    with Guard(session) as guard:
        if resume:
            with guard.breakable():
                epoch, done, warnings = session.resume()
            guard.epoch, guard.done = guard.saved = (epoch, done)
            yield from map(Notice, warnings)
        with guard.breakable():
            warnings = session.tune_mentors(guard.epoch)
        yield from map(Notice, warnings)
        while (epoch := guard.epoch) < session.epochs:
            active = [learner for learner in session.learners if epoch < learner.epochs]
            with guard.breakable():
                for learner in active:
                    learner.begin_epoch(epoch, _train_pass(session, learner, epoch), again=guard.done > 0)
            first = guard.done - guard.done % mentors.ahead  # a look-ahead always holds the same batches
            answered = mentors.answer_ahead(stream.epoch(epoch, first))
            for number, (batch, answers) in enumerate(guard.each(answered), first):
                if number < guard.done:
                    continue
                with guard.breakable(not guard.unsaved):
                    notices = _update(active, batch, answers, epoch, number, len(stream))
                guard.advance(len(batch.global_batch.index))
                guard.check_or_save(active)
                yield from _report_accumulation(session, active, notices)
                yield Step(epoch + 1, session.epochs, guard.done, len(stream), guard.images, guard.seconds, active)
            with guard.breakable():
                scores = [_scores(session, learner, epoch + 1) for learner in active]
            guard.end_epoch()
            rows = {one.name: _record(session, one, epoch + 1, s) for one, s in zip(active, scores, strict=True)}
            guard.save()
            yield EpochEnd(epoch + 1, session.epochs, rows)
        guard.stop_if_asked()


def _train_pass(session: Session, learner: Learner, epoch: int) -> Callable[[], Iterator[Lesson]]:
    """What a method calls to iterate the training set once without gradient."""

    def lessons() -> Iterator[Lesson]:
        for batch in session.data.train.plain(session.config.batch_size, session.stream.device):
            yield learner.lesson(batch, session.mentors.answer(batch).of(learner.needs), epoch, 0)

    return lessons


def _update(active: list[Learner], batch: Batch, answers: Answers, epoch: int, number: int, batches: int) -> list[str]:
    """One update of every learner; on CUDA side by side, each on a stream of its own. Returns each one's notice."""
    if batch.whole is not None:
        layout = batch.whole.layout
        answers = Answers(all_rows(answers.outputs, layout), answers.unfused and all_rows(answers.unfused, layout))
    parallel = active[0].stream is not None and len(active) > 1
    here = torch.cuda.current_stream(active[0].device) if parallel else None
    notices = []
    for learner in active:
        if here is not None and learner.stream is not None:
            learner.stream.wait_stream(here)
        with torch.cuda.stream(learner.stream if here is not None else None):
            notices.append(learner.step(batch, answers.of(learner.needs), epoch, number, epoch * batches + number))
    for learner in active:  # the batch may not be overwritten before all have read it
        if here is not None and learner.stream is not None:
            here.wait_stream(learner.stream)
    return notices


def _report_accumulation(session: Session, learners: list[Learner], notices: list[str]) -> Iterator[Notice]:
    """Yield a Notice for each learner whose gradient accumulation was raised after an out-of-memory error."""
    for learner, text in zip(learners, notices, strict=True):
        if text:
            session.runs[learner.name].amend(accumulate=learner.accumulate)
            yield Notice(text)


def _scores(session: Session, learner: Learner, epoch: int) -> dict[str, Score]:
    """The scores that are due after an epoch (counted from 1), by split."""
    data = session.data
    if epoch % session.config.eval_every and epoch != learner.epochs and epoch not in session.keep:
        return {}
    graduate = learner.graduate()
    splits = {"test": data.test, **({"holdout": data.holdout} if data.holdout else {})}
    scores = {name: score(graduate, split, learner.task, learner.device) for name, split in splits.items()}
    if not math.isfinite(scores["test"]["loss"]):
        raise DivergedError(
            f"{learner.name}: the student's outputs are not finite after epoch {epoch}",
            hint="Lower --set train.lr or add --set train.clip_grad=1; the last good checkpoint is kept.",
        )
    return scores


def _record(session: Session, learner: Learner, epoch: int, scores: dict[str, Score]) -> dict[str, Any]:
    """Log an epoch (counted from 1) of one learner, keep what it is to keep, and remember its best."""
    run, data = session.runs[learner.name], session.data
    if scores:
        learner.note_best(
            epoch, scores["holdout" if data.holdout else "test"].value, scores["test"], bool(data.holdout)
        )
        if epoch in session.keep:
            distributed.on_rank0(
                lambda: save_student(
                    run, f"epoch-{epoch:03d}", learner.graduate(), data, task=learner.task.name, epoch=epoch,
                    score=scores["test"], weights=learner.weights(),
                )
            )  # fmt: skip
    row = learner.row(epoch, scores)
    distributed.on_rank0(lambda: run.log(row))
    if session.config.tensorboard:
        distributed.on_rank0(lambda: tensorboard.write(run.path, row))
    return row
