"""Groups of learners that share data, stream and mentors in one session: how it is started, resumed and finished.

A distill or train is a group of one learner, a recipe's stages are groups one after the other, and a compare is a group
of all learners that can share a classroom, then a group for each other learner. The
file is long because all four kinds of command are this one loop.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from kdcli import methods
from kdcli.data import DataSet, Stream, open_data
from kdcli.data.dataset import Pixels
from kdcli.errors import InterruptedRun, RecipeError, WeightsError, did_you_mean
from kdcli.mentors import bank_build
from kdcli.mentors.classroom import Classroom, build_classroom
from kdcli.mentors.mentors import Mentors, worth_compiling
from kdcli.methods import Need
from kdcli.recipe import STAGE, Recipe, staged
from kdcli.system import device as devices, distributed
from kdcli.system.sizes import plain
from kdcli.tasks import TASKS
from kdcli.training import run as runs, tensorboard
from kdcli.training.checks import check_ranks
from kdcli.training.learner import Learner
from kdcli.training.loop import train
from kdcli.training.run import Run
from kdcli.training.session import Event, Notice, Session
from kdcli.training.student import save_student

Follow = Callable[[Classroom, Iterator[Event], str], None]
"""Shows what was chosen for a classroom, and runs its training to the end under a label."""


@dataclass
class Group:
    """Learners that share a session. Their recipes differ in method and train.seed only."""

    label: str  # of the progress bar
    recipes: dict[str, Recipe]  # by learner
    run: Run  # holds the checkpoint
    folders: dict[str, Run]  # each learner's own
    record: Run  # its provenance says with which data and mentors the training began
    kind: str = "distill"  # the command, where the run is a learner's own folder
    keep: set[int] = field(default_factory=set)  # epochs whose weights are kept

    @property
    def done(self) -> bool:
        """Whether every learner has finished."""
        return all(folder.done for folder in self.folders.values())


def train_group(
    group: Group,
    classroom: Classroom,
    follow: Follow,
    *,
    resume: bool,
    begin: Callable[[Classroom], None] = lambda classroom: None,
) -> None:
    """Train a group to its end, from the start or, with `resume`, from its last checkpoint.

    begin: called for a group that starts, after all checks and before anything is written.
    """
    session = open_session(group.recipes, classroom, group.run, group.folders, group.keep)
    laid_out = distributed.on_rank0(lambda: group.record.begun)
    if laid_out:
        check_unchanged(group.record, classroom)
    if not resume:
        begin(classroom)
    start(session, group.kind, classroom, missing_only=laid_out)
    follow(classroom, go(session, resume=resume), group.label)


def labelled(follow: Follow, prefix: str) -> Follow:
    """`follow` with `prefix` before every label."""
    return lambda classroom, events, label: follow(classroom, events, prefix + label)


@contextlib.contextmanager
def resumable(command: str, run: Run) -> Iterator[None]:
    """Where the block is interrupted, the error says how to continue the whole run, not the group within it."""
    try:
        yield
    except InterruptedRun as stopped:
        raise InterruptedRun(stopped.message, hint=f"Continue with: kdcli {command} --resume {run.path}") from None


def check_expect(recipe: Recipe) -> None:
    """Raise RecipeError where [expect] has figures of a metric that the recipe's task does not have."""
    known = [metric.name for metric in TASKS[recipe.task].metrics]
    for metric in recipe.expect.figures if recipe.expect else ():
        if metric not in known:
            raise RecipeError(
                f"expect.{metric}: task {recipe.task} has no metric of that name", hint=did_you_mean(metric, known)
            )


def data_of(recipe: Recipe, device: torch.device) -> DataSet:
    """The recipe's data. Raises RecipeError when none is named."""
    if not recipe.data.name:
        raise RecipeError("no data is named", hint="Add --data NAME; `kdcli data ls` shows what there is.")
    return distributed.local_rank0_first(lambda: open_data(recipe.data, task=recipe.task, device=device))


def open_classroom(recipe: Recipe, device: torch.device, *, mentors: bool = True) -> Classroom:
    """The recipe's data and networks. Data is looked for before weights."""
    if waits := staged(recipe.classroom, mentors=mentors):
        raise RecipeError(
            f"{STAGE}{waits[0]} is trained by distill and compare only", hint="Name networks that exist already."
        )
    return build_classroom(recipe, data_of(recipe, device), device, mentors=mentors)


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
    needs = [methods.build(one.method.name, one.method.options).needs for one in recipes.values()]
    stream = Stream(
        data,
        config.batch_size,
        seed=recipe.data.seed,
        drop_last=config.drop_last,
        device=device,
        mixup=config.mixup,
        cutmix=config.cutmix,
        label_smoothing=config.label_smoothing,
        strong=any(Need.TWO_VIEWS in some for some in needs),
    )
    check_ranks(len(data.train), config)
    distributed.check_equal(
        {"recipe": recipe.hash(), "data": data.pixels, **{one.name: one.digest for one in classroom.mentors}}
    )
    if config.cuda_graph and isinstance(data.train.store, Pixels):
        data.train.store.record()
    learners = [Learner(name, one, classroom, len(stream)) for name, one in recipes.items()]
    _note_choices(recipes, classroom, learners)
    mentors = _open_mentors(recipe, classroom, learners)
    compiled = _to_compile(recipe, mentors, max(one.epochs for one in learners) * len(stream) * config.batch_size)
    if compiled and recipe.classroom.compile is None:
        classroom.notes.append(
            ("classroom.compile", ", ".join(compiled), "compile time pays back (> 1e14 multiply-adds left)")
        )
    return Session(learners, stream, mentors, data, run, folders, config, keep or set(), compiled)


