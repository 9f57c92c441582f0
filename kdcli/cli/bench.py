"""kdcli bench: exported files, or data sets, timed side by side."""

from typing import Annotated

import typer

from kdcli.cli import options as o

EXAMPLES = ("kdcli bench", "kdcli bench --data folder:images,pack:images.pack")


def bench(
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Exported files, or runs that were exported; default: the newest.", metavar="FILE..."),
    ] = None,
    data: o.Data = None,
    batch: Annotated[int | None, typer.Option(help="Images at a time (default 1; with --data 64).", min=1)] = None,
    threads: Annotated[int, typer.Option(help="onnxruntime's threads; 1 is what a phone app often gets.", min=1)] = 1,
    calls: Annotated[int, typer.Option(help="Timed calls of each file.", min=2)] = 200,
    seconds: Annotated[float, typer.Option(help="With --data: length of each of three windows.", min=0.01)] = 2.0,
    sets: o.Set = None,
    data_root: o.Root = None,
    skip_corrupt: o.SkipCorrupt = False,
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Latency and throughput of exported files, called in turn within one process.

    With --data (several, separated by commas): images per second of each one's training stream instead.
    """
    from dataclasses import asdict
    from pathlib import Path

    from kdcli.cli import tables
    from kdcli.errors import RecipeError, WeightsError
    from kdcli.export import is_exported, student_file
    from kdcli.export.bench import bench as time_files
    from kdcli.training import run as runs

    if data:
        if files:
            raise RecipeError("bench: exported files or --data, not both", hint="Time them one after the other.")
        return _feed(data, batch or 64, seconds, sets, data_root, skip_corrupt, device, json)

    paths = []
    for name in files or [None]:
        if name is not None and (Path(name).is_file() or is_exported(name)):
            path, cure = Path(name), "`kdcli export --onnx` writes the newest run's student."
        else:
            run = runs.find(name)
            tables.named(run, name)
            path, cure = student_file(run.path), f"kdcli export --onnx {name or ''}".strip()
        if not path.is_file():
            raise WeightsError(f"{path}: no such file", hint=cure)
        paths.append(path)
    names = {str(path): path for path in paths}
    batch = batch or 1
    timings = time_files(names, batch=batch, threads=threads, runs=calls)
    if json:
        tables.as_json([asdict(timing) for timing in timings])
        return
    columns = ["file", "size", "p50 ms", "p90 ms", "p99 ms", "images/s"]
    rows = [
        [t.name, tables.size(t.size), f"{t.p50:.3f}", f"{t.p90:.3f}", f"{t.p99:.3f}", f"{t.images_per_second:,.0f}"]
        for t in timings
    ]
    title = (
        f"batch {batch or 1}, {threads} thread{'s' if threads > 1 else ''}, {calls} calls each, {timings[0].provider}"
    )
    tables.table(columns, rows, title=title)
    tables.next_line("kdcli evaluate " + str(paths[0]))


def _feed(data, batch, seconds, sets, root, skip_corrupt, device, json):
    """Images per second of the training stream."""
    import re
    from dataclasses import asdict

    from kdcli.cli import tables
    from kdcli.data.sources import SOURCES, packable
    from kdcli.data.throughput import rates
    from kdcli.recipe import Recipe, parse_set
    from kdcli.system import device as devices

    over = {**parse_set(sets or []), "data.root": root, "data.skip_corrupt": skip_corrupt}
    names = re.split(rf",(?=(?:{'|'.join(SOURCES)})\b)", data)  # a path may hold commas
    recipes = [Recipe().with_(**{**over, "data.name": name}) for name in names]
    picked = devices.pick(device)
    measured = rates([r.data for r in recipes], task=recipes[0].task, batch=batch, device=picked, seconds=seconds)
    if json:
        tables.as_json([asdict(rate) for rate in measured])
        return
    rows = [
        [r.data, r.readers, r.workers, f"{r.images_per_second:,.0f}", f"{r.low:,.0f} to {r.high:,.0f}"]
        for r in measured
    ]
    title = f"training stream, batch {batch}, three windows of {seconds:g} s, to {devices.describe(picked)}"
    tables.table(["data", "read by", "workers", "images/s", "windows"], rows, title=title, left=2)
    best = max(measured, key=lambda rate: rate.images_per_second)
    if len(names) == 1 and packable(names[0]):
        tables.next_line(f"kdcli data pack --data {names[0]}")
    else:
        tables.next_line(f"kdcli train --model NAME --data {best.data}")
