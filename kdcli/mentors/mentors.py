"""The mentors' answers to a batch: one call, whatever number of them and however they are run."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from kdcli.data import Batch
from kdcli.data.dataset import moved
from kdcli.mentors.classroom import NOTHING, READ, Member
from kdcli.mentors.frozen import Frozen
from kdcli.methods.base import View
from kdcli.system.cuda_graph import Captured

if TYPE_CHECKING:
    from kdcli.mentors.bank import Bank

ALIKE = 16  # images a CPU's worker is given at once where answers are kept: another number gives other last bits
COMPILE_PAYS = 1e14  # multiply-adds still to be done: an hour or so on a core, of which compiling saves some minutes
FARTHEST = 16  # batches answered at once, at most
WORTH = 0.95  # of the time of one batch after another: less is noise


class Mentors:
    """Frozen networks that answer every batch once for all who learn from it.

    They run in inference mode at `precision` (see `Frozen`). On a CPU the batch is shared among `workers` threads
    (default: as many as torch uses), each on one core: frozen networks in eval mode answer image by image, and threads
    that need not wait for each other within a layer are faster. Answers come back in float32.

    With `banks`, one for each member, answers are read from there, and networks asked only for what is not there yet;
    what is handed out went through the bank's rounding in any case. `needs`, of methods, says what else than logits is
    read of them: pooled vectors (which banks may have too), maps (which need live networks). With `plain` there are
    learners beside who need logits alone, and get what they would get by themselves: the rest is the answer's `deep`.

    ahead: batches answered at once in `taught` where there are no banks; 0 until that is decided.
    cuda_graph: record the pass of all mentors as one CUDA graph (logits alone, without banks).
    """

    def __init__(
        self,
        members: list[Member],
        precision: str,
        device: torch.device,
        *,
        workers: int | None = None,
        banks: "Sequence[Bank]" = (),
        needs: frozenset[str] = NOTHING,
        plain: bool = False,
        ahead: int = 1,
        cuda_graph: bool = False,
    ) -> None:
        self.members, self.precision, self.device = members, precision, device
        self.banks, self.needs, self.ahead = banks, needs & READ, ahead
        self.deeper = None
        if plain and self.needs and not banks:
            self.deeper, self.needs = Mentors(members, precision, device, workers=workers, needs=needs), NOTHING
        if needs & {"maps", "pre"}:  # they fill the memory that looking ahead would take
            self.ahead = 1
        self.frozen = [Frozen(member, precision, device, needs=self.needs) for member in members]
        if workers is None:
            workers = torch.get_num_threads() if device.type == "cpu" else 1
        self.workers = workers if members else 1
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        self._recorded = Captured(self._stack) if cuda_graph and members and not banks and not needs & READ else None

    def answer(self, batch: Batch) -> View | None:
        """Logits [M, B, K] in float32, the teacher first; None in a classroom without mentors."""
        if not self.members:
            return None
        view = self._view(self._banked(batch)) if self.banks else self._live(batch.pixels)
        if batch.strong is not None:
            view.strong = self._live(batch.strong)
        return view

    def taught(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, View | None]]:
        """Each batch with its answer, `ahead` batches answered at once."""
        remaining = iter(batches)
        while some := list(itertools.islice(remaining, 1 if self.banks else self.ahead or 1)):
            if len(some) == 1 or not self.members or some[0].strong is not None:
                yield from ((batch, self.answer(batch)) for batch in some)
                continue
            view = self._live(torch.cat([batch.pixels for batch in some]))
            start = 0
            for batch in some:
                yield batch, view.of_mentors(slice(start, start + len(batch)))
                start += len(batch)

    def compile(self, batch_size: int, names: list[str]) -> dict[str, str]:
        """Compile these mentors for batches of that size; those that could not be, with the reason."""
        size = ALIKE if self.banks else -(-batch_size * self.ahead // self.workers)
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
            self._live(pixels)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - began)
        return min(times[1:]) / len(batches)

    def _live(self, pixels: Float[Tensor, "B 3 H W"]) -> View:
        if self._recorded is not None:
            return View(self._recorded(pixels).clone())  # the next batch is answered in the same place
        view = self._view(self.ask(pixels, range(len(self.members)), -(-len(pixels) // self.workers)))
        if self.deeper is not None:
            view.deep = self.deeper._live(pixels)
        return view

    def _view(self, answers: list[View]) -> View:
        out = torch.stack([one.out for one in answers])  # joined outside inference mode: a loss must be able to save it
        vectors = tuple(one.vectors for one in answers) if "pooled" in self.needs else None
        maps = tuple(one.stages for one in answers) if self.needs & {"maps", "pre"} else None
        return View(out, vectors, maps)

    def ask(self, pixels: Float[Tensor, "B 3 H W"], who: Sequence[int], size: int) -> list[View]:
        """What some members answer live, in batches of at most `size`."""
        run = map if self.workers == 1 else self.pool.map
        parts = list(run(partial(self._look, who), pixels.split(size)))
        return [_joined(each) for each in zip(*parts, strict=True)]

    def ask_alike(self, pixels: Float[Tensor, "B 3 H W"], who: Sequence[int]) -> list[View]:
        """As `ask`, with batches all of one size, filled up where need be: so an image's answer has the same bits
        whatever it is asked together with (on a CPU; CUDA's libraries promise no such thing)."""
        size = ALIKE if self.device.type == "cpu" else len(pixels)
        short = -len(pixels) % size
        filled = torch.cat([pixels, pixels[:1].expand(short, -1, -1, -1)]) if short else pixels
        asked = self.ask(filled, who, size)
        return [
            View(one.out[: len(pixels)], one.vectors[: len(pixels)] if one.pooled is not None else None)
            for one in asked
        ]

    def _look(self, who: Sequence[int], pixels: Float[Tensor, "B 3 H W"]) -> list[View]:
        return [self.frozen[n](pixels) for n in who]

    @torch.inference_mode()
    def _stack(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "M B K"]:
        return torch.stack([one(pixels).out for one in self.frozen])

    def _banked(self, batch: Batch) -> list[View]:
        """Read what the banks have, ask for the rest and put it there; the device is not waited for."""
        rows = self.banks[0].rows_of(*batch.on_host())  # one training set: its rows are the same in every bank
        there = moved(rows.clamp(min=0), self.device)
        found = [bank.read(rows, there) for bank in self.banks]
        lacking: dict[bytes, list[int]] = {}  # mostly all lack the same, and are asked together
        for n, (_, known) in enumerate(found):
            if not bool(known.all()):
                lacking.setdefault(known.numpy().tobytes(), []).append(n)
        for who in lacking.values():
            at = (~found[who[0]][1]).nonzero()[:, 0]
            here = moved(at, self.device)
            pixels, target = batch.pixels.index_select(0, here), batch.target.index_select(0, here)
            for n, one in zip(who, self.ask_alike(pixels, who), strict=True):
                pooled = one.vectors if one.pooled is not None else None
                records = self.banks[n].record.pack(one.out, pooled, target)
                self.banks[n].put(rows[at], records)
                found[n][0].index_copy_(0, here, records)
        return [
            View(*bank.record.unpack(some, batch.target)) for bank, (some, _) in zip(self.banks, found, strict=True)
        ]

    def flush(self) -> None:
        """Write what the banks still keep on the device."""
        for bank in self.banks:
            bank.flush()

    def words(self) -> list[str]:
        """What is to be told of the banks at the end."""
        return [
            f"{bank.damaged} damaged answer{'s' * (bank.damaged > 1)} of bank {bank.id} ({bank.facts['mentor']}) "
            f"{'were' if bank.damaged > 1 else 'was'} made anew"
            for bank in dict.fromkeys(self.banks)
            if bank.damaged
        ]


def _joined(parts: Sequence[View]) -> View:
    """One member's answers to parts of a batch as one; of what lies in memory already nothing is copied."""
    if len(parts) == 1:
        return parts[0]
    pooled = torch.cat([one.vectors for one in parts]) if parts[0].pooled is not None else None
    taps = parts[0].maps
    maps = {tap: torch.cat([one.stages[tap] for one in parts]) for tap in taps} if isinstance(taps, dict) else None
    return View(torch.cat([one.out for one in parts]), pooled, maps)


def worth_compiling(members: list[Member], images: int) -> list[str]:
    """Who answers so many images that compiling is soon paid back: a rule of arithmetic, so it is always the same."""
    return [member.name for member in members if member.count()[1] * images > COMPILE_PAYS]