def _note_choices(recipes: dict[str, Recipe], classroom: Classroom, learners: list[Learner]) -> None:
    """Add to the classroom's notes what was chosen for its learners, and why."""
    notes, device = classroom.notes, classroom.device
    for label, options in dict.fromkeys((one.method.label, _options(one)) for one in recipes.values()):
        notes.append((f"method {label}", options, "given, or the method's defaults"))
    student = learners[0].student
    notes.append((student.name, student.origin, "the student's weights"))
    notes.append(("device", devices.describe(device), "--device chooses"))
    if not distributed.alone():
        notes.append(("ranks", distributed.describe(), "they divide every batch"))
    notes.append(("train.precision", learners[0].precision, learners[0].precision_why))
    if classroom.mentors:
        precision, why = _mentor_precision(next(iter(recipes.values())), device)
        notes.append(("classroom.precision", precision, why))


def _mentor_precision(recipe: Recipe, device: torch.device) -> tuple[Any, str]:
    return devices.precision(recipe.classroom.precision, device, frozen=True)


def _open_mentors(recipe: Recipe, classroom: Classroom, learners: list[Learner]) -> Mentors:
    """The classroom's mentors, with every output that a learner needs; no mentors if no learner needs any."""
    with_mentors = [learner for learner in learners if learner.method.teachers]
    if not with_mentors:
        return Mentors([], _mentor_precision(recipe, classroom.device)[0], classroom.device)
    needs = frozenset().union(*(learner.method.needs for learner in with_mentors))
    return distributed.local_rank0_first(
        lambda: bank_build.open_mentors(
            classroom,
            recipe,
            needs=needs,
            logits_only=any(not learner.needs for learner in with_mentors),
            ahead=recipe.classroom.ahead or 0,
            cuda_graph=recipe.train.cuda_graph,
        )
    )


def _to_compile(recipe: Recipe, mentors: Mentors, images: int) -> list[str]:
    """The names of the mentors to compile when the training begins."""
    if recipe.classroom.compile is not None:
        return [member.name for member in mentors.members] if recipe.classroom.compile else []
    if mentors.banks or mentors.needs:  # a bank's entries must have the same last bits, whichever run wrote them
        return []
    return worth_compiling(mentors.members, images)


def _options(recipe: Recipe) -> str:
    """All options of a recipe's method with their values, as text."""
    values = methods.in_force(recipe.method.name, recipe.method.options)
    return ", ".join(f"{key} = {value}" for key, value in values.items() if value is not None) or "no options"


def start(session: Session, kind: str, classroom: Classroom, *, missing_only: bool = False) -> None:
    """Write recipe and provenance into every learner's folder. Raises RecipeError for a folder that holds a run.

    Args:
        kind: the command to record where the session's run is a learner's own folder.
        missing_only: skip folders that already hold a run.
    """
    common = facts_of(classroom)
    kept = {"keep": sorted(session.keep)} if session.keep else {}  # a resumed run keeps them too

    def lay_out() -> None:
        for learner in session.learners:
            folder = session.runs[learner.name]
            whole = folder is session.run
            facts = {**common, **(kept if whole else {})}
            if not (missing_only and folder.begun):
                folder.start(learner.recipe, runs.provenance(kind if whole else "distill", learner.recipe, **facts))

    distributed.on_rank0(lay_out)


def facts_of(classroom: Classroom) -> dict[str, Any]:
    """What provenance holds about the data, the mentors and the machine."""
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


def check_unchanged(run: Run, classroom: Classroom) -> None:
    """Raise KdcliError when the run began with another recipe, other data or other mentors than there are now."""
    before, now = run.provenance, facts_of(classroom)
    if run.recipe.hash() != before["recipe"]:
        raise RecipeError(
            f"{run.path}/recipe.toml has changed since the run began", hint="Put it back, or start a new run with it."
        )
    if any(before["data"].get(key, "") not in ("", now["data"][key]) for key in ("hash", "pixels")):
        raise WeightsError(
            f"{run.path} was trained on other images than {classroom.data.name} holds now",
            hint="Put the old data back, or start a new run.",
        )
    for name, facts in before["mentors"].items():
        if now["mentors"].get(name, {}).get("sha256") != facts["sha256"]:
            raise WeightsError(
                f"{run.path}: its mentor {name} had other weights than those found now",
                hint="Name the old ones with @PATH in its recipe.toml, or start a new run.",
            )


def go(session: Session, *, resume: bool = False) -> Iterator[Event]:
    """Train the session and write every learner's student; yields what `training.loop.train` yields."""
    if resume:
        distributed.on_rank0(lambda: _note_ranks([session.run, *session.runs.values()]))
    yield from train(session, resume=resume)
    distributed.on_rank0(session.run.forget_previous)
    for learner in session.learners:
        distributed.on_rank0(lambda learner=learner: finish(session, learner))
    yield from map(Notice, session.mentors.bank_warnings())


def _note_ranks(folders: list[Run]) -> None:
    """Record in their provenance that runs continue with another number of ranks than before."""
    for run in folders:
        if run.begun:
            before, now = run.provenance.get("ranks", "1"), distributed.describe()
            if before.rpartition("then ")[2] != now:
                run.amend(ranks=f"{before}, then {now}")


def finish(session: Session, learner: Learner) -> None:
    """Write the student: the last epoch's or, with a held-out slice, that of the epoch with the best score on it."""
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
        diverged=None,  # the training was resumed and came to its end
    )
