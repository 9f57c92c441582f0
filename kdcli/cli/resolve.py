"""What evaluate, export and bench take: a run, an exported file or NAME@WEIGHTS, with its data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcli import recipe as recipes
from kdcli.cli import tables
from kdcli.data import DataSet, open_data
from kdcli.errors import DataError, RecipeError, did_you_mean
from kdcli.export import is_exported, open_file
from kdcli.models.member import Member
from kdcli.recipe import Recipe
from kdcli.system.sizes import plain
from kdcli.tasks import TASKS, Task
from kdcli.training import run as runs
from kdcli.training.run import Run
from kdcli.training.student import student_of

Device = torch.device | str


@dataclass
class Subject:
    """A model, the data it is evaluated on, and the run it came from (if it did)."""

    name: str
    model: Any  # a Member, or an exported file's runtime
    data: DataSet
    run: Run | None
    task: Task


def subject(
    given: str | None,
    *,
    data: str | None,
    root: str | None,
    sets: list[str] | None,
    skip_corrupt: bool,
    device: Device,
) -> Subject:
    """Find what the user named. Raises KdcliError with the cure when nothing fits."""
    # with other data than the run's, the run's own choice of images means nothing
    over: dict[str, Any] = {"data.per_class": None, "data.holdout": 0.0} if data else {}
    over |= recipes.parse_set(sets or [])
    over |= {"data.name": data} if data else {}
    over |= {"data.root": root} if root else {}
    over |= {"data.skip_corrupt": True} if skip_corrupt else {}
    if given and is_exported(given):
        return _exported(given, over, device)
    if given and given.endswith(".safetensors") and Path(given).with_suffix(".toml").is_file():
        return _with_card(Path(given), over, device)
    if given and not (Path(given) / "provenance.json").is_file() and not (runs.ROOT / given).is_dir():
        return _named(given, over, device)
    run = runs.find(given)
    tables.named(run, given)
    member = student_of(run)
    size = run.provenance["data"].get("image_size", plain(member.input_size)) if not data else plain(member.input_size)
    recipe = run.recipe.with_(**over)
    opened = _data(recipe, size, device)
    _same_classes(member.num_classes, opened, run.name)
    return Subject(f"{run.name}: {member.name}", member.to(device), opened, run, _task(recipe, opened))


def _with_card(path: Path, over: dict[str, Any], device: Device) -> Subject:
    """A file of weights with its card in the same folder."""
    from kdcli.models import cards, checkpoint
    from kdcli.models.build import from_card

    card = cards.read_card(path.with_suffix(".toml"))
    member = from_card(card, checkpoint.load_state(path))
    recipe = _on_data(str(path), {"task": card.task, **over})
    opened = _data(recipe, plain(member.input_size), device)
    _same_classes(member.num_classes, opened, str(path))
    return Subject(str(path), member.to(device), opened, None, _task(recipe, opened))


def _exported(path: str, over: dict[str, Any], device: Device) -> Subject:
    """An exported file, on the data of its run if no other is named."""
    model = open_file(path)
    run = Path(model.metadata.get("run", ""))
    if "data.name" in over or not (run / "recipe.toml").is_file():
        recipe = _on_data(path, {"task": model.metadata.get("task", "classify"), **over})
    else:
        recipe = Run(run).recipe.with_(**over)
    opened = _data(recipe, plain(model.input_size), device)
    _same_classes(model.num_classes, opened, path)
    return Subject(path, model, opened, None, _task(recipe, opened))


def _named(spec: str, over: dict[str, Any], device: Device) -> Subject:
    """NAME[@WEIGHTS], as a mentor is named: without weights it is refused."""
    from kdcli.models import registry

    try:
        registry.resolve(spec)
    except RecipeError as error:
        known = [run.name for run in runs.every()]
        if "@" in spec or ":" in spec:
            raise
        raise RecipeError(
            f"{spec!r} is not a run, an exported file or the name of a model",
            hint=f"{did_you_mean(spec, known) if known else error.hint} `kdcli runs ls` lists the runs; "
            "a checkpoint is named ARCHITECTURE@PATH.",
        ) from None
    recipe = _on_data(spec, over)
    member, opened = mentor_on(spec, recipe, device)
    return Subject(spec, member, opened, None, _task(recipe, opened))


def mentor_on(spec: str, recipe: Recipe, device: Device) -> tuple[Member, DataSet]:
    """A mentor by name, and the recipe's data at the mentor's input size."""
    from kdcli.mentors.classroom import build_classroom

    recipe = recipe.with_(**{"classroom.student": spec.partition("@")[0], "classroom.teacher": spec})
    opened = _data(recipe, None, device)
    member = build_classroom(recipe, opened, torch.device(device)).mentors[0]
    if member.input_size != opened.image_size and recipe.data.image_size is None:
        opened = _data(recipe, plain(member.input_size), device)
    return member, opened


def _task(recipe: Recipe, opened: DataSet) -> Task:
    return TASKS[recipe.task](len(opened.classes))


def _on_data(what: str, over: dict[str, Any]) -> Recipe:
    recipe = Recipe().with_(**over)
    if recipe.data.name is None:
        raise RecipeError(f"{what}: on which data?", hint="Add --data NAME; `kdcli data ls` lists them.")
    return recipe


def _data(recipe: Recipe, size: Any, device: Device) -> DataSet:
    config = recipe.data
    if size is not None and config.image_size is None:
        config = config.model_copy(update={"image_size": size})
    return open_data(config, task=recipe.task, device=device)


def _same_classes(classes: int, data: DataSet, where: str) -> None:
    if classes != len(data.classes):
        raise DataError(
            f"{where} has an output for {classes} classes, {data.name} has {len(data.classes)}",
            hint="Evaluate it on the data it was trained for.",
        )
