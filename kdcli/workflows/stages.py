"""Trainings before the training: a recipe's stages, in order, each an ordinary run inside the run's folder."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcli import methods
from kdcli.data import DataSet
from kdcli.errors import InterruptedRun, RecipeError
from kdcli.mentors.classroom import Classroom, build_classroom
from kdcli.models import cards
from kdcli.recipe import NAMED, STAGE, Recipe, staged
from kdcli.system import distributed
from kdcli.training import run as runs
from kdcli.training.learner import Learner
from kdcli.training.run import Run
from kdcli.training.session import Event
from kdcli.training.student import save_student
from kdcli.workflows import distill

FOLDER = "stages"  # in the run's
LAST = ""  # the recipe's own part, which comes after all stages
Follow = Callable[[Classroom, Iterator[Event], str], None]
"""Tells what was chosen for a classroom, and runs its training to the end under a label."""


@dataclass
class Plan:
    """What is trained, in order."""

    stages: dict[str, Recipe]  # only those that something after them needs
    last: Recipe  # the recipe's own part, its classroom as it is after the stages

    @property
    def parts(self) -> dict[str, Recipe]:
        return {**self.stages, LAST: self.last}


def plan(recipe: Recipe) -> Plan:
    """A recipe's stages, those that its method's name stands for among them."""
    cls = methods.find(recipe.method.name)
    last = cls.expand(recipe)
    every, wanted = last.stages(), set(_named(last))
    for name, one in reversed(every.items()):
        if name in wanted:
            if one.method.options.get("assistants"):
                raise RecipeError(
                    f"stage {name}: method.assistants: a stage has no stages of its own",
                    hint='Give the stage a method of its own, such as method = { name = "kd" }.',
                )
            wanted |= set(_named(one))
    return Plan({name: one for name, one in every.items() if name in wanted}, last)


def _named(recipe: Recipe) -> list[str]:
    return staged(recipe.classroom, mentors=teaches(recipe))


def teaches(recipe: Recipe) -> bool:
    """Whether the recipe's method listens to mentors."""
    return methods.find(recipe.method.name).teachers > 0


def resolve(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe as a plain one: graduates of finished stages named by what they are and where they lie."""
    mentors = teaches(recipe)
    over: dict[str, Any] = {"stage": []}
    for key in NAMED if mentors else NAMED[:1]:
        spec = getattr(recipe.classroom, key)
        over[f"classroom.{key}"] = [_lying(one, folder) for one in spec] if key == "peers" else _lying(spec, folder)
    return recipe.with_(**over) if staged(recipe.classroom, mentors=mentors) else recipe


def recipe_of(run: Run) -> Recipe:
    """A run's recipe as a plain one, its mentors those that its stages trained."""
    return resolve(plan(run.recipe).last, run.path / FOLDER)


def _lying(spec: str | None, folder: Path) -> str | None:
    if spec is None or not spec.startswith(STAGE):
        return spec
    where = folder / spec.removeprefix(STAGE)
    return f"{cards.read_card(where / 'student.toml').architecture}@{where}"


def dry_run(whole: Plan, data: DataSet, device: torch.device) -> Iterator[tuple[str, Recipe, Classroom]]:
    """Every part's name, plain recipe and classroom in order, with untrained networks in the graduates' place."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, part in whole.parts.items():
            seated = resolve(part, folder)
            classroom = build_classroom(seated, data, device, mentors=teaches(part))
            yield name, seated, classroom
            if name:
                one = Learner(name, seated, classroom, 1)
                (folder / name).mkdir()
                save_student(
                    Run(folder / name), "student", one.graduate(), data, task=part.task, epoch=0, score={},
                    weights=one.weights(),
                )  # fmt: skip


def check(whole: Plan, data: DataSet, device: torch.device) -> Classroom:
    """The classroom of the last part, checked. Raises KdcliError for whatever would stop any part before its first
    step."""
    for name, part, classroom in dry_run(whole, data, device):
        if not name:
            Learner(part.method.label, part, classroom, 1)
            return classroom
    raise AssertionError("a recipe's own part comes last")


def learn(recipe: Recipe, run: Run, device: torch.device, follow: Follow, *, checked: Classroom | None = None) -> None:
    """Train a recipe's stages into `run`/stages and then its own part into `run`: what is not finished yet of them.

    checked: what `check` gave, where it was called already.
    """
    whole = plan(recipe)
    data = checked.data if checked else distill.data_of(recipe, device)
    if not distributed.on_rank0(lambda: run.begun):
        facts = distill.facts_of(checked or check(whole, data, device))
        told = {**facts, "mentors": {}, "banks": {}, "chosen": [], "stages": {name: {} for name in whole.stages}}
        distributed.on_rank0(lambda: run.start(recipe, runs.provenance("distill", recipe, **told)))
    distributed.on_rank0(run.repair)
    try:
        for name, part in whole.stages.items():
            folder = Run(run.path / FOLDER / name)
            if not distributed.on_rank0(lambda folder=folder: folder.done):
                seated = resolve(part, run.path / FOLDER)
                classroom = build_classroom(seated, data, device, mentors=teaches(part))
                session = distill.open_session(
                    {part.method.label: seated}, classroom, folder, {part.method.label: folder}
                )
                going_on = distributed.on_rank0(lambda folder=folder: folder.begun)
                if going_on:
                    distill.same_room(folder, classroom)
                else:
                    distill.start(session, "distill", classroom)
                follow(classroom, distill.go(session, resume=going_on), f"stage {name}")
        _last(recipe, whole, run, data, device, follow)
    except InterruptedRun as stopped:
        raise InterruptedRun(stopped.message, hint=f"Continue with: kdcli distill --resume {run.path}") from None


def _last(recipe: Recipe, whole: Plan, run: Run, data: DataSet, device: torch.device, follow: Follow) -> None:
    """The recipe's own part, in a folder that was laid out before its mentors were there."""
    seated = resolve(whole.last, run.path / FOLDER)
    classroom = build_classroom(seated, data, device, mentors=teaches(recipe))
    name = recipe.method.label
    session = distill.open_session({name: recipe}, classroom, run, {name: run})
    going_on = distributed.on_rank0(lambda: all(run.provenance["stages"].values()))
    if going_on:
        distill.same_room(run, classroom)
    else:
        told = {}
        for stage in whole.stages:
            one = Run(run.path / FOLDER / stage)
            told[stage] = {"recipe": one.provenance["recipe"], "epoch": one.provenance["epoch"], "score": one.score}
        distributed.on_rank0(lambda: run.amend(**distill.facts_of(classroom), stages=told))
    follow(classroom, distill.go(session, resume=going_on), name)
