"""What evaluate, export and bench are pointed at: a run, an ONNX file or NAME@WEIGHTS, and its data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcli import recipe as recipes, run as runs
from kdcli.cli import show
from kdcli.errors import RecipeError, WeightsError, did_you_mean
from kdcli.recipe import Recipe
from kdcli.run import Run


@dataclass
class Subject:
    """A model that answers pixels, the data it is asked about, and the run it came from (if it did)."""

    name: str
    model: Any
    data: Any
    run: Run | None


def subject(
    given: str | None, *, data: str | None, root: str | None, sets: list[str] | None, skip_corrupt: bool, device: Any
) -> Subject:
    """Resolve what the user pointed at. Raises KdcliError with the cure when nothing fits."""
    over: dict[str, Any] = {**recipes.parse_set(sets or [])}
    over |= {"data.name": data} if data else {}
    over |= {"data.root": root} if root else {}
    over |= {"data.skip_corrupt": True} if skip_corrupt else {}
    if given and given.endswith(".onnx"):
        return _onnx(given, over, device)
    if given and not (Path(given) / "provenance.json").is_file() and not (runs.ROOT / given).is_dir():
        return _named(given, over, device)
    run = runs.find(given)
    show.named(run, given)
    member = student_of(run)
    opened = _data(run.recipe.with_(**over), member.input_size, device)
    _same_classes(member.num_classes, opened, run.name)
    return Subject(f"{run.name}: {member.name}", member.to(device), opened, run)


def student_of(run: Run) -> Any:
    """A finished run's student. Raises WeightsError when it is not finished or its files are broken."""
    from kdcli import weights, zoo
    from kdcli.classroom import from_card

    if not (run.path / "student.safetensors").is_file():
        raise WeightsError(
            f"{run.path} has no student yet: it was stopped before its end", hint=f"kdcli distill --resume {run.path}"
        )
    return from_card(zoo.read_card(run.path / "student.toml"), weights.load_state(run.path / "student.safetensors"))


def _onnx(path: str, over: dict[str, Any], device: Any) -> Subject:
    from kdcli.export.onnx import OnnxModel

    model = OnnxModel(Path(path))
    recipe = Recipe().with_(**over)
    if recipe.data.name is None:
        run = model.metadata.get("run", "")
        if not (Path(run) / "recipe.toml").is_file():
            raise RecipeError(f"{path}: on which data?", hint="Add --data NAME; `kdcli data ls` lists them.")
        recipe = Run(Path(run)).recipe.with_(**over)
    opened = _data(recipe, model.input_size, device)
    _same_classes(model.num_classes, opened, path)
    return Subject(path, model, opened, None)


def _named(spec: str, over: dict[str, Any], device: Any) -> Subject:
    """NAME[@WEIGHTS] read as a mentor is: with weights, or refused."""
    from kdcli import names
    from kdcli.classroom import seat

    try:
        names.resolve(spec)
    except RecipeError as error:
        known = [run.name for run in runs.every()]
        if "@" in spec or ":" in spec:
            raise
        raise RecipeError(
            f"{spec!r} is neither a run, an ONNX file nor a model's name",
            hint=f"{did_you_mean(spec, known) if known else error.hint} `kdcli runs ls` lists the runs.",
        ) from None
    recipe = Recipe().with_(**{"classroom.student": spec.partition("@")[0], "classroom.teacher": spec, **over})
    if recipe.data.name is None:
        raise RecipeError(f"{spec}: on which data?", hint="Add --data NAME; `kdcli data ls` lists them.")
    opened = _data(recipe, None, device)
    return Subject(spec, seat(recipe, opened, device).mentors[0], opened, None)


def _data(recipe: Recipe, size: int | None, device: Any) -> Any:
    from kdcli.data import open_data

    config = recipe.data
    if size is not None and config.image_size is None:
        config = config.model_copy(update={"image_size": size})
    return open_data(config, device=device)


def _same_classes(answers: int, data: Any, where: str) -> None:
    from kdcli.errors import DataError

    if answers != len(data.classes):
        raise DataError(
            f"{where} answers {answers} classes, {data.name} has {len(data.classes)}",
            hint="Evaluate it on the data it was trained for.",
        )
