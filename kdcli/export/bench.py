"""Latency and throughput of exported files, timed in alternation: what slows the machine slows all of them."""

import gc
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdcli.errors import KdcliError
from kdcli.export import Runtime, open_file

SEED = 0  # of the images and of the order in each round
MIN_ROUNDS = 10  # a time limit ends no bench earlier: fewer give no percentiles


@dataclass(frozen=True)
class Timing:
    """The times of one file. Milliseconds are per call, and a call is one batch."""

    name: str
    path: Path
    p50: float  # ms
    p90: float
    p99: float
    images_per_second: float  # images over the time of all timed calls
    threads: int
    batch: int
    runs: int  # timed calls
    provider: str
    size: int  # bytes


def bench(
    models: dict[str, Path],
    *,
    batch: int = 1,
    threads: int | None = None,
    warmup: int = 20,
    runs: int = 200,
    seconds: float | None = None,
) -> list[Timing]:
    """Time the exported files of `models` (name -> path) on the CPU; results in the order given.

    Every file is first called `warmup` times untimed. Then come `runs` rounds: each calls every file once, in an order
    drawn for each round from a fixed seed, so that a slow second of the machine, or a file's warm cache, favours none
    and ratios are fair. `seconds` ends the rounds early, after at least 10 (or `runs`, when fewer). `threads` is set
    on every session; None is torch's count. Images are random: time does not depend on them.

    Raises KdcliError for a batch that a file with a fixed batch does not take and for numbers out of range;
    WeightsError (exit 3) for a file that cannot be read.
    """
    if not models:
        raise KdcliError("bench: no files to time", hint="Name one or more: kdcli bench student.onnx teacher.onnx")
    limits = {
        "batch": (batch, 1),
        "threads": (1 if threads is None else threads, 1),
        "warmup": (warmup, 0),
        "runs": (runs, 1),
    }
    for name, (value, low) in limits.items():
        if value < low:
            raise KdcliError(
                f"bench: {name} = {value}; it must be {low} or more", hint=f"For example `--{name} {max(low, 1)}`."
            )
    threads = torch.get_num_threads() if threads is None else threads
    loaded = {name: open_file(path, threads=threads) for name, path in models.items()}
    for name, model in loaded.items():
        if model.batch not in (None, batch):
            raise KdcliError(
                f"{name} ({model.path}) takes batches of {model.batch} only, not {batch}",
                hint=f"Use `--batch {model.batch}`, or export it again without a fixed batch.",
            )
    rng = np.random.default_rng(SEED)
    images = {name: rng.random((batch, 3, *model.input_size), np.float32) for name, model in loaded.items()}
    times = _rounds(loaded, images, rng, warmup, runs, seconds)
    out = []
    for name, model in loaded.items():
        p50, p90, p99 = np.percentile(times[name], [50, 90, 99]).tolist()
        done = len(times[name])
        rate = batch * done / max(sum(times[name]) / 1e3, 1e-12)
        out.append(Timing(name, model.path, p50, p90, p99, rate, threads, batch, done, model.provider, model.size))
    return out


def _rounds(
    loaded: dict[str, Runtime],
    images: dict[str, np.ndarray],
    rng: np.random.Generator,
    warmup: int,
    runs: int,
    seconds: float | None,
) -> dict[str, list[float]]:
    """Milliseconds of every timed call, by name."""
    times: dict[str, list[float]] = {name: [] for name in loaded}
    names = list(loaded)
    gc_was_on = gc.isenabled()
    gc.disable()  # a collection would be charged to whichever file it fell on
    try:
        start = 0.0
        for number in range(-warmup, runs):
            if number == 0:
                start = time.perf_counter()
            if number >= MIN_ROUNDS and seconds is not None and time.perf_counter() - start >= seconds:
                break
            for i in rng.permutation(len(names)):
                name = names[i]
                before = time.perf_counter_ns()
                loaded[name].run(images[name])
                after = time.perf_counter_ns()
                if number >= 0:
                    times[name].append((after - before) / 1e6)
    finally:
        if gc_was_on:
            gc.enable()
    return times
