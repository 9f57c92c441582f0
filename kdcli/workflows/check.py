"""A classroom looked over without training: sizes, scores, one dry step and what the whole would cost."""

import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kdcli.data import Split
from kdcli.errors import WeightsError
from kdcli.mentors import bank_build, bank_files
from kdcli.mentors.classroom import Classroom
from kdcli.methods import Lesson
from kdcli.recipe import STAGE, Recipe
from kdcli.system import device as devices
from kdcli.system.sizes import Size
from kdcli.tasks import TASKS, Metric
from kdcli.training.evaluate import score
from kdcli.training.learner import Learner
from kdcli.training.run import Run
from kdcli.training.session import Session
from kdcli.workflows import distill, stages

TRIES = 3  # dry steps of each phase
CLOSE_TO_CHANCE = 2.0  # a mentor below this many times the accuracy of guessing is warned of


@dataclass
class ModelRow:
    """A row of the classroom's table."""

    role: str
    name: str
    params: int
    macs: int  # multiply-adds of one image at its own input size
    input_size: Size
    score: dict[str, float]  # on the images looked at; empty for a student
    origin: str


@dataclass
class Look:
    """What `kdcli check` found."""

    rows: list[ModelRow]
    metric: Metric  # what mentors are scored by
    words: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0  # what the epochs would take here, scoring not counted
    epochs: int = 0  # of all its phases
    notes: list[tuple[str, object, str]] = field(default_factory=list)
    taps: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    """What a method can read of each network, by name, with its shape for one image."""


def look(recipe: Recipe, device: torch.device, images: int) -> Look:
    """Resolve, load, score the mentors on up to `images` test images (0: all), take a few steps and throw them away.

    Stages come first, each with untrained networks in the place of what earlier ones will have trained.
    """
    whole, words, seconds = stages.plan(recipe), [], 0.0
    for name, part, classroom in stages.dry_run(whole, distill.data_of(recipe, device), device):
        if not name:
            found = _look(part, whole.last, classroom, images)
            return replace(found, words=[*words, *found.words], seconds=seconds + found.seconds)
        cost = _dry_steps(part, classroom)
        took = cost.seconds
        taught = ", ".join(mentor.name for mentor in classroom.mentors) or "nobody"
        words.append(
            f"stage {name}: {classroom.student_name.arch} taught by {taught} ({part.method.label}), "
            f"{cost.epochs} epochs, about {took:.0f} s"
        )
        seconds += took
    raise AssertionError("a recipe's own part comes last")


def _look(recipe: Recipe, named: Recipe, classroom: Classroom, images: int) -> Look:
    """A classroom's table and the cost of its recipe; `named` says which mentors are stages' graduates."""
    device, data = classroom.device, classroom.data
    later = [(spec or "").startswith(STAGE) for spec in (named.classroom.teacher, *named.classroom.peers)]
    student = classroom.student(recipe.train.seed)
    params, macs = student.count()
    rows = [ModelRow("student", student.name, params, macs, student.input_size, {}, student.origin or "from scratch")]
    task = TASKS[recipe.task](len(data.classes))
    found = Look(rows, task.metrics[0], notes=classroom.notes)
    for member in (student, *classroom.mentors):
        try:
            found.taps[member.name] = member.taps()
        except WeightsError as error:  # no obstacle to methods that learn from logits
            found.words.append(error.message)
    cost = _dry_steps(recipe, classroom)
    test = _some(data.test, images)
    for n, mentor in enumerate(classroom.mentors):
        params, macs = mentor.count()
        role = "teacher" if n == 0 else "peer"
        if later[n]:
            rows.append(ModelRow(role, mentor.name, params, macs, mentor.input_size, {}, "trained first, in a stage"))
            continue
        found_score = score(mentor, test, task, device)
        rows.append(ModelRow(role, mentor.name, params, macs, mentor.input_size, dict(found_score), mentor.origin))
        if found_score.value < CLOSE_TO_CHANCE * task.chance:
            found.warnings.append(
                f"{mentor.name} scores {found_score.value:.2f} {task.metrics[0].unit}, guessing {task.chance:.2f} {task.metrics[0].unit}: its classes, its normalisation or its "
                "weights do not fit this data."
            )
    if classroom.mentors:
        sizes = [row.params for row in rows[1:]]
        found.words.append(
            f"mentors' parameters: (n+1)t {len(sizes) * sizes[0] / 1e6:.2f} M, 1t+np {sum(sizes) / 1e6:.2f} M; "
            f"student {rows[0].params / 1e6:.2f} M (as ClassroomKD Table 7)"
        )
        found.words.append(f"mentors scored on {len(test)} of {len(data.test)} test images")
    if recipe.classroom.bank and classroom.mentors:
        found.words.append(_bank_words(recipe, classroom, device))
    found.words.append(f"{len(data.train)} training images, {len(data.test)} test images, {len(data.classes)} classes")
    for phase, (epochs, update) in cost.phases.items():
        told = f" of phase {phase} ({epochs} epochs)" if len(cost.phases) > 1 else ""
        step = f"one step{told} {1000 * update:.0f} ms here (the fastest of up to {TRIES} dry steps)"
        found.words.append(f"{step}, {cost.steps} steps an epoch")
    found.seconds, found.epochs = cost.seconds, cost.epochs
    return found


