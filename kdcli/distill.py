"""From a recipe to a trained student in a run folder: the one way in for distill, train and compare."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcli import board, device as devices, engine, files, methods, run as runs, weights, zoo
from kdcli.classroom import Classroom, Member, from_card, seat
from kdcli.data import DataSet, Stream, open_data
from kdcli.engine import EpochEnd, Session, Step
from kdcli.errors import RecipeError, WeightsError
from kdcli.learner import Learner, keep as keep_student
from kdcli.mentors import Mentors
from kdcli.recipe import Recipe
from kdcli.run import Run


@dataclass
class Result:
    """What became of one learner."""

    name: str
    run: Run
    top1: float  # percent on the test set, of what is shipped
    last: float
    best: float  # the best epoch's; chosen on the test set, so only a record
    best_epoch: int
    epoch: int  # the shipped weights' epoch


def open_room(recipe: Recipe, device: torch.device, *, mentors: bool = True) -> tuple[DataSet, Classroom]:
    """The recipe's data and classroom. Data is looked for before weights."""
    if not recipe.data.name:
        raise RecipeError("no data is named", hint="Add --data NAME; `kdcli data ls` shows what there is.")
    data = open_data(recipe.data, device=device)
    return data, seat(recipe, data, device, mentors=mentors)


def open_session(
    recipes: dict[str, Recipe], classroom: Classroom, run: Run, folders: dict[str, Run], keep: set[int] | None = None
) -> Session:
    """Learners (by name) that share the first recipe's data, stream and mentors.

    The recipes may differ in method and train.seed only.
    """
    recipe, data, device = next(iter(recipes.values())), classroom.data, classroom.device
    config = recipe.train
    if config.tensorboard:
        board.check()
    stream = Stream(
        data,
        config.batch_size,
        seed=recipe.data.seed,
        drop_last=config.drop_last,
        device=device,
        mixup=config.mixup,
        cutmix=config.cutmix,
        label_smoothing=config.label_smoothing,
    )
    learners = [Learner(name, one, classroom, len(stream)) for name, one in recipes.items()]
    precision, why = devices.precision(recipe.classroom.precision, device, frozen=True)
    classroom.notes += [(f"method {one.method.name}", _options(one), "a method's own defaults but for what is given")
                        for one in {one.method.name: one for one in recipes.values()}.values()]  # fmt: skip
    student = learners[0].student
    classroom.notes.append((student.name, student.origin, "the student's weights"))
    classroom.notes.append(("device", devices.describe(device), "--device chooses"))
    classroom.notes.append(("train.precision", learners[0].precision, learners[0].precision_why))
    if classroom.mentors:
        classroom.notes.append(("classroom.precision", precision, why))
    wanted = any(learner.method.teachers for learner in learners)
    mentors = Mentors(classroom.mentors if wanted else [], precision, device)
    return Session(learners, stream, mentors, data, run, folders, config, keep or set())


def _options(recipe: Recipe) -> str:
    """All options of a recipe's method as they are in force."""
    values = {key: p.default for key, p in methods.options(recipe.method.name).items()} | recipe.method.options
    return ", ".join(f"{key} = {value}" for key, value in values.items() if value is not None) or "no options"


def start(session: Session, kind: str, classroom: Classroom, **facts: Any) -> None:
    """Lay out the run folders with recipe and provenance, the session's and every learner's."""
    common = facts_of(classroom)
    if session.keep:
        facts["keep"] = sorted(session.keep)  # a resumed run keeps them too
    for learner in session.learners:
        folder = session.runs[learner.name]
        own = {**common, **facts} if folder is session.run else common
        folder.start(
            learner.recipe, runs.provenance(kind if folder is session.run else "distill", learner.recipe, **own)
        )


def facts_of(classroom: Classroom) -> dict[str, Any]:
    """What provenance says of the data, the mentors and the machine."""
    data = classroom.data
    return {
        "device": devices.describe(classroom.device),
        "data": {
            "name": data.name,
            "hash": data.hash,
            "pixels": data.pixels,
            "image_size": data.image_size,
            "train": len(data.train),
            "test": len(data.test),
        },
        "mentors": {m.name: {"architecture": m.architecture.full, "sha256": m.digest} for m in classroom.mentors},
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
            f"{run.path} was trained on other pictures than {classroom.data.name} holds now",
            hint="Put the old data back, or start a new run.",
        )
    for name, facts in before["mentors"].items():
        if now["mentors"].get(name, {}).get("sha256") != facts["sha256"]:
            raise WeightsError(
                f"{run.path}: its mentor {name} had other weights than are found now",
                hint="Name the old ones with @PATH in its recipe.toml, or start a new run.",
            )


def go(session: Session, *, resume: bool = False) -> Iterator[Step | EpochEnd]:
    """Train the session and write every learner's student; yields what `engine.train` yields."""
    yield from engine.train(session, resume=resume)
    for learner in session.learners:
        finish(session, learner)


def finish(session: Session, learner: Learner) -> None:
    """Write the student: the last epoch's, or, with a held-out slice, the epoch that it chose."""
    folder, epoch = session.runs[learner.name], learner.epochs
    scored = [row for row in folder.metrics() if "test/top1" in row]
    if session.data.holdout:
        for suffix in (".safetensors", ".toml"):  # the card goes last: a student without one is not finished
            kept = folder.path / f"best{suffix}"
            files.write_atomic(
                folder.path / f"student{suffix}", lambda to, kept=kept: to.write_bytes(kept.read_bytes())
            )
        epoch = learner.best["epoch"]
    else:
        keep_student(folder, "student", learner, epoch, _score_of(scored[-1]))
    shipped = next(row for row in scored if row["epoch"] == epoch)
    best = max(scored, key=lambda row: row["test/top1"])
    folder.amend(
        epoch=epoch,
        top1=shipped["test/top1"],
        last=scored[-1]["test/top1"],
        best=best["test/top1"],
        best_epoch=best["epoch"],
    )


def _score_of(row: dict[str, Any]) -> Any:
    from kdcli.evaluate import Score

    return Score(0, row["test/top1"], row["test/top5"], row["test/loss"])


def result(name: str, run: Run) -> Result:
    """The outcome of a finished run, from its provenance."""
    facts = run.provenance
    return Result(name, run, facts["top1"], facts["last"], facts["best"], facts["best_epoch"], facts["epoch"])


def student_of(run: Run) -> Member:
    """A finished run's student. Raises WeightsError when it is not finished or its files are broken."""
    if not (run.path / "student.safetensors").is_file() or not (run.path / "student.toml").is_file():
        raise WeightsError(
            f"{run.path} has no student yet: it was stopped before its end",
            hint=f"`kdcli runs show {run.path}` says how to continue it.",
        )
    card = zoo.read_card(run.path / "student.toml")
    return from_card(card, weights.load_state(run.path / "student.safetensors"))


def run_folder(out: str | None, recipe: Recipe, method: str) -> Run:
    """The folder of a new run (see `run.new`). Raises RecipeError when `out` holds a run already."""
    student = (recipe.classroom.student or "model").partition("@")[0].partition(":")[2] or (
        recipe.classroom.student or "model"
    ).partition("@")[0]
    run = runs.new(student, method, Path(out) if out else None)
    run.check_free()
    return run
