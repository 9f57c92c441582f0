"""Images per second of the training stream, by data set and by who decodes, measured in turn."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from kdcli.data.batch import Batch, Device
from kdcli.data.sources import open_data
from kdcli.data.stream import Stream
from kdcli.data.workers import Files
from kdcli.recipe import DataConfig

WARM_UP = 1 / 3  # of a window, untimed before each
SEED = 0  # of the order in each round


@dataclass(frozen=True)
class Rate:
    """How fast one way of reading one data set was: images per second over all rounds."""

    data: str
    readers: str  # threads, processes, "main process" or "memory"
    workers: int
    batch: int
    images_per_second: float  # the median round's
    low: float
    high: float


def rates(
    configs: list[DataConfig], *, batch: int, device: Device = "cpu", seconds: float = 2.0, rounds: int = 3
) -> list[Rate]:
    """Measure each data set's training stream (decode, augment, move to `device`), nothing trained.

    Where images are decoded as they are asked for, threads and processes are both tried, unless the config names one.
    One round warms up everything; then each of `rounds` gives every way, in an order drawn anew, a window of `seconds`,
    so that a slow second of the machine favours none. Files are read from memory by then, if they fit there.
    """
    ways = [way for config in configs for way in _ways(config, batch, device)]
    spent: list[list[float]] = [[] for _ in ways]
    rng = np.random.default_rng(SEED)
    for number in range(-1, rounds):
        for n in rng.permutation(len(ways)):
            rate = _window(ways[n][1], seconds)
            if number >= 0:
                spent[n].append(rate)
    return [
        Rate(*told, batch, statistics.median(all_of), min(all_of), max(all_of))
        for (told, _), all_of in zip(ways, spent, strict=True)
    ]


def _ways(config: DataConfig, batch: int, device: Device) -> Iterator[tuple[tuple[str, str, int], Iterator[Batch]]]:
    kinds = ("threads", "processes") if config.readers == "auto" else (config.readers,)
    for kind in kinds:
        data = open_data(config.model_copy(update={"readers": kind}), device=device)
        stream = Stream(data, min(batch, len(data.train)), seed=config.seed, device=device)
        endless = (one for epoch in count() for one in stream.epoch(epoch))
        store = data.train.store
        if not isinstance(store, Files):
            yield (data.name, "memory", 0), endless
            return
        if store.readers.workers == 0:
            yield (data.name, "main process", 0), endless
            return
        yield (data.name, kind, store.readers.workers), endless


def _window(batches: Iterator[Batch], seconds: float) -> float:
    """Images per second for so long, after a third of that untimed."""
    for lasts in (WARM_UP * seconds, seconds):
        images, began = 0, time.perf_counter()
        while True:
            batch = next(batches)
            images += len(batch)
            if time.perf_counter() - began >= lasts:
                batch.images[0, 0, 0, 0].item()  # waits for the device, so that the clock is true
                break
    return images / (time.perf_counter() - began)
