"""The mentors' outputs for a batch: one call, however many there are and whatever runs them."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from kdcli.data.batch import Batch, moved
from kdcli.mentors.bank import Bank
from kdcli.mentors.frozen import Frozen
from kdcli.models.member import FEATURES, NOTHING, Member
from kdcli.models.outputs import Output
from kdcli.system.cuda_graph import Captured

FIXED_BATCH = 16  # images per forward pass on a CPU where outputs are stored: other counts change the last bits
COMPILE_PAYS = 1e14  # multiply-adds left: about an hour on one core, of which compiling saves some minutes
MOST_AHEAD = 16  # batches in one look-ahead, at most
WORTH = 0.95  # a longer look-ahead must take at most this share of the time; a smaller gain is noise

Tree = TypeVar("Tree")


@dataclass
class Answers:
    """All mentors' outputs for a batch, the teacher first.

    outputs: of the batch-norm-folded networks, or of whatever form serves every learner.
    unfused: of networks whose features can be read, which round differently; None where `outputs` serves everyone.
    """

    outputs: list[Output]
    unfused: list[Output] | None = None

    def of(self, needs: frozenset[str]) -> list[Output]:
        """The outputs for a learner with these needs, the same bits as if it trained alone."""
        return self.unfused if self.unfused is not None and needs & FEATURES else self.outputs


class Mentors:
    """Frozen networks that answer every batch once, for all learners.

    They run in inference mode at `precision` (see `Frozen`) and return float32. On a CPU the batch is split over
    `workers` threads (default: torch's number), each on one core: networks in eval mode process every image by itself,
    and threads that do not synchronise within a layer are faster.

    banks: one for each member, or none. Outputs are read from there and computed only if missing; both are rounded to
        float16.
    needs: what learners read besides logits: pooled vectors (which banks may hold), maps (which need live networks).
    logits_only: some learners need only logits; they get the batch-norm-folded networks, the others get `unfused`
        outputs with features.
    ahead: batches per look-ahead in `answer_ahead`, without banks; 0: not chosen yet.
    cuda_graph: capture the forward passes of all mentors as one CUDA graph (logits only, without banks).
    """

    def __init__(
        self,
        members: list[Member],
        precision: str,
        device: torch.device,
        *,
        workers: int | None = None,
        banks: Sequence[Bank] = (),
        needs: frozenset[str] = NOTHING,
        logits_only: bool = False,
        ahead: int = 1,
        cuda_graph: bool = False,
    ) -> None:
        self.members, self.precision, self.device = members, precision, device
        self.banks, self.needs, self.ahead = banks, needs & FEATURES, ahead
        self.unfused = None
        if logits_only and self.needs and not banks:
            self.unfused, self.needs = Mentors(members, precision, device, workers=workers, needs=needs), NOTHING
        if needs & {"maps", "pre"}:  # they take the memory that a look-ahead needs
            self.ahead = 1
        self.frozen = [Frozen(member, precision, device, needs=self.needs) for member in members]
        if workers is None:
            workers = torch.get_num_threads() if device.type == "cpu" else 1
        self.workers = workers if members else 1
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        graphed = cuda_graph and members and not banks and not needs & FEATURES
        self._captured = Captured(self._stack) if graphed else None

    def answer(self, batch: Batch) -> Answers:
        """All mentors' outputs in float32; an empty list in a classroom without mentors."""
        if not self.members:
            return Answers([])
        found = Answers(self._banked(batch)) if self.banks else self._live(batch.images)
        if batch.strong is not None:
            strong = self._live(batch.strong)
            for outputs, others in ((found.outputs, strong.outputs), (found.unfused, strong.unfused)):
                for output, other in zip(outputs or [], others or [], strict=True):
                    output.strong = other
        return found

    def answer_ahead(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Answers]]:
        """Each batch with its outputs, `ahead` batches in one forward pass."""
        remaining = iter(batches)
        while some := list(itertools.islice(remaining, 1 if self.banks else self.ahead or 1)):
            if len(some) == 1 or not self.members or some[0].strong is not None:
                yield from ((batch, self.answer(batch)) for batch in some)
                continue
            together, start = self._live(torch.cat([batch.images for batch in some])), 0
            for batch in some:
                rows = slice(start, start + len(batch))
                unfused = None if together.unfused is None else rows_of(together.unfused, rows)
                yield batch, Answers(rows_of(together.outputs, rows), unfused)
                start += len(batch)

    def compile(self, batch_size: int, names: list[str]) -> dict[str, str]:
        """Compile these mentors for batches of that size; returns those that could not be, with the reason."""
        size = FIXED_BATCH if self.banks else -(-batch_size * self.ahead // self.workers)
        chosen = [one for one in self.frozen if one.member.name in names]
        run = self.pool.map if self.workers > 1 else map
        reasons = list(run(lambda one: one.compile(size), chosen))
        return {one.member.name: why for one, why in zip(chosen, reasons, strict=True) if why}

    def measure_ahead(self, batches: list[Batch]) -> int:
        """The fastest look-ahead, measured on these batches: doubled as long as that is faster."""
        best, ahead = self._seconds(batches[:1]), 1
        while 2 * ahead <= min(len(batches), MOST_AHEAD):
            seconds = self._seconds(batches[: 2 * ahead])
            if seconds > WORTH * best:
                break
            best, ahead = seconds, 2 * ahead
        return ahead

    def _seconds(self, batches: list[Batch]) -> float:
        """Seconds per batch: the faster of two passes after a warm-up."""
        images, times = torch.cat([batch.images for batch in batches]), []
        for _ in range(3):
            began = time.perf_counter()
            self._live(images)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - began)
        return min(times[1:]) / len(batches)

    def _live(self, images: Float[Tensor, "B 3 H W"]) -> Answers:
        if self._captured is not None:
            return Answers([Output(out) for out in self._captured(images).clone()])  # the next replay overwrites it
        outputs = self.run(images, range(len(self.members)), -(-len(images) // self.workers))
        return Answers(outputs, None if self.unfused is None else self.unfused._live(images).outputs)

    def run(self, images: Float[Tensor, "B 3 H W"], which: Sequence[int], size: int) -> list[Output]:
        """Live outputs of some members, in batches of at most `size`."""
        each = map if self.workers == 1 else self.pool.map
        parts = list(each(partial(self._forward, which), images.split(size)))
        return parts[0] if len(parts) == 1 else joined(parts)

    def run_fixed_batch(self, images: Float[Tensor, "B 3 H W"], which: Sequence[int]) -> list[Output]:
        """As `run`, padded to one fixed batch size, so that an image's output is bitwise independent of its neighbours.

        On a CPU; CUDA's libraries promise no such thing.
        """
        size = FIXED_BATCH if self.device.type == "cpu" else len(images)
        short = -len(images) % size
        padded = torch.cat([images, images[:1].expand(short, -1, -1, -1)]) if short else images
        return rows_of(self.run(padded, which, size), slice(0, len(images)))

    def _forward(self, which: Sequence[int], images: Float[Tensor, "B 3 H W"]) -> list[Output]:
        return [self.frozen[n](images) for n in which]

    @torch.inference_mode()
    def _stack(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "M B K"]:
        return torch.stack([one(images).out for one in self.frozen])

    def _banked(self, batch: Batch) -> list[Output]:
        """Read what the banks have, compute the rest and store it; nothing waits for the device."""
        rows = self.banks[0].rows_of(*batch.on_host())  # one training set: its rows are the same in every bank
        rows_there = moved(rows.clamp(min=0), self.device)
        found = [bank.read(rows, rows_there) for bank in self.banks]
        missing: dict[bytes, list[int]] = {}  # mostly the same rows in every bank, whose mentors then run together
        for n, (_, valid) in enumerate(found):
            if not bool(valid.all()):
                missing.setdefault(valid.numpy().tobytes(), []).append(n)
        for which in missing.values():
            at = (~found[which[0]][1]).nonzero()[:, 0]
            there = moved(at, self.device)
            outputs = self.run_fixed_batch(batch.images.index_select(0, there), which)
            for n, output in zip(which, outputs, strict=True):
                records = self.banks[n].record.pack(output.out, output.pooled)
                self.banks[n].put(rows[at], records)
                found[n][0].index_copy_(0, there, records)
        return [Output(*bank.record.unpack(records)) for bank, (records, _) in zip(self.banks, found, strict=True)]

    def flush(self) -> None:
        """Write records that wait on the device to the banks' files."""
        for bank in self.banks:
            bank.flush()

    def bank_warnings(self) -> list[str]:
        """What went wrong with the banks during the training."""
        return [
            f"{bank.damaged} damaged record{'s' * (bank.damaged > 1)} of bank {bank.id} ({bank.facts['mentor']}) "
            f"{'were' if bank.damaged > 1 else 'was'} computed again"
            for bank in dict.fromkeys(self.banks)
            if bank.damaged
        ]


def rows_of(tree: Tree, rows: slice) -> Tree:
    """Some images of outputs: any pytree of tensors, cut along dimension 0."""
    return tree_map(lambda x: x[rows] if isinstance(x, Tensor) else x, tree)


def joined(parts: Sequence[list[Output]]) -> list[Output]:
    """The outputs of parts of a batch as those of the whole."""
    return tree_map(lambda *xs: torch.cat(xs) if isinstance(xs[0], Tensor) else xs[0], *parts)


def worth_compiling(members: list[Member], images: int) -> list[str]:
    """The mentors that answer so many images that compiling pays back: by arithmetic, so the choice is reproducible."""
    return [member.name for member in members if member.count()[1] * images > COMPILE_PAYS]
