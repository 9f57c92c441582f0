"""The mentors' answers to a batch: one call, whatever number of them and however they are run."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from kdcli.classroom import Member
from kdcli.data import Batch
from kdcli.data.base import moved
from kdcli.device import dtype_of
from kdcli.methods.base import View

if TYPE_CHECKING:
    from kdcli.bank import Bank

ALIKE = 16  # images a CPU's worker is given at once where answers are kept: another number gives other last bits
Answer = tuple[Tensor, Tensor | None]
"""Logits [B, K] and pooled vectors [B, D] (None unless asked for), float32."""


class Mentors:
    """Frozen networks that answer every batch once for all who learn from it.

    They run in inference mode at `precision`, in half precision with channels last. On a CPU the batch is shared among
    `workers` threads (default: as many as torch uses), each on one core: frozen networks in eval mode answer image by
    image, and threads that need not wait for each other within a layer are faster. Answers come back in float32.

    With `banks`, one for each member, answers are read from there, and networks asked only for what is not there yet;
    what is handed out went through the bank's rounding in any case. `pooled` adds penultimate vectors.
    """

    def __init__(
        self,
        members: list[Member],
        precision: str,
        device: torch.device,
        *,
        workers: int | None = None,
        banks: "Sequence[Bank]" = (),
        pooled: bool = False,
    ) -> None:
        self.members = members
        self.precision = precision
        self.device = device
        self.banks, self.pooled = banks, pooled
        dtype = dtype_of(precision)
        for member in members:
            member.requires_grad_(False).eval()
            if dtype != torch.float32:
                member.net.to(dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            if pooled:
                member.watch()
        if workers is None:
            workers = torch.get_num_threads() if device.type == "cpu" else 1
        self.workers = workers if members else 1
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def answer(self, batch: Batch) -> View | None:
        """Logits [M, B, K] in float32, the teacher first; None in a classroom without mentors."""
        if not self.members:
            return None
        if self.banks:
            answers = self._banked(batch)
        else:
            answers = self.ask(batch.pixels, range(len(self.members)), -(-len(batch) // self.workers))
        out = torch.stack([out for out, _ in answers])  # joined outside inference mode: a loss must be able to save it
        return View(out, tuple(more for _, more in answers if more is not None) if self.pooled else None)

    def ask(self, pixels: Float[Tensor, "B 3 H W"], who: Sequence[int], size: int) -> list[Answer]:
        """What some members answer live, in batches of at most `size`."""
        run = map if self.workers == 1 else self.pool.map
        parts = list(run(partial(self._look, who), pixels.split(size)))
        joined = []
        for each in zip(*parts, strict=True):
            out, pooled = zip(*each, strict=True)
            joined.append((torch.cat(out), torch.cat(pooled) if self.pooled else None))
        return joined

    def ask_alike(self, pixels: Float[Tensor, "B 3 H W"], who: Sequence[int]) -> list[Answer]:
        """As `ask`, with batches all of one size, filled up where need be: so an image's answer has the same bits
        whatever it is asked together with (on a CPU; CUDA's libraries promise no such thing)."""
        size = ALIKE if self.device.type == "cpu" else len(pixels)
        short = -len(pixels) % size
        filled = torch.cat([pixels, pixels[:1].expand(short, -1, -1, -1)]) if short else pixels
        return [
            (out[: len(pixels)], pooled if pooled is None else pooled[: len(pixels)])
            for out, pooled in self.ask(filled, who, size)
        ]

    def _look(self, who: Sequence[int], pixels: Float[Tensor, "B 3 H W"]) -> list[Answer]:
        with torch.inference_mode():
            if not self.pooled:
                return [(self.members[n](pixels).float(), None) for n in who]
            return [(out.float(), pooled.float()) for out, pooled in (self.members[n].look(pixels) for n in who)]

    def _banked(self, batch: Batch) -> list[Answer]:
        """Read what the banks have, ask for the rest and put it there; the device is not waited for."""
        rows = self.banks[0].rows_of(*batch.names())  # one training set: its rows are the same in every bank
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
            for n, (out, pooled) in zip(who, self.ask_alike(pixels, who), strict=True):
                records = self.banks[n].record.pack(out, pooled, target)
                self.banks[n].put(rows[at], records)
                found[n][0].index_copy_(0, here, records)
        return [bank.record.unpack(some, batch.target) for bank, (some, _) in zip(self.banks, found, strict=True)]

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
