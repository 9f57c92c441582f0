"""kdcli export: the student as one checked ONNX file."""

from typing import Annotated

import typer

from kdcli.cli import options as o

EXAMPLES = ("kdcli export --onnx", "kdcli export --onnx runs/my-run --batch 1 --file student.onnx")


def export(
    run: o.RunName = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="As ONNX (the format there is).")] = True,
    batch: Annotated[int | None, typer.Option(help="A fixed batch size; default: any.", min=1)] = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 18,
    file: Annotated[str | None, typer.Option(help="Where to write (default RUN/student.onnx).")] = None,
    data_root: o.Root = None,
    json: o.Json = False,
) -> None:
    """Write the student as one ONNX file, pixels in [0, 1] to logits, checked in onnxruntime before it is named."""
    from dataclasses import asdict
    from pathlib import Path

    from kdcli.cli import tables
    from kdcli.cli.resolve import subject
    from kdcli.export.onnx import export_onnx
    from kdcli.training import run as runs

    if run:
        runs.find(run)  # a run and nothing else: only its recipe says on which pictures to check the file
    what = subject(run, data=None, root=data_root, sets=None, skip_corrupt=False, device="cpu")
    assert what.run is not None
    path = Path(file) if file else what.run.path / "student.onnx"
    done = export_onnx(
        what.model, what.data.test.take(64), path, batch=batch, opset=opset, metadata=about(what.run, what.data)
    )
    if json:
        tables.as_json(asdict(done))
        return
    rows = [
        ["size", tables.size(done.size)],
        ["batch", "any" if done.dynamic else batch],
        ["opset", done.opset],
        ["checked on", f"{done.checked_on} images in onnxruntime"],
        ["same first answer %", f"{done.agreement:.2f}"],
        ["largest difference", f"{done.max_difference:.2e}"],
    ]
    tables.table([str(done.path), ""], rows)
    tables.next_line(f"kdcli bench {done.path}")


def about(run, data) -> dict[str, str]:
    """What an exported file says of itself."""
    import json

    facts = run.provenance
    return {
        "run": str(run.path), "dataset": data.name, "classes": json.dumps(data.classes), "recipe": facts["recipe"],
        **{name: f"{value:.2f}" for name, value in run.score.items()},
    }  # fmt: skip
