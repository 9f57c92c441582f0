"""Threads that decode images ahead of the training; how many there are changes no pixel."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from kdcli.data.batch import Device, moved
from kdcli.data.dataset import as_float
from kdcli.data.decode import Decoder, corrupt
from kdcli.data.parts import Part
from kdcli.data.views import PLAIN, Views
from kdcli.system import distributed

PIECE = 16  # images per task of a thread
Answer = tuple[Tensor, list[str]]


class Readers:
    """`workers` threads (0: the calling thread) that decode the images of all parts; started at first use.

    Threads, not processes: decoding, resizing and augmenting release Python's global lock, so processes (their own, or
    a DataLoader's) were no faster, and they need pipes, shared memory and care for those that are killed.
    """

    def __init__(self, parts: tuple[Part, ...], views: Views, workers: int) -> None:
        self.views, self.workers = views, workers
        self.decoder = Decoder(parts, views)
        self._threads: ThreadPoolExecutor | None = None

    def batches(self, part: int, index: Tensor, view: Tensor, size: int, device: Device) -> Iterator[Tensor]:
        """The named views, `size` at a time, as float pixels [<=size,3,H,W] on `device`, in order.

        Raises DataError naming images that do not decode.
        """
        ahead = 1 + -(-2 * self.workers * PIECE // size) if self.workers else 0
        waiting: deque[tuple[Tensor, list[Future[Answer]]]] = deque()
        try:
            for rows, views in zip(index.cpu().split(size), view.cpu().split(size), strict=True):
                waiting.append((views, self._submit(part, rows, views)))
                if len(waiting) > ahead:
                    yield self._take(*waiting.popleft(), device)
            while waiting:
                yield self._take(*waiting.popleft(), device)
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()

    def _submit(self, part: int, rows: Tensor, view: Tensor) -> list[Future[Answer]]:
        pieces = zip(rows.split(PIECE), view.split(PIECE), strict=True)
        if not self.workers:
            return [_finished(self.decoder(part, some.tolist(), names)) for some, names in pieces]
        if self._threads is None:
            self._threads = _pool(self.workers)
        return [self._threads.submit(self.decoder, part, some.tolist(), names) for some, names in pieces]

    def _take(self, view: Tensor, futures: list[Future[Answer]], device: Device) -> Tensor:
        answers = [future.result() for future in futures]
        if wrong := [text for _, errors in answers for text in errors]:
            raise corrupt(wrong)
        pixels = moved(torch.cat([piece for piece, _ in answers]), device)
        return as_float(pixels if self.views.preset.on_host else self.views.apply(pixels, moved(view, device)))

    def decoded(self, part: int, threads: int) -> Tensor:
        """Every plain image of a part [N,3,H,W] uint8. Raises DataError naming all images that do not decode."""
        count = len(self.decoder.parts[part])
        out = torch.empty((count, 3, *self.views.size), dtype=torch.uint8)
        errors: list[str] = []

        def some(start: int) -> None:
            rows = list(range(start, min(start + PIECE, count)))
            pixels, wrong = self.decoder(part, rows, torch.full((len(rows),), PLAIN))
            out[start : start + PIECE] = pixels
            errors.extend(wrong)

        with _pool(threads) as pool:
            list(pool.map(some, range(0, count, PIECE)))
        if errors:
            raise corrupt(sorted(errors))
        return out


class Files:
    """A store: one part's images, decoded when needed."""

    def __init__(self, readers: Readers, part: int) -> None:
        self.readers, self.part, self.views = readers, part, readers.views

    def batches(self, index: Tensor, view: Tensor, size: int, device: Device) -> Iterator[Tensor]:
        return self.readers.batches(self.part, index, view, size, device)

    def strong(self) -> "Files":
        """The same images as strong views, decoded a second time by other threads."""
        return Files(Readers(self.readers.decoder.parts, self.views.strong(), self.readers.workers), self.part)


def cores() -> int:
    """Cores this process may use: the machine's, divided by its ranks."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(usable // distributed.local_ranks(), 1)


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that use one core each: images do not wait for each other."""
    return ThreadPoolExecutor(max(threads, 1), "decode", initializer=torch.set_num_threads, initargs=(1,))


def _finished(answer: Answer) -> Future[Answer]:
    future: Future[Answer] = Future()
    future.set_result(answer)
    return future
