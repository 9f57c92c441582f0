"""kdcli bench: exported files timed side by side."""

from typing import Annotated

import typer

from kdcli.cli import options as o

EXAMPLES = ("kdcli bench", "kdcli bench student.onnx teacher.onnx --threads 1 --batch 1")


def bench(
    files: Annotated[
        list[str] | None,
        typer.Argument(help="ONNX files or exported runs; default: the newest run's.", metavar="FILE..."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images per call.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="onnxruntime's threads; 1 is what a phone app often gets.", min=1)] = 1,
    calls: Annotated[int, typer.Option(help="Timed calls of each file.", min=2)] = 200,
    json: o.Json = False,
) -> None:
    """Latency and throughput of exported files in onnxruntime, called in turn within one process."""
    from dataclasses import asdict
    from pathlib import Path

    from kdcli import bench as room, run as runs
    from kdcli.cli import show
    from kdcli.errors import WeightsError

    paths = []
    for name in files or [None]:
        if name is not None and (Path(name).is_file() or Path(name).suffix == ".onnx"):
            path, cure = Path(name), "`kdcli export --onnx` writes the newest run's student."
        else:
            run = runs.find(name)
            show.named(run, name)
            path, cure = run.path / "student.onnx", f"kdcli export --onnx {name or ''}".strip()
        if not path.is_file():
            raise WeightsError(f"{path}: no such file", hint=cure)
        paths.append(path)
    names = {str(path): path for path in paths}
    timings = room.bench(names, batch=batch, threads=threads, runs=calls)
    if json:
        show.as_json([asdict(timing) for timing in timings])
        return
    columns = ["file", "size", "p50 ms", "p90 ms", "p99 ms", "images/s"]
    rows = [
        [t.name, show.size(t.size), f"{t.p50:.3f}", f"{t.p90:.3f}", f"{t.p99:.3f}", f"{t.images_per_second:,.0f}"]
        for t in timings
    ]
    title = f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}, {calls} calls each, {timings[0].provider}"
    show.table(columns, rows, title=title)
    show.next_line("kdcli evaluate " + str(paths[0]))
