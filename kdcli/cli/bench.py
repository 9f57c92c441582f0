"""kdcli bench: exported files timed side by side."""

from typing import Annotated

import typer

from kdcli.cli import options as o

EXAMPLES = ("kdcli bench", "kdcli bench student.onnx teacher.onnx --threads 1 --batch 1")


def bench(
    files: Annotated[
        list[str] | None, typer.Argument(help="ONNX files; default: the newest run's.", metavar="[FILE]...")
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

    paths = [Path(name) / "student.onnx" if Path(name).is_dir() else Path(name) for name in files or []]
    if not paths:
        run = runs.find(None)
        paths = [run.path / "student.onnx"]
        show.errors.print(f"[dim]run[/] {run.path} [dim](the newest)[/]")
    for path in paths:
        if not path.is_file():
            raise WeightsError(f"{path}: no such file", hint="`kdcli export --onnx` writes the newest run's student.")
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
