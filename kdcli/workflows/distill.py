"""From a recipe to a trained student in a run folder: the one way in for distill, train and compare."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcli import methods
from kdcli.data import DataSet, Stream, open_data
from kdcli.data.dataset import Pixels
from kdcli.errors import RecipeError, WeightsError
from kdcli.mentors import bank_build
from kdcli.mentors.classroom import Classroom, build_classroom
from kdcli.mentors.mentors import Mentors, worth_compiling
from kdcli.recipe import STAGE, Recipe, staged
from kdcli.system import device as devices, distributed
from kdcli.system.sizes import plain
from kdcli.tasks import Metric
from kdcli.training import run as runs, tensorboard
from kdcli.training.checks import check_ranks
from kdcli.training.learner import Learner
from kdcli.training.loop import train
from kdcli.training.run import Run
from kdcli.training.session import Event, Notice, Session
from kdcli.training.student import save_student


@dataclass
class Result:
    """What became of one learner."""

    name: str
    run: Run
    score: dict[str, float]  # on the test set, of what is shipped
    metric: Metric  # the primary one, which the figures below are of
    value: float
    last: float
    best: float  # the best epoch's; chosen on the test set, so only a record
    best_epoch: int
    epoch: int  # the shipped weights' epoch

    def json(self) -> dict[str, Any]:
        return {
            "run": str(self.run.path), **self.score, "epoch": self.epoch, "last": self.last, "best": self.best,
            "best_epoch": self.best_epoch,
        }  # fmt: skip


def data_of(recipe: Recipe, device: torch.device) -> DataSet:
    """The recipe's data. Raises RecipeError when none is named."""
    if not recipe.data.name:
        raise RecipeError("no data is named", hint="Add --data NAME; `kdcli data ls` shows what there is.")
    return distributed.local_rank0_first(lambda: open_data(recipe.data, device=device))


def open_room(recipe: Recipe, device: torch.device, *, mentors: bool = True) -> tuple[DataSet, Classroom]:
    """The recipe's data and classroom. Data is looked for before weights."""
    if waits := staged(recipe.classroom, mentors=mentors):
        raise RecipeError(
            f"{STAGE}{waits[0]} is trained by distill and compare only", hint="Name networks that are there already."
        )
    data = data_of(recipe, device)
    return data, build_classroom(recipe, data, device, mentors=mentors)


def open_session(
    recipes: dict[str, Recipe], classroom: Classroom, run: Run, folders: dict[str, Run], keep: set[int] | None = None
) -> Session:
    """Learners (by name) that share the first recipe's data, stream and mentors.

    The recipes may differ in method and train.seed only.
    """
    recipe, data, device = next(iter(recipes.values())), classroom.data, classroom.device
    config = recipe.train
    if config.tensorboard:
        tensorboard.check()
    stream = Stream(
        data,
        config.batch_size,
        seed=recipe.data.seed,
        drop_last=config.drop_last,
        device=device,
        mixup=config.mixup,
        cutmix=config.cutmix,
        label_smoothing=config.label_smoothing,
        strong=any("two_views" in methods.build(one.method.name, one.method.options).needs for one in recipes.values()),
    )
    check_ranks(len(data.train), config)
    distributed.check_equal(
        {"recipe": recipe.hash(), "data": data.pixels, **{one.name: one.digest for one in classroom.mentors}}
    )
    if config.cuda_graph and isinstance(data.train.store, Pixels):
        data.train.store.record()
    learners = [Learner(name, one, classroom, len(stream)) for name, one in recipes.items()]
    precision, why = devices.precision(recipe.classroom.precision, device, frozen=True)
    forms = {(one.method.label, _options(one)): None for one in recipes.values()}
    classroom.notes += [(f"method {name}", options, "a method's own defaults but for what is given")
                        for name, options in forms]  # fmt: skip
    student = learners[0].student
    classroom.notes.append((student.name, student.origin, "the student's weights"))
    classroom.notes.append(("device", devices.describe(device), "--device chooses"))
    if not distributed.alone():
        classroom.notes.append(("ranks", distributed.describe(), "they divide every batch"))
    classroom.notes.append(("train.precision", learners[0].precision, learners[0].precision_why))
    if classroom.mentors:
        classroom.notes.append(("classroom.precision", precision, why))
    if any(learner.method.teachers for learner in learners):
        taught = [learner for learner in learners if learner.method.teachers]
        needs = frozenset().union(*(learner.method.needs for learner in taught))
        logits_only = any(not learner.needs for learner in taught)
        ahead, graph = recipe.classroom.ahead or 0, config.cuda_graph
        mentors = distributed.local_rank0_first(
            lambda: bank_build.open_mentors(
                classroom, recipe, needs=needs, logits_only=logits_only, ahead=ahead, cuda_graph=graph
            )
        )
    else:
        mentors = Mentors([], precision, device)
    compiled = _to_compile(recipe, mentors, max(one.epochs for one in learners) * len(stream) * config.batch_size)
    if compiled and recipe.classroom.compile is None:
        classroom.notes.append(
            ("classroom.compile", ", ".join(compiled), "compile time pays back (> 1e14 multiply-adds left)")
        )
    return Session(learners, stream, mentors, data, run, folders, config, keep or set(), compiled)


def _to_compile(recipe: Recipe, mentors: Mentors, images: int) -> list[str]:
    """Which mentors are compiled when the training begins."""
    if recipe.classroom.compile is not None:
        return [member.name for member in mentors.members] if recipe.classroom.compile else []
    if mentors.banks or mentors.needs:  # what a bank keeps must have the same last bits whoever filled it
        return []
    return worth_compiling(mentors.members, images)


