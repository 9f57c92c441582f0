"""A recipe's stages: trainings before its own, in order, each an ordinary run inside the run's folder."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcli import methods
from kdcli.data import DataSet
from kdcli.errors import RecipeError
from kdcli.mentors.classroom import Classroom, build_classroom
from kdcli.models import cards
from kdcli.recipe import NAMED, STAGE, Recipe, staged
from kdcli.system import distributed
from kdcli.training import run as runs
from kdcli.training.learner import Learner
from kdcli.training.run import Run
from kdcli.training.student import save_student
from kdcli.workflows import groups
from kdcli.workflows.groups import Follow, Group

FOLDER = "stages"  # in the run's
LAST = ""  # the name of the recipe's own part, which comes after all stages


@dataclass
class Plan:
    """What is trained, in order."""

    stages: dict[str, Recipe]  # only those that a later part needs
    last: Recipe  # the recipe's own part, with the classroom it has after the stages

    @property
    def parts(self) -> dict[str, Recipe]:
        return {**self.stages, LAST: self.last}


def plan(recipe: Recipe) -> Plan:
    """A recipe's stages, including those that its method expands to."""
    last = methods.find(recipe.method.name).expand(recipe)
    every, wanted = last.stages(), set(_named(last))
    for name, one in reversed(every.items()):
        if name in wanted:
            if one.method.options.get("assistants"):
                raise RecipeError(
                    f"stage {name}: method.assistants: a stage cannot have stages",
                    hint='Give the stage another method, such as method = { name = "kd" }.',
                )
            wanted |= set(_named(one))
    return Plan({name: one for name, one in every.items() if name in wanted}, last)


def _named(recipe: Recipe) -> list[str]:
    return staged(recipe.classroom, mentors=needs_mentors(recipe))


def needs_mentors(recipe: Recipe) -> bool:
    """Whether the recipe's method learns from mentors."""
    return methods.find(recipe.method.name).teachers > 0


def resolve(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe without stages: what finished stages in `folder` trained is named by architecture and path."""
    mentors = needs_mentors(recipe)
    over: dict[str, Any] = {"stage": []}
    for key in NAMED if mentors else NAMED[:1]:
        spec = getattr(recipe.classroom, key)
        over[f"classroom.{key}"] = [_located(one, folder) for one in spec] if key == "peers" else _located(spec, folder)
    return recipe.with_(**over) if staged(recipe.classroom, mentors=mentors) else recipe


def recipe_of(run: Run) -> Recipe:
    """A run's recipe without stages: its mentors are those that the stages trained."""
    return resolve(plan(run.recipe).last, run.path / FOLDER)


def _located(spec: str | None, folder: Path) -> str | None:
    if spec is None or not spec.startswith(STAGE):
        return spec
    where = folder / spec.removeprefix(STAGE)
    return f"{cards.read_card(where / 'student.toml').architecture}@{where}"


def dry_run(whole: Plan, data: DataSet, device: torch.device) -> Iterator[tuple[str, Recipe, Classroom]]:
    """Every part's name, recipe and classroom in order, with untrained stand-ins for what earlier stages will train."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, part in whole.parts.items():
            resolved = resolve(part, folder)
            classroom = build_classroom(resolved, data, device, mentors=needs_mentors(part))
            yield name, resolved, classroom
            if name:
                one = Learner(name, resolved, classroom, 1)
                (folder / name).mkdir()
                save_student(
                    Run(folder / name), "student", one.graduate(), data, task=part.task, epoch=0, score={},
                    weights=one.weights(),
                )  # fmt: skip


def check(whole: Plan, data: DataSet, device: torch.device) -> Classroom:
    """The classroom of the last part. Raises KdcliError for whatever would stop any part before its first step."""
    for name, part, classroom in dry_run(whole, data, device):
        if not name:
            Learner(part.method.label, part, classroom, 1)
            return classroom
    raise AssertionError("a recipe's own part comes last")


def train(
    recipe: Recipe,
    run: Run,
    device: torch.device,
    follow: Follow,
    *,
    resume: bool = False,
    begin: Callable[[], None] = lambda: None,
    kind: str = "distill",
    keep: set[int] | None = None,
) -> None:
    """Train a recipe's stages into `run`/stages and then its own part into `run`: those that are not finished yet.

    begin: called after all checks and before anything is written, unless the run began before.
    """
    whole, name = plan(recipe), recipe.method.label
    label = (recipe.classroom.student or "").partition("@")[0] if kind == "train" else name
    last = Group(label, {name: recipe}, run, {name: run}, run, kind, keep or set())
    if not whole.stages:
        classroom = groups.open_classroom(recipe, device, mentors=needs_mentors(recipe))
        return groups.train_group(last, classroom, follow, resume=resume, begin=lambda _: begin())

    data = groups.data_of(recipe, device)
    if not distributed.on_rank0(lambda: run.begun):
        facts = groups.facts_of(check(whole, data, device))
        begin()
        facts |= {"mentors": {}, "banks": {}, "chosen": [], "stages": {stage: {} for stage in whole.stages}}
        distributed.on_rank0(lambda: run.start(recipe, runs.provenance("distill", recipe, **facts)))
    distributed.on_rank0(run.repair)
    for stage, part in whole.stages.items():
        folder = Run(run.path / FOLDER / stage)
        done, begun = distributed.on_rank0(lambda folder=folder: (folder.done, folder.begun))
        if done:
            continue
        resolved = resolve(part, run.path / FOLDER)
        group = Group(f"stage {stage}", {part.method.label: resolved}, folder, {part.method.label: folder}, folder)
        classroom = build_classroom(resolved, data, device, mentors=needs_mentors(part))
        groups.train_group(group, classroom, follow, resume=begun)
    classroom = build_classroom(resolve(whole.last, run.path / FOLDER), data, device, mentors=needs_mentors(recipe))
    begun = distributed.on_rank0(lambda: all(run.provenance["stages"].values()))
    return groups.train_group(
        last, classroom, follow, resume=begun, begin=lambda classroom: _record_stages(run, whole, classroom)
    )


def _record_stages(run: Run, whole: Plan, classroom: Classroom) -> None:
    """Complete the provenance, which was written before the stages had trained the mentors."""

    def amend() -> None:
        found = {}
        for name in whole.stages:
            stage = Run(run.path / FOLDER / name)
            found[name] = {
                "recipe": stage.provenance["recipe"],
                "epoch": stage.provenance["epoch"],
                "score": stage.score,
            }
        run.amend(**groups.facts_of(classroom), stages=found)

    distributed.on_rank0(amend)
