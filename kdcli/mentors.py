"""The mentors' answers to a batch: one call, whatever number of them and however they are run."""

import itertools
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float
from torch import Tensor

from kdcli.capture import Captured
from kdcli.classroom import Member
from kdcli.data import Batch
from kdcli.frozen import Frozen
from kdcli.methods.base import View

COMPILE_PAYS = 5e12  # multiply-adds still to be done: some 200 s of eager work on a core, of which a third is saved
FARTHEST = 16  # batches answered at once, at most
WORTH = 0.95  # of the time of one batch after another: less is noise


class Mentors:
    """Frozen networks that answer every batch once for all who learn from it.

    They run in inference mode at `precision` (see `Frozen`). On a CPU the batch is shared among `workers` threads
    (default: as many as torch uses), each on one core: frozen networks in eval mode answer image by image, and threads
    that need not wait for each other within a layer are faster. Answers come back in float32.

    ahead: batches answered at once in `taught`; 0 until that is decided. cuda_graph: record the pass of all mentors as
        one CUDA graph.
    """

    def __init__(
        self,
        members: list[Member],
        precision: str,
        device: torch.device,
        *,
        workers: int | None = None,
        ahead: int = 1,
        cuda_graph: bool = False,
    ) -> None:
        self.members, self.precision, self.device, self.ahead = members, precision, device, ahead
        self.frozen = [Frozen(member, precision, device) for member in members]
        if workers is None:
            workers = torch.get_num_threads() if device.type == "cpu" else 1
        self.workers = workers if members else 1
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        self._pass = Captured(self._look) if cuda_graph and members else self._look

    def answer(self, batch: Batch) -> View | None:
        """Logits [M, B, K] in float32, the teacher first; None in a classroom without mentors."""
        return View(self._answer(batch.pixels)) if self.members else None

    def taught(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, View | None]]:
        """Each batch with its answer, `ahead` batches answered at once."""
        remaining = iter(batches)
        while some := list(itertools.islice(remaining, self.ahead or 1)):
            if len(some) == 1:
                yield some[0], self.answer(some[0])
                continue
            out = self._answer(torch.cat([batch.pixels for batch in some]))
            for batch, part in zip(some, out.split([len(batch) for batch in some], dim=1), strict=True):
                yield batch, View(part)

    def compile(self, batch_size: int, names: list[str]) -> dict[str, str]:
        """Compile these mentors for batches of that size; those that could not be, with the reason."""
        size = -(-batch_size * self.ahead // self.workers)
        chosen = [one for one in self.frozen if one.member.name in names]
        told = self.pool.map(lambda one: one.compile(size), chosen) if self.workers > 1 else None
        told = list(told) if told is not None else [one.compile(size) for one in chosen]
        return {one.member.name: why for one, why in zip(chosen, told, strict=True) if why}

    def measure_ahead(self, batches: list[Batch]) -> int:
        """How many batches at once are quickest: twice as many as long as that gains, measured on these."""
        best, ahead = self._clock(batches[:1]), 1
        while 2 * ahead <= min(len(batches), FARTHEST):
            seconds = self._clock(batches[: 2 * ahead])
            if seconds > WORTH * best:
                break
            best, ahead = seconds, 2 * ahead
        return ahead

    def _clock(self, batches: list[Batch]) -> float:
        """Seconds a batch, the better of two after one to warm up."""
        pixels, times = torch.cat([batch.pixels for batch in batches]), []
        for _ in range(3):
            began = time.perf_counter()
            self._answer(pixels)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - began)
        return min(times[1:]) / len(batches)

    def _answer(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "M B K"]:
        if self.workers == 1:
            parts = [self._pass(pixels)]
        else:
            parts = list(self.pool.map(self._pass, pixels.chunk(self.workers)))
        return torch.cat(parts, dim=1)  # joined outside inference mode: a loss must be able to save it

    @torch.inference_mode()
    def _look(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "M B K"]:
        return torch.stack([one(pixels) for one in self.frozen])


def worth_compiling(members: list[Member], images: int) -> list[str]:
    """Who answers so many images that compiling is soon paid back: a rule of arithmetic, so it is always the same."""
    return [member.name for member in members if member.count()[1] * images > COMPILE_PAYS]