def _options(recipe: Recipe) -> str:
    """All options of a recipe's method as they are in force."""
    values = methods.in_force(recipe.method.name, recipe.method.options)
    return ", ".join(f"{key} = {value}" for key, value in values.items() if value is not None) or "no options"


def start(session: Session, kind: str, classroom: Classroom, **facts: Any) -> None:
    """Lay out the run folders with recipe and provenance, the session's and every learner's."""
    common = facts_of(classroom)
    if session.keep:
        facts["keep"] = sorted(session.keep)  # a resumed run keeps them too
    for learner in session.learners:
        folder = session.runs[learner.name]
        own = {**common, **facts} if folder is session.run else common
        told = runs.provenance(kind if folder is session.run else "distill", learner.recipe, **own)
        distributed.on_rank0(lambda folder=folder, learner=learner, told=told: folder.start(learner.recipe, told))


def facts_of(classroom: Classroom) -> dict[str, Any]:
    """What provenance says of the data, the mentors and the machine."""
    data = classroom.data
    return {
        "device": devices.describe(classroom.device),
        "ranks": distributed.describe(),
        "data": {
            "name": data.name,
            "hash": data.hash,
            "pixels": data.pixels,
            "image_size": plain(data.image_size),
            "train": len(data.train),
            "test": len(data.test),
        },
        "mentors": {m.name: {"architecture": m.architecture.full, "sha256": m.digest} for m in classroom.mentors},
        "banks": classroom.banks,
        "chosen": [[key, str(value), why] for key, value, why in classroom.notes],
    }


def same_room(run: Run, classroom: Classroom) -> None:
    """Raise KdcliError when a run to be resumed had another recipe, other data or other mentors than are here now."""
    before, now = run.provenance, facts_of(classroom)
    if run.recipe.hash() != before["recipe"]:
        raise RecipeError(
            f"{run.path}/recipe.toml is not the one the run began with", hint="Put it back, or start a new run with it."
        )
    if any(before["data"].get(key, "") not in ("", now["data"][key]) for key in ("hash", "pixels")):
        raise WeightsError(
            f"{run.path} was trained on other images than {classroom.data.name} holds now",
            hint="Put the old data back, or start a new run.",
        )
    for name, facts in before["mentors"].items():
        if now["mentors"].get(name, {}).get("sha256") != facts["sha256"]:
            raise WeightsError(
                f"{run.path}: its mentor {name} had other weights than are found now",
                hint="Name the old ones with @PATH in its recipe.toml, or start a new run.",
            )


def go(session: Session, *, resume: bool = False) -> Iterator[Event]:
    """Train the session and write every learner's student; yields what `engine.train` yields."""
    if resume:
        distributed.on_rank0(lambda: _note_ranks([session.run, *session.runs.values()]))
    yield from train(session, resume=resume)
    distributed.on_rank0(session.run.forget_previous)
    for learner in session.learners:
        distributed.on_rank0(lambda learner=learner: finish(session, learner))
    yield from map(Notice, session.mentors.bank_warnings())


def _note_ranks(folders: list[Run]) -> None:
    """Say in their provenance when runs go on with other ranks than before."""
    for run in folders:
        if run.begun:
            before, now = run.provenance.get("ranks", "1"), distributed.describe()
            if before.rpartition("then ")[2] != now:
                run.amend(ranks=f"{before}, then {now}")


def finish(session: Session, learner: Learner) -> None:
    """Write the student: the last epoch's, or, with a held-out slice, the epoch that it chose."""
    folder, metric = session.runs[learner.name], learner.task.metrics[0]
    names = [one.name for one in learner.task.metrics]
    scored = [row for row in folder.metrics() if f"test/{metric.name}" in row]
    scores = {row["epoch"]: {name: row[f"test/{name}"] for name in names} for row in scored}
    if session.data.holdout:
        epoch, score, weights = (learner.best[key] for key in ("epoch", "score", "weights"))
    else:
        epoch, score, weights = learner.epochs, scores[learner.epochs], learner.weights()
    save_student(
        folder, "student", learner.graduate(), session.data, task=learner.task.name, epoch=epoch, score=score,
        weights=weights,
    )  # fmt: skip
    values = {epoch: one[metric.name] for epoch, one in scores.items()}
    best = (max if metric.higher else min)(values, key=values.__getitem__)
    folder.amend(
        finished=True,
        epoch=epoch,
        score=scores[epoch],
        last=list(values.values())[-1],
        best=values[best],
        best_epoch=best,
        diverged=None,  # it was overcome
    )


def result(name: str, run: Run) -> Result:
    """The outcome of a finished run, from its provenance."""
    facts, metric, score = run.provenance, run.metric, run.score
    return Result(
        name, run, score, metric, score[metric.name], facts["last"], facts["best"], facts["best_epoch"], facts["epoch"]
    )


def run_folder(out: str | None, recipe: Recipe, method: str) -> Run:
    """The folder of a new run (see `run.new`). Raises RecipeError when `out` holds a run already."""
    student = (recipe.classroom.student or "model").partition("@")[0].partition(":")[2] or (
        recipe.classroom.student or "model"
    ).partition("@")[0]

    def choose() -> Run:
        if again := distributed.resumable_run():  # a rank died before the first checkpoint
            shutil.rmtree(again, ignore_errors=True)
            return Run(Path(again))
        run = runs.new(student, method, Path(out) if out else None)
        run.check_free()
        return run

    run = distributed.on_rank0(choose)
    distributed.remember_run(str(run.path))
    return run


def begun() -> str | None:
    """The run to continue after a rank of this very command died; None when it was not begun yet."""

    def look() -> str | None:
        path = distributed.resumable_run()
        return path if path and Run(Path(path)).begun else None

    return distributed.on_rank0(look)
