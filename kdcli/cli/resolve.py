"""What evaluate, export and bench are pointed at: a run, an exported file or NAME@WEIGHTS, and its data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcli import recipe as recipes
from kdcli.cli import tables
from kdcli.errors import RecipeError, did_you_mean
from kdcli.export import is_exported, open_file
from kdcli.recipe import Recipe
from kdcli.system.sizes import plain
from kdcli.training import run as runs
from kdcli.training.run import Run
from kdcli.training.student import student_of


@dataclass
class Subject:
    """A model that answers pixels, the data it is asked about, and the run it came from (if it did)."""

    name: str
    model: Any
    data: Any
    run: Run | None
    task: Any


def subject(
    given: str | None, *, data: str | None, root: str | None, sets: list[str] | None, skip_corrupt: bool, device: Any
) -> Subject:
    """Resolve what the user pointed at. Raises KdcliError with the cure when nothing fits."""
    # another data set: the run's slices of its own mean nothing there
    over: dict[str, Any] = {"data.per_class": None, "data.holdout": 0.0} if data else {}
    over |= recipes.parse_set(sets or [])
    over |= {"data.name": data} if data else {}
    over |= {"data.root": root} if root else {}
    over |= {"data.skip_corrupt": True} if skip_corrupt else {}
    if given and is_exported(given):
        return _exported(given, over, device)
    if given and given.endswith(".safetensors") and Path(given).with_suffix(".toml").is_file():
        return _carded(Path(given), over, device)
    if given and not (Path(given) / "provenance.json").is_file() and not (runs.ROOT / given).is_dir():
        return _named(given, over, device)
    run = runs.find(given)
    tables.named(run, given)
    member = student_of(run)
    size = run.provenance["data"].get("image_size", member.input_size) if not data else member.input_size
    opened = _data(run.recipe.with_(**over), size, device)
    _same_classes(member.num_classes, opened, run.name)
    return Subject(f"{run.name}: {member.name}", member.to(device), opened, run, _task(run.recipe.task, opened))


def _carded(path: Path, over: dict[str, Any], device: Any) -> Subject:
    """A file of weights with its card beside it."""
    from kdcli.models import cards, checkpoint
    from kdcli.models.build import from_card

    card = cards.read_card(path.with_suffix(".toml"))
    member = from_card(card, checkpoint.load_state(path))
    opened = _data(_on_data(str(path), over), member.input_size, device)
    _same_classes(member.num_classes, opened, str(path))
    return Subject(str(path), member.to(device), opened, None, _task(card.task, opened))


def _exported(path: str, over: dict[str, Any], device: Any) -> Subject:
    """An exported file, on the data of its run if no other is named."""
    model = open_file(path)
    recipe = Recipe().with_(**over)
    if recipe.data.name is None:
        run = model.metadata.get("run", "")
        if not (Path(run) / "recipe.toml").is_file():
            raise RecipeError(f"{path}: on which data?", hint="Add --data NAME; `kdcli data ls` lists them.")
        recipe = Run(Path(run)).recipe.with_(**over)
    opened = _data(recipe, model.input_size, device)
    _same_classes(model.num_classes, opened, path)
    return Subject(path, model, opened, None, _task(model.metadata.get("task", recipe.task), opened))


def _named(spec: str, over: dict[str, Any], device: Any) -> Subject:
    """NAME[@WEIGHTS] read as a mentor is: with weights, or refused."""
    from kdcli.models import registry

    try:
        registry.resolve(spec)
    except RecipeError as error:
        known = [run.name for run in runs.every()]
        if "@" in spec or ":" in spec:
            raise
        raise RecipeError(
            f"{spec!r} is neither a run, an exported file nor a model's name",
            hint=f"{did_you_mean(spec, known) if known else error.hint} `kdcli runs ls` lists the runs; "
            "a checkpoint is named ARCHITECTURE@PATH.",
        ) from None
    member, opened = mentor_on(spec, _on_data(spec, over), device)
    return Subject(spec, member, opened, None, _task(Recipe().with_(**over).task, opened))


def mentor_on(spec: str, recipe: Recipe, device: Any) -> tuple[Any, Any]:
    """A mentor by name, and the recipe's data at the size the mentor reads."""
    from kdcli.mentors.classroom import build_classroom

    recipe = recipe.with_(**{"classroom.student": spec.partition("@")[0], "classroom.teacher": spec})
    opened = _data(recipe, None, device)
    member = build_classroom(recipe, opened, device).mentors[0]
    if member.input_size != opened.image_size and recipe.data.image_size is None:
        opened = _data(recipe, member.input_size, device)
    return member, opened


def _task(name: str, opened: Any) -> Any:
    from kdcli.tasks import TASKS

    return TASKS[name](len(opened.classes))


def _on_data(what: str, over: dict[str, Any]) -> Recipe:
    recipe = Recipe().with_(**over)
    if recipe.data.name is None:
        raise RecipeError(f"{what}: on which data?", hint="Add --data NAME; `kdcli data ls` lists them.")
    return recipe


def _data(recipe: Recipe, size: int | Sequence[int] | None, device: Any) -> Any:
    from kdcli.data import open_data

    config = recipe.data
    if size is not None and config.image_size is None:
        config = config.model_copy(update={"image_size": plain(size)})
    return open_data(config, device=device)


def _same_classes(answers: int, data: Any, where: str) -> None:
    from kdcli.errors import DataError

    if answers != len(data.classes):
        raise DataError(
            f"{where} answers {answers} classes, {data.name} has {len(data.classes)}",
            hint="Evaluate it on the data it was trained for.",
        )
