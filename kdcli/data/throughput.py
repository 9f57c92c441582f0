"""Images per second of the training stream, by data set, measured in turn."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from kdcli.data.batch import Batch, Device
from kdcli.data.dataset import DataSet
from kdcli.data.opening import open_data
from kdcli.data.stream import Stream
from kdcli.data.workers import Files
from kdcli.recipe import DataConfig

WARM_UP = 1 / 3  # untimed start of each window, relative to it
SEED = 0  # of the order in each round


@dataclass(frozen=True)
class Rate:
    """The speed of one data set's training stream: images per second over all rounds."""

    data: str
    readers: str  # threads, "main process" or "memory"
    workers: int
    batch: int
    images_per_second: float  # the median round's
    low: float
    high: float


def rates(
    configs: list[DataConfig],
    *,
    task: str = "classify",
    batch: int,
    device: Device = "cpu",
    seconds: float = 2.0,
    rounds: int = 3,
) -> list[Rate]:
    """Measure each data set's training stream (decode, augment, move to `device`) without training.

    After one round to warm up, each of `rounds` gives every data set a window of `seconds`, in random order, so that a
    slow phase of the machine affects all of them. Files are then read from memory, if they fit there.
    """
    data = [open_data(config, task, device=device) for config in configs]
    streams = [_endless(one, config.seed, batch, device) for one, config in zip(data, configs, strict=True)]
    spent: list[list[float]] = [[] for _ in data]
    rng = np.random.default_rng(SEED)
    for number in range(-1, rounds):
        for n in rng.permutation(len(data)):
            rate = _window(streams[n], seconds)
            if number >= 0:
                spent[n].append(rate)
    return [
        Rate(one.name, *_readers(one), batch, statistics.median(measured), min(measured), max(measured))
        for one, measured in zip(data, spent, strict=True)
    ]


def _endless(data: DataSet, seed: int, batch: int, device: Device) -> Iterator[Batch]:
    stream = Stream(data, min(batch, len(data.train)), seed=seed, device=device)
    return (one for epoch in count() for one in stream.epoch(epoch))


def _readers(data: DataSet) -> tuple[str, int]:
    store = data.train.store
    if not isinstance(store, Files):
        return "memory", 0
    return "threads" if store.readers.workers else "main process", store.readers.workers


def _window(batches: Iterator[Batch], seconds: float) -> float:
    """Images per second over `seconds`, after an untimed start."""
    for lasts in (WARM_UP * seconds, seconds):
        images, began = 0, time.perf_counter()
        while True:
            batch = next(batches)
            images += len(batch)
            if time.perf_counter() - began >= lasts:
                batch.images[0, 0, 0, 0].item()  # waits for the device, so that the clock is right
                break
    return images / (time.perf_counter() - began)
