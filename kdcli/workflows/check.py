"""A classroom checked without training: sizes, scores, a few steps of every phase and what the whole would cost."""

import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdcli.data import Split
from kdcli.errors import WeightsError
from kdcli.mentors import bank_build, bank_files
from kdcli.mentors.classroom import Classroom
from kdcli.methods import Lesson
from kdcli.models.member import Member
from kdcli.recipe import STAGE, Recipe
from kdcli.system import device as devices
from kdcli.system.sizes import Size, plain
from kdcli.tasks import TASKS, Metric, Task
from kdcli.training.evaluate import score
from kdcli.training.learner import Learner
from kdcli.training.run import Run
from kdcli.training.session import Session
from kdcli.workflows import groups, stages

STEPS = 3  # timed steps of each phase
CLOSE_TO_CHANCE = 2.0  # a mentor below this many times the score of guessing is warned of


@dataclass
class ModelRow:
    """A row of the classroom's table."""

    role: str
    name: str
    params: int
    macs: int  # multiply-adds of one image at its own input size
    input_size: Size
    score: dict[str, float]  # on the images it was scored on; empty where it was not
    origin: str


@dataclass
class Checked:
    """The result of a check."""

    rows: list[ModelRow]
    metric: Metric  # that mentors are scored by
    facts: list[str] = field(default_factory=list)  # sentences for people
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0  # what the epochs would take here, scoring not included
    epochs: int = 0  # of all phases
    notes: list[tuple[str, object, str]] = field(default_factory=list)
    taps: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    """What a method can read of each network, by name, with its shape for one image."""

    def json(self) -> dict[str, Any]:
        """As plain data; a row's score also under the metrics' names, None where it was not scored."""
        found = asdict(self)
        rows, found["words"] = found.pop("rows"), found.pop("facts")
        for row in rows:
            row["input_size"] = plain(row["input_size"])
        return {"seats": [{**row, self.metric.name: None, **row["score"]} for row in rows], **found}


def check(recipe: Recipe, device: torch.device, images: int) -> Checked:
    """Resolve, load, score the mentors on up to `images` test images (0: all), try a few steps without keeping them.

    Stages come first, each with untrained stand-ins for the networks that earlier ones will train.
    """
    groups.check_expect(recipe)
    whole, facts, seconds = stages.plan(recipe), [], 0.0
    for name, part, classroom in stages.dry_run(whole, groups.data_of(recipe, device), device):
        if not name:
            found = _check_last(part, whole.last, classroom, images)
            found.facts, found.seconds = [*facts, *found.facts], seconds + found.seconds
            return found
        cost = _measure_cost(part, classroom)
        mentors = ", ".join(mentor.name for mentor in classroom.mentors) or "no mentors"
        facts.append(
            f"stage {name}: {classroom.student_name.arch} learns from {mentors} ({part.method.label}), "
            f"{epochs(cost.epochs)}, about {cost.seconds:.0f} s"
        )
        seconds += cost.seconds
    raise AssertionError("a recipe's own part comes last")


def _check_last(recipe: Recipe, named: Recipe, classroom: Classroom, images: int) -> Checked:
    """A classroom's table and its recipe's cost; `named` is the recipe before stages' results replaced their names."""
    device, data = classroom.device, classroom.data
    task = TASKS[recipe.task](len(data.classes))
    student = classroom.student(recipe.train.seed)
    found = Checked([_row("student", student, {})], task.metrics[0], notes=classroom.notes)
    for member in (student, *classroom.mentors):
        try:
            found.taps[member.name] = member.taps()
        except WeightsError as error:  # methods that learn from logits alone can use it all the same
            found.facts.append(error.message)
    cost = _measure_cost(recipe, classroom)
    _score_mentors(found, named, classroom, task, images)
    if recipe.classroom.bank and classroom.mentors:
        found.facts.append(_bank_size(recipe, classroom, device))
    found.facts.append(f"{len(data.train)} training images, {len(data.test)} test images, {len(data.classes)} classes")
    for name, phase in cost.phases.items():
        which = f" of phase {name} ({epochs(phase.epochs)})" if len(cost.phases) > 1 else ""
        step = f"one step{which} {1000 * phase.step_seconds:.0f} ms here (the fastest of up to {STEPS})"
        found.facts.append(f"{step}, {cost.steps} steps an epoch")
    found.seconds, found.epochs = cost.seconds, cost.epochs
    return found


def _row(role: str, member: Member, score: dict[str, float], origin: str = "") -> ModelRow:
    params, macs = member.count()
    return ModelRow(
        role, member.name, params, macs, member.input_size, score, origin or member.origin or "from scratch"
    )


