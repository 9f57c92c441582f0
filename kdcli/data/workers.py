"""Who decodes the images: threads or processes that work ahead of the training; which of them does changes no pixel."""

import contextlib
import multiprocessing
import multiprocessing.util
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdcli.data.batch import Device, moved
from kdcli.data.dataset import as_float
from kdcli.data.decode import Answer, Decoder, Part, corrupt
from kdcli.data.views import PLAIN, Views
from kdcli.errors import DataError

PIECE = 16  # images that a reader is given at a time
LIVES = 3  # processes that one piece may cost
Kind = Literal["threads", "processes"]


@dataclass
class Request:
    """A batch that was asked for: its views, and its pieces' answers when they come."""

    view: Tensor
    answers: list[Callable[[], Answer]]
    asked: list[Future[Answer]]


class Readers:
    """`workers` threads or processes (0: whoever asks) that decode the images of all parts; started at the first need.

    A process that is killed costs time and nothing else: a new one does its work again.
    """

    def __init__(self, parts: tuple[Part, ...], views: Views, kind: Kind, workers: int) -> None:
        self.views, self.workers = views, workers
        self.kind: Kind = kind
        self.decoder = Decoder(parts, views)
        self.processes: list[Worker] = []
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def batches(self, part: int, index: Tensor, view: Tensor, size: int, device: Device) -> Iterator[Tensor]:
        """The views asked for, `size` at a time, as float pixels [<=size,3,S,S] on `device`, in order.

        Raises DataError naming images that do not decode, and when processes are killed again and again.
        """
        index, view = index.cpu(), view.cpu()
        alone = not self.workers or (self.kind == "processes" and len(index) <= size)  # not worth waking them
        ahead = 0 if alone else 1 + -(-2 * self.workers * PIECE // size)
        waiting: deque[Request] = deque()
        try:
            for rows, views in zip(index.split(size), view.split(size), strict=True):
                waiting.append(self._ask(part, rows, views, alone))
                if len(waiting) > ahead:
                    yield self._take(waiting.popleft(), device)
            while waiting:
                yield self._take(waiting.popleft(), device)
        finally:
            for request in waiting:
                for answer in request.asked:
                    answer.cancel()

    def _ask(self, part: int, rows: Tensor, views: Tensor, alone: bool) -> Request:
        pieces = [(part, r.tolist(), v.tolist()) for r, v in zip(rows.split(PIECE), views.split(PIECE), strict=True)]
        if alone:
            return Request(views, [lambda piece=piece: self.decoder(*piece) for piece in pieces], [])
        work = self.decoder if self.kind == "threads" else self._elsewhere
        asked = [self._pool().submit(work, *piece) for piece in pieces]
        return Request(views, [future.result for future in asked], asked)

    def _take(self, request: Request, device: Device) -> Tensor:
        answers = [answer() for answer in request.answers]
        if wrong := [text for _, errors in answers for text in errors]:
            raise corrupt(wrong)
        pixels, view = torch.cat([torch.from_numpy(piece) for piece, _ in answers]), request.view
        if self.views.preset.on_host:
            if not (request.asked and self.kind == "processes"):
                pixels = self.views.finish(pixels, view)
            return as_float(moved(pixels, device))
        return as_float(self.views.apply(moved(pixels, device), moved(view, device)))

    def _pool(self) -> ThreadPoolExecutor:
        """The threads that decode, or that each wait for a process which does."""
        if self._threads is None:
            if self.kind == "processes":
                for _ in range(self.workers):
                    self._idle.put(self._hired())
                multiprocessing.util.Finalize(self, _end, (self.processes,), exitpriority=1)  # else exit waits for them
            self._threads = ThreadPoolExecutor(
                self.workers, "decode", initializer=torch.set_num_threads, initargs=(1,)
            )  # each on one core: images do not wait for each other
        return self._threads

    def _hired(self) -> "Worker":
        self.processes.append(Worker(self.decoder))
        return self.processes[-1]

    def _elsewhere(self, part: int, rows: list[int], views: list[int]) -> Answer:
        """A piece decoded by a process, and by another one if that is killed."""
        for _ in range(LIVES):
            worker = self._idle.get()
            try:
                answer = worker.ask(part, rows, views)
            except BaseException as error:  # it has ended, or would give its answer to the next question
                worker.process.kill()
                self.processes.remove(worker)
                self._idle.put(self._hired())
                if not isinstance(error, EOFError | OSError):
                    raise
                print("warning: a process that decodes images was killed; a new one takes over", file=sys.stderr)
            else:
                self._idle.put(worker)
                return answer
        raise DataError(
            f"{LIVES} processes that decode images were killed, one after another, over the same images, the first "
            f"of them {self.decoder.parts[part].where(rows[0])}",
            hint="Mostly a lack of memory: --set data.workers=1, or --set data.readers=threads.",
        )

    def decoded(self, part: int, threads: int) -> Tensor:
        """Every plain image of a part [N,3,S,S] uint8. Raises DataError naming all images that do not decode."""
        count, size = len(self.decoder.parts[part]), self.views.size
        out = torch.empty((count, 3, size, size), dtype=torch.uint8)
        errors: list[str] = []

        def some(start: int) -> None:
            rows = list(range(start, min(start + PIECE, count)))
            pixels, wrong = self.decoder(part, rows, [PLAIN] * len(rows))
            out[start : start + PIECE] = torch.from_numpy(pixels)
            errors.extend(wrong)

        with ThreadPoolExecutor(max(threads, 1), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(some, range(0, count, PIECE)))
        if errors:
            raise corrupt(sorted(errors))
        return out


class Files:
    """A store: one part's images, decoded when asked for."""

    def __init__(self, readers: Readers, part: int) -> None:
        self.readers, self.part, self.views = readers, part, readers.views

    def batches(self, index: Tensor, view: Tensor, size: int, device: Device) -> Iterator[Tensor]:
        return self.readers.batches(self.part, index, view, size, device)

    def strong(self) -> "Files":
        """The same images as strong views, decoded once more by readers of their own."""
        parts, views = self.readers.decoder.parts, self.views.strong()
        return Files(Readers(parts, views, self.readers.kind, self.readers.workers), self.part)


# --- processes --------------------------------------------------------------------------------------------------------

_starting = threading.Lock()


class Worker:
    """A process that decodes what it is asked for, one piece after another."""

    def __init__(self, decoder: Decoder) -> None:
        self.size = decoder.views.size
        with _starting:  # else another one, forked meanwhile, would hold this pipe's other end open
            self.pipe, theirs = multiprocessing.Pipe()
            self.process = multiprocessing.Process(target=_serve, args=(decoder, theirs), name="decode")
            self.process.start()
            theirs.close()

    def ask(self, part: int, rows: list[int], views: list[int]) -> Answer:
        """Raises EOFError or OSError when the process has ended."""
        self.pipe.send((part, rows, views))
        errors = self.pipe.recv()
        pixels = np.empty((len(rows), 3, self.size, self.size), dtype=np.uint8)
        self.pipe.recv_bytes_into(pixels.reshape(-1).data)  # not through shared memory: a container has 64 MB of it
        return pixels, errors


def _end(processes: list[Worker]) -> None:
    for worker in processes:
        worker.process.kill()


def _serve(decoder: Decoder, pipe: Connection) -> None:
    """What a process does. SIGINT and SIGTERM sent to all are the main one's to answer: it saves, then ends these."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            part, rows, views = pipe.recv()
            pixels, errors = decoder(part, rows, views)
            if decoder.views.preset.on_host:  # in threads it would draw from the generator that the training draws from
                pixels = decoder.views.finish(torch.from_numpy(pixels), torch.tensor(views)).numpy()
            pipe.send(errors)
            pipe.send_bytes(pixels.reshape(-1).data)


def _leave_with_parent() -> None:
    """A main process that is killed ends no others, and each forked one holds open what the next is waiting at."""
    number, parent = os.getppid(), multiprocessing.parent_process()
    while os.getppid() == number and parent is not None and parent.is_alive():
        time.sleep(0.5)
    os._exit(1)