@dataclass
class Cost:
    """What dry steps took: of each phase its epochs and seconds a step; steps an epoch."""

    phases: dict[str, tuple[int, float]]
    steps: int

    @property
    def epochs(self) -> int:
        return sum(epochs for epochs, _ in self.phases.values())

    @property
    def seconds(self) -> float:
        return sum(epochs * update * self.steps for epochs, update in self.phases.values())


def _dry_steps(recipe: Recipe, classroom: Classroom) -> Cost:
    """Real steps of every phase of the real recipe, in a folder that vanishes."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "dry")
        live = recipe.with_(**{"classroom.bank": False})  # nothing is to be left behind
        session = distill.open_session({recipe.method.label: live}, classroom, run, {recipe.method.label: run})
        learner = session.learners[0]
        found: dict[str, tuple[int, float]] = {}
        start = 0
        for phase in learner.phases:
            epochs, update = found.get(phase.name, (0, 0.0))
            if not epochs and phase.epochs:
                learner.begin_epoch(start, lambda: _glimpse(session, learner))
                update = _timed(session, start)
            found[phase.name], start = (epochs + phase.epochs, update), start + phase.epochs
        return Cost(found, len(session.stream))


def _timed(session: Session, epoch: int) -> float:
    """Seconds of the fastest of a few steps of the one learner."""
    learner, times = session.learners[0], []
    for number, batch in enumerate(itertools.islice(session.stream.epoch(epoch), TRIES)):
        began = time.perf_counter()
        learner.step(batch, session.mentors.answer(batch).of(learner.needs), epoch, number, number)
        learner.check()  # waits for the device, so the clock is true
        times.append(time.perf_counter() - began)
    return min(times)


def _glimpse(session: Session, learner: Learner) -> Iterator[Lesson]:
    """A batch of a method's look through the training set."""
    batch = next(session.data.train.plain(session.config.batch_size, session.stream.device))
    yield learner.lesson(batch, session.mentors.answer(batch).of(learner.needs), 0.0, 0)


def _bank_words(recipe: Recipe, classroom: Classroom, device: torch.device) -> str:
    """What the recipe's banks take on the disk, and how many are there."""
    precision, _ = devices.precision(recipe.classroom.precision, device, frozen=True)
    wanted = {bank_files.id_of(one): one for one in bank_build.needed(classroom, recipe, precision).values()}
    there = sum((bank_files.folder() / name).is_dir() for name in wanted)
    size = bank_files.amount(sum(map(bank_files.bytes_of, wanted.values())))
    return f"banks: {len(wanted)} of {size} together, {there} there; not counted in the time below"


def _some(test: Split, images: int) -> Split:
    """At most `images` (0: all) of a split, spread evenly over it: folders come sorted by class."""
    n = min(images, len(test)) or len(test)
    return test.subset(torch.arange(n) * len(test) // n)