def _score_mentors(found: Checked, named: Recipe, classroom: Classroom, task: Task, images: int) -> None:
    """Add the mentors' rows, and a warning for each that is about as good as guessing."""
    if not classroom.mentors:
        return
    test, unit = _some(classroom.data.test, images), found.metric.unit
    in_stage = [(spec or "").startswith(STAGE) for spec in (named.classroom.teacher, *named.classroom.peers)]
    for n, mentor in enumerate(classroom.mentors):
        role = "peer" if n else "teacher"
        if in_stage[n]:
            found.rows.append(_row(role, mentor, {}, "trained first, in a stage"))
            continue
        measured = score(mentor, test, task, classroom.device)
        found.rows.append(_row(role, mentor, dict(measured)))
        if measured.value < CLOSE_TO_CHANCE * task.chance:
            found.warnings.append(
                f"{mentor.name} scores {measured.value:.2f} {unit}, guessing scores {task.chance:.2f} {unit}: its "
                "classes, its normalisation or its weights do not fit this data."
            )
    sizes = [row.params for row in found.rows[1:]]
    found.facts.append(
        f"mentors' parameters: (n+1)t {len(sizes) * sizes[0] / 1e6:.2f} M, 1t+np {sum(sizes) / 1e6:.2f} M; "
        f"student {found.rows[0].params / 1e6:.2f} M (as ClassroomKD Table 7)"
    )
    found.facts.append(f"mentors scored on {len(test)} of {len(classroom.data.test)} test images")


@dataclass
class PhaseCost:
    """What one phase of a method takes here."""

    epochs: int
    step_seconds: float


@dataclass
class Cost:
    """What a training takes here, scoring not included."""

    phases: dict[str, PhaseCost]
    steps: int  # an epoch

    @property
    def epochs(self) -> int:
        return sum(phase.epochs for phase in self.phases.values())

    @property
    def seconds(self) -> float:
        return sum(phase.epochs * phase.step_seconds * self.steps for phase in self.phases.values())


def _measure_cost(recipe: Recipe, classroom: Classroom) -> Cost:
    """Time real steps of every phase, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "dry")
        live = recipe.with_(**{"classroom.bank": False})  # nothing may be left behind
        session = groups.open_session({recipe.method.label: live}, classroom, run, {recipe.method.label: run})
        learner = session.learners[0]
        phases: dict[str, PhaseCost] = {}
        start = 0
        for phase in learner.phases:
            cost = phases.setdefault(phase.name, PhaseCost(0, 0.0))
            if not cost.epochs and phase.epochs:
                learner.begin_epoch(start, lambda: _one_lesson(session, learner))
                cost.step_seconds = _timed(session, start)
            cost.epochs, start = cost.epochs + phase.epochs, start + phase.epochs
        return Cost(phases, len(session.stream))


def _timed(session: Session, epoch: int) -> float:
    """Seconds of the fastest of a few steps of the one learner."""
    learner, times = session.learners[0], []
    for number, batch in enumerate(itertools.islice(session.stream.epoch(epoch), STEPS)):
        began = time.perf_counter()
        learner.step(batch, session.mentors.answer(batch).of(learner.needs), epoch, number, number)
        learner.check()  # waits for the device, so the clock is true
        times.append(time.perf_counter() - began)
    return min(times)


def _one_lesson(session: Session, learner: Learner) -> Iterator[Lesson]:
    """The first batch of what `begin_epoch` reads of the training set."""
    batch = next(session.data.train.plain(session.config.batch_size, session.stream.device))
    yield learner.lesson(batch, session.mentors.answer(batch).of(learner.needs), 0.0, 0)


def epochs(n: int) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{n} epoch{'' if n == 1 else 's'}"


def _bank_size(recipe: Recipe, classroom: Classroom, device: torch.device) -> str:
    """What the recipe's banks take on the disk, and how many exist."""
    precision, _ = devices.precision(recipe.classroom.precision, device, frozen=True)
    wanted = {bank_files.id_of(one): one for one in bank_build.needed(classroom, recipe, precision).values()}
    there = sum((bank_files.folder() / name).is_dir() for name in wanted)
    size = bank_files.amount(sum(map(bank_files.bytes_of, wanted.values())))
    return f"banks: {len(wanted)} of {size} in all, {there} exist; filling them is not in the time below"


def _some(test: Split, images: int) -> Split:
    """At most `images` (0: all) of a split, spread evenly over it: folders come sorted by class."""
    n = min(images, len(test)) or len(test)
    return test.subset(torch.arange(n) * len(test) // n)
