"""kdcli export: the student as one checked file."""

from typing import Annotated

import typer

from kdcli.cli import options as o
from kdcli.export import FORMATS

EXAMPLES = ("kdcli export --onnx", "kdcli export --onnx runs/my-run --batch 1 --file student.onnx")
NAMES = ", ".join(kind.name for kind in FORMATS.values())


def export(
    run: o.RunName = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Short for --format onnx.")] = False,
    format: Annotated[
        str | None, typer.Option(help=f"{NAMES}; default: by the suffix of --file, else the first.", metavar="NAME")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="A fixed batch size; default: any.", min=1)] = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 18,
    file: Annotated[str | None, typer.Option(help="Where to write (default RUN/student.onnx).")] = None,
    data_root: o.Root = None,
    json: o.Json = False,
) -> None:
    """Write the student as one file, images in [0, 1] to the task's output, checked on real images before it is named.

    An ONNX file is run in onnxruntime; it must give the answers that the student gives in torch.
    """
    from dataclasses import asdict

    from kdcli.cli import tables
    from kdcli.cli.resolve import subject
    from kdcli.errors import RecipeError
    from kdcli.training import run as runs
    from kdcli.workflows.export import export as export_student

    if onnx and format not in (None, "onnx"):
        raise RecipeError(f"--onnx and --format {format} contradict each other", hint="Give one of them.")
    name = _name(file, "onnx" if onnx else format)
    if run:
        runs.find(run)  # only a run will do: its recipe names the images to check the file on
    what = subject(run, data=None, root=data_root, sets=None, skip_corrupt=False, device="cpu")
    assert what.run is not None
    path = name if file else what.run.path / name
    done = export_student(what.model, what.data, what.task, path, run=what.run, batch=batch, opset=opset)
    if json:
        tables.as_json(asdict(done))
        return
    rows = [
        ["size", tables.size(done.size)],
        ["batch", "any" if done.dynamic else batch],
        ["opset", done.opset],
        ["checked on", f"{done.checked_on} images"],
        ["same answer %", f"{done.agreement:.2f}"],
        ["largest difference", f"{done.max_difference:.2e}"],
    ]
    tables.table([str(done.path), ""], rows)
    tables.next_line(f"kdcli bench {done.path}")


def _name(file, format):
    """`file`, else the name of the student's file. Raises RecipeError when its suffix is not the format's."""
    from pathlib import Path

    from kdcli.errors import RecipeError
    from kdcli.export import is_exported, suffix_of

    suffix = suffix_of(format)
    path = Path(file or f"student{suffix}")
    if not is_exported(path) or (format and path.suffix != suffix):
        allowed = f"{format} files end in {suffix}" if format else f"exported files end in {' or '.join(FORMATS)}"
        raise RecipeError(f"--file {file}: {allowed}", hint=f"For example `--file {path.with_suffix(suffix)}`.")
    return path
