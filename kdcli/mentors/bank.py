"""A bank: one mentor's answers to the views of one training set, on disk, found by everything they depend on.

A folder KDCLI_HOME/banks/<id> holds `bank.json` (the identity in words; the id is its hash), `answers.bin` (one record
for each sample and view) and `checks.bin` (a checksum of each record; 0: not there yet). Records are written before
their checksums, so whatever a crash leaves half-written is found out when it is read, and answered anew.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int, Int16
from torch import Tensor

from kdcli.data.batch import moved
from kdcli.errors import DataError
from kdcli.mentors.bank_files import WITHOUT, hold, read_facts, record_of

CHUNK = 2**16  # records looked at together where all are
PENDING = 64 * 2**20  # bytes of new records a device may keep before they are fetched


class Bank:
    """One opened bank: records by row, from the disk or from a copy on the device; new ones go to both.

    `samples` [n] int64 (sorted) are the numbers of the samples it covers, in the order of its rows; None: all of them.
    Raises DataError for a folder that is not what its bank.json says.
    """

    def __init__(self, path: Path, samples: Int[Tensor, " n"] | None = None) -> None:
        self.path, self.facts = path, read_facts(path)
        identity = self.facts["identity"]
        self.views, self.record = int(identity["views"]), record_of(identity)
        self.rows = int(identity["samples"]) * self.views
        try:
            answers = np.memmap(path / "answers.bin", np.int16, "r+", shape=(self.rows, self.record.words))
            checks = np.memmap(path / "checks.bin", np.int32, "r+", shape=(self.rows,))
        except OSError as error:
            raise DataError(
                f"{path}: cannot be opened to be read and written ({error.strerror})", hint=f"Check it, or {WITHOUT}."
            ) from None
        self._maps = answers, checks
        self.table, self.checks = torch.from_numpy(answers), torch.from_numpy(checks)
        self.samples, self._place = samples, None
        if samples is not None:
            self._place = torch.full((int(samples.max()) + 1,), -1)
            self._place[samples] = torch.arange(len(samples))
        self.resident: Tensor | None = None
        self.damaged = 0  # records that were there and not whole, when asked for
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._waiting = 0  # bytes of them
        self._lock = hold(path)

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def filled(self) -> float:
        """Share of the records that are there."""
        return int(self.checks.count_nonzero()) / self.rows

    def rows_of(self, index: Int[Tensor, " B"], view: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The row of each view, on the CPU; -1 for plain images and for samples that the bank does not cover."""
        plain, place = view < 0, index
        if self._place is not None:
            inside = index.masked_fill(plain, 0).clamp(max=len(self._place) - 1)
            place = self._place[inside].masked_fill(inside < index, -1)
        return torch.where(plain | (place < 0), -1, place * self.views + view % self.views)

    def names_of(self, rows: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Sample numbers and slots of rows."""
        place = rows // self.views
        return place if self.samples is None else self.samples[place], rows % self.views

    def read(
        self, rows: Int[Tensor, " B"], there: Int[Tensor, " B"]
    ) -> tuple[Int16[Tensor, "B W"], Bool[Tensor, " B"]]:
        """The records of some rows on the device of `there` (the same rows, -1 as 0), and, on the CPU, which of them
        are known; the others hold nothing of use. No device is waited for."""
        safe = rows.clamp(min=0)
        if self.resident is not None:
            records, known = self.resident.index_select(0, there), self._known[safe]
        else:
            found, known = self._look_up(safe)
            records = moved(found, there.device)
        lacking = ~known
        if bool(lacking.any()):
            self.damaged += int((lacking & (self.checks[safe] != 0) & (rows >= 0)).sum())
        return records, known & (rows >= 0)

    def has(self, rows: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which of the rows are known; each record is checked."""
        if self.resident is not None:
            return self._known[rows.clamp(min=0)] & (rows >= 0)
        return torch.cat([self._look_up(some.clamp(min=0))[1] for some in rows.split(CHUNK)]) & (rows >= 0)

    def _look_up(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        checks, records = self.checks.index_select(0, rows), self.table.index_select(0, rows)
        return records, self.record.checksum(records, rows) == checks

    def put(self, rows: Int[Tensor, " n"], records: Int16[Tensor, "n W"]) -> None:
        """Keep new records; those of row -1 have no place. On a device they wait for `flush`, unless they are many.

        Raises DataError for answers that do not fit a record.
        """
        at = (rows >= 0).nonzero()[:, 0]
        if len(at) < len(rows):
            rows, records = rows[at], records.index_select(0, moved(at, records.device))
        if self.resident is not None:
            self.resident.index_copy_(0, moved(rows, records.device), records)
            self._known[rows] = True
        self._pending.append((rows, records))
        self._waiting += records.nbytes
        if records.device.type == "cpu" or self._waiting > PENDING:
            self.flush()

    def flush(self) -> None:
        """Write what waits on the device. The system carries it to the disk in its own time: what a power cut takes
        away fails its checksum."""
        waiting, self._pending, self._waiting = self._pending, [], 0
        for rows, records in waiting:
            records = records.cpu()
            if not bool(self.record.sound(records).all()):
                raise DataError(
                    f"{self.facts['mentor']} answers with numbers that a bank's 16 bits cannot hold (beyond 65504, or "
                    "none at all)",
                    hint=f"--set classroom.bank_top=8 banks log-probabilities instead of logits; or {WITHOUT}.",
                )
            self.table.index_copy_(0, rows, records)
            self.checks.index_copy_(0, rows, self.record.checksum(records, rows))

    def sync(self) -> None:
        """Flush, and wait until the disk has it all."""
        self.flush()
        for file in self._maps:
            file.flush()

    def reside(self, device: torch.device) -> None:
        """Copy the table to the device, each record checked on the way; from now on it is read there."""
        self.resident = torch.empty_like(self.table, device=device)
        self._known = torch.empty(self.rows, dtype=torch.bool)
        for start in range(0, self.rows, CHUNK):
            some = slice(start, min(start + CHUNK, self.rows))
            part = self.resident[some].copy_(self.table[some])
            good = self.record.checksum(part, torch.arange(some.start, some.stop)).cpu() == self.checks[some]
            self._known[some] = good

    def sample(self, count: int) -> Int[Tensor, " n"]:
        """Up to `count` rows that are known, chosen by a hash."""
        there = np.flatnonzero(self.checks.numpy())
        chosen = np.random.default_rng(int(self.id, 16)).choice(there, min(count, len(there)), replace=False)
        rows = torch.from_numpy(np.sort(chosen))
        return rows[self.has(rows)]

    def verify(self) -> Iterator[tuple[int, int, int]]:
        """Check every record on the disk: (rows looked at, filled, damaged) so far."""
        filled = damaged = 0
        for rows in torch.arange(self.rows).split(CHUNK):
            there = self.checks[rows] != 0
            filled += int(there.sum())
            damaged += int((there & ~self._look_up(rows)[1]).sum())
            yield int(rows[-1]) + 1, filled, damaged
