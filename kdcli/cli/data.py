"""kdcli data: the available data sets, and a large folder of images packed into one file."""

import contextlib
import signal
from typing import Annotated

import typer

from kdcli.cli import options as o

app = typer.Typer(no_args_is_help=True, help="Data sets: list them, pack a folder.")


@app.command("ls", epilog="Examples:\n\nkdcli data ls\n\nkdcli data ls --data-root images --json")
def ls(data_root: o.Root = None, json: o.Json = False) -> None:
    """List the data sets that kdcli knows and whether they are there."""
    from kdcli.cli import tables
    from kdcli.data import available
    from kdcli.system.paths import data_root as where

    found = available(data_root)
    if json:
        tables.as_json(found)
        return
    rows = [[f["name"], "here" if f["present"] else "not here", f["images"], f["classes"], f["where"]] for f in found]
    tables.table(["name", "state", "images", "classes", "where"], rows, left=2)
    tables.line("data root", f"{where(data_root)} (--data-root or KDCLI_DATA)")
    tables.next_line("kdcli train --model NAME --data folder:DIR")


@app.command(
    "pack",
    epilog="Examples:\n\nkdcli data pack --data folder:images\n\n"
    "kdcli data pack --data imagenet --file imagenet.pack --skip-corrupt",
)
def pack(
    data: o.Data = None,
    file: Annotated[str | None, typer.Option(help="Where to write (default: DIR.pack next to the folder).")] = None,
    size: Annotated[int, typer.Option(help="Short side in pixels that larger images are reduced to.", min=8)] = 256,
    quality: Annotated[int, typer.Option(help="JPEG quality of images that are not copied.", min=1, max=100)] = 90,
    data_root: o.Root = None,
    skip_corrupt: o.SkipCorrupt = False,
    json: o.Json = False,
) -> None:
    """Pack a folder of images into one memory-mapped file, which is read faster; the folder's mentors still fit."""
    from dataclasses import asdict
    from time import perf_counter

    from rich.progress import track

    from kdcli.cli import tables
    from kdcli.data import packing
    from kdcli.data.sources import packable
    from kdcli.errors import RecipeError
    from kdcli.recipe import DataConfig

    if not data or not packable(data):
        raise RecipeError(
            f"--data {data}: only folders of image files can be packed", hint="--data folder:DIR or imagenet[:DIR]"
        )
    began = perf_counter()
    config = DataConfig(name=data, root=data_root, skip_corrupt=skip_corrupt)
    quiet = json or not tables.console.is_terminal
    with _stoppable():
        done, notes = packing(
            config, file, size=size, quality=quality,
            track=lambda images: images if quiet else track(images, "packing", console=tables.console),
        )  # fmt: skip
    seconds = perf_counter() - began
    if json:
        tables.as_json({**asdict(done), "seconds": seconds})
        return
    tables.notes(notes)
    if done.skipped:
        tables.line("left out", f"{len(done.skipped)} unreadable: {', '.join(done.skipped[:5])}")
    rows = [["images", done.images], ["copied unchanged", done.copied], ["before", tables.size(done.before)],
            ["after", tables.size(done.after)], ["images/s", f"{done.images / seconds:,.0f}"]]  # fmt: skip
    tables.table([str(done.path), ""], rows)
    tables.next_line(f"kdcli bench --data {data},pack:{done.path}")


@contextlib.contextmanager
def _stoppable():
    """SIGTERM as Ctrl-C within the block, so that the half-written file is removed."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread, where signals cannot be caught
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
