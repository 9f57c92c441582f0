"""From a recipe to a trained student in a run folder: what `kdcli distill` and `kdcli train` do."""

import contextlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdcli.errors import RecipeError
from kdcli.models import cards, checkpoint
from kdcli.models.cards import Card
from kdcli.recipe import Recipe
from kdcli.system import distributed
from kdcli.tasks import Metric
from kdcli.training import run as runs
from kdcli.training.run import Run
from kdcli.workflows import groups, stages
from kdcli.workflows.groups import Follow


@dataclass
class Published:
    """A published figure of the run's method, and what this run measured that compares with it."""

    value: float
    measured: float
    epoch: str  # which epoch both are of: best or last
    tolerance: float

    @property
    def reproduced(self) -> bool:
        return abs(self.measured - self.value) <= self.tolerance


@dataclass
class Result:
    """The outcome of one learner."""

    name: str
    run: Run
    score: dict[str, float]  # on the test set, of what ships
    metric: Metric  # the primary one; the figures below are of it
    value: float
    last: float
    best: float  # the best epoch's; chosen on the test set, so only a record
    best_epoch: int
    epoch: int  # that the shipped weights are of
    data: str  # the data set's name
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> recipe's hash, epoch, score
    published: Published | None = None
    zoo: Card | None = None  # of a model trained alone: what was added to the user's zoo

    def json(self) -> dict[str, Any]:
        """As plain data; each stage's score also under the metrics' names."""
        stages = {name: {**one, **one["score"]} for name, one in self.stages.items()}
        return {
            "run": str(self.run.path), **self.score, "epoch": self.epoch, "last": self.last, "best": self.best,
            "best_epoch": self.best_epoch, **({"stages": stages} if stages else {}),
            **({"zoo": {**self.zoo.model_dump(), **self.zoo.score}} if self.zoo else {}),
        }  # fmt: skip


def distill(
    recipe: Recipe,
    device: torch.device,
    follow: Follow,
    *,
    out: str | None = None,
    kind: str = "distill",
    keep: set[int] | None = None,
) -> Result:
    """Train one student with one method, after the stages it needs.

    Args:
        follow: shows what was chosen for each classroom and runs its training to the end.
        out: the run's folder; default: a new one under runs/.
        kind: `train` for a model alone, which is added to the user's zoo.
        keep: epochs (from 1) whose weights are kept.

    Raises:
        KdcliError: with nothing written, for whatever would stop the training before its first step.
    """
    groups.check_expect(recipe)
    run = run_folder(out, recipe, recipe.method.label if kind == "distill" else kind)
    return train_into(run, recipe, device, follow, kind=kind, keep=keep)


def resume(run: Run, device: torch.device, follow: Follow) -> Result:
    """Continue a run of distill or train where it was stopped."""
    keep = set(run.provenance.get("keep", []))
    return train_into(run, run.recipe, device, follow, kind=run.kind, keep=keep, resume=True)


def train_into(
    run: Run,
    recipe: Recipe,
    device: torch.device,
    follow: Follow,
    *,
    kind: str = "distill",
    keep: set[int] | None = None,
    resume: bool = False,
) -> Result:
    """Train a recipe into a folder that is new or, with `resume`, holds its run."""
    with groups.resumable(kind, run), contextlib.ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(run.writing())
            distributed.on_rank0(run.check_free)

        if resume:
            stack.enter_context(run.writing())
        stages.train(recipe, run, device, follow, resume=resume, begin=begin, kind=kind, keep=keep)
    found = distributed.on_rank0(lambda: result(recipe.method.label, run))
    if kind == "train":
        found.zoo = distributed.on_rank0(lambda: into_zoo(run))
    return found


def into_zoo(run: Run) -> Card:
    """Add a finished run's student to the user's zoo."""
    card = cards.read_card(run.path / "student.toml")
    return cards.add(checkpoint.load_state(run.path / "student.safetensors"), card)


def result(name: str, run: Run) -> Result:
    """The outcome of a finished run, from its folder; `name` is its method, or its name in a compare."""
    facts, recipe, score = run.provenance, run.recipe, run.score
    metric = run.metric
    found = Result(
        name, run, score, metric, score[metric.name], facts["last"], facts["best"], facts["best_epoch"], facts["epoch"],
        facts["data"]["name"], facts.get("stages", {}),
    )  # fmt: skip
    if recipe.expect and (figure := recipe.expect.of(metric.name).get(recipe.method.label)) is not None:
        measured = found.best if recipe.expect.epoch == "best" else found.last
        found.published = Published(figure, measured, recipe.expect.epoch, recipe.expect.tolerance)
    return found


def run_folder(out: str | None, recipe: Recipe, method: str) -> Run:
    """The folder of a new run (see `run.new`). Raises RecipeError when `out` holds a run already."""
    name = (recipe.classroom.student or "model").partition("@")[0]
    student = name.partition(":")[2] or name

    def choose() -> Run:
        if path := distributed.resumable_run():  # a rank died before the first checkpoint
            shutil.rmtree(path, ignore_errors=True)
            return Run(Path(path))
        run = runs.new(student, method, Path(out) if out else None)
        run.check_free()
        return run

    run = distributed.on_rank0(choose)
    distributed.remember_run(str(run.path))
    return run


def interrupted_run() -> str | None:
    """The run that this very command began before one of its ranks died; None when there is none to resume."""

    def find() -> str | None:
        path = distributed.resumable_run()
        return path if path and Run(Path(path)).begun else None

    return distributed.on_rank0(find)


def to_resume(name: str, kind: str, *, finished_too: bool = False) -> Run:
    """The run that --resume names. Raises RecipeError when it is finished, or another command's."""
    run = runs.find(name, learner=False)
    for whole in map(Run, reversed([*run.path.parents][:3])):
        if whole.begun and (whole.kind == "compare" or "stages" in whole.provenance):
            raise RecipeError(f"{run.path} is a part of {whole.path}", hint=f"kdcli {whole.kind} --resume {whole.path}")
    if run.kind != kind:
        raise RecipeError(f"{run.path} is a {run.kind}", hint=f"kdcli {run.kind} --resume {run.path}")
    if run.finished and not finished_too and not distributed.restarts():  # a rank may have died after the end
        raise RecipeError(f"{run.path} is finished", hint=f"`kdcli runs show {run.path}` prints it.")
    run.check_methods()
    return run
