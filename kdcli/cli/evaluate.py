"""kdcli evaluate: any run, checkpoint or exported file on any data."""

from enum import StrEnum
from typing import Annotated

import typer

from kdcli.cli import options as o

EXAMPLES = ("kdcli evaluate", "kdcli evaluate student.onnx --data folder:DIR")


class SplitName(StrEnum):
    """A part of a data set."""

    TEST = "test"
    TRAIN = "train"
    HOLDOUT = "holdout"


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="A run, exported file or NAME@WEIGHTS; default: the newest run.", metavar="RUN|FILE|NAME"),
    ] = None,
    mentors: Annotated[
        bool,
        typer.Option("--mentors", help="Also print how often it agrees with each mentor.", rich_help_panel=o.CLASSROOM),
    ] = False,
    data: o.Data = None,
    split: Annotated[
        SplitName, typer.Option(help="The images to evaluate on.", rich_help_panel=o.DATA)
    ] = SplitName.TEST,
    data_root: o.Root = None,
    skip_corrupt: o.SkipCorrupt = False,
    sets: o.Set = None,
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Score, loss, calibration and every class's figure, of a run, a checkpoint or an exported file."""
    from kdcli.cli import tables
    from kdcli.cli.resolve import subject
    from kdcli.errors import DataError, RecipeError
    from kdcli.export import is_exported
    from kdcli.system import device as devices
    from kdcli.training.evaluate import report

    picked = devices.pick(device)
    what = subject(model, data=data, root=data_root, sets=sets, skip_corrupt=skip_corrupt, device=picked)
    part = {"test": what.data.test, "train": what.data.train, "holdout": what.data.holdout}[split.value]
    if part is None:
        raise DataError(f"{what.data.name} has no held-out slice", hint="--set data.holdout=0.1, or --split test.")
    teachers = {}
    if mentors:
        if what.run is None:
            raise RecipeError("--mentors needs a run: its recipe names them", hint="kdcli evaluate RUN --mentors")
        from kdcli.mentors.classroom import build_classroom
        from kdcli.workflows import stages

        teachers = {m.name: m for m in build_classroom(stages.recipe_of(what.run), what.data, picked).mentors}
    result = report(what.model, part, what.data.classes, what.task, picked, teachers)
    if json:
        tables.as_json({"model": what.name, "data": what.data.name, "split": split.value, **result.json()})
        return
    rows = [
        ["images", result.score.images],
        *[[m.title, f"{result.score[m.name]:.{2 if m.unit else 4}f}"] for m in what.task.metrics],
        *[[f"{name} {what.task.metrics[0].unit}", f"{value:.2f}"] for name, value in result.details.items()],
        *[[f"agrees with {name} %", f"{value:.2f}"] for name, value in result.agreement.items()],
    ]
    tables.table([what.name, f"{what.data.name} {split.value}"], rows)
    worst = sorted(result.per_class.items(), key=lambda item: item[1])
    if len(worst) > 20:
        worst = worst[:20]
        tables.console.print(f"[dim]the 20 hardest of {len(result.per_class)} classes; --json has all[/]")
    tables.table(["class", what.task.per_class.title], [[name, f"{value:.1f}"] for name, value in worst])
    if what.run:
        tables.next_line("kdcli export --onnx" + (f" {model}" if model else ""))
    elif model and is_exported(model):
        tables.next_line(f"kdcli bench {model}")
    else:
        task = "" if what.task.name == "classify" else f" --set task={what.task.name}"
        tables.next_line(f"kdcli distill --teacher {model} --student NAME --data {what.data.name}{task}")
