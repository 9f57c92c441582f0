"""The bank: a cache of one mentor's outputs for the views of one training set, on disk.

A folder KDCLI_HOME/banks/<id> holds `bank.json` (the identity: everything the outputs depend on; the id is its hash),
`answers.bin` (a record for each sample and view) and `checks.bin` (a checksum of each record; 0: not stored yet).
Records are written before their checksums, so a record that a crash left half-written fails its checksum when it is
read, and is computed again.
"""

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int, Int16
from torch import Tensor

from kdcli.data.batch import moved
from kdcli.errors import DataError
from kdcli.mentors.bank_files import WITHOUT, close, hold, read_facts, record_of

CHUNK = 2**16  # records checked at once when all are
PENDING = 64 * 2**20  # bytes of new records that may wait on a device


class Bank:
    """An open bank: records are read by row, from the disk or from a copy on a device; new ones go to both.

    `samples` [n] int64, sorted, are the sample numbers it covers, in the order of its rows; None: all of them.
    Raises DataError for a folder that contradicts its bank.json or cannot be written.
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
                f"{path}: cannot be opened for reading and writing ({error.strerror})",
                hint=f"Check its permissions, or {WITHOUT}.",
            ) from None
        self.table, self.checks, self.samples = torch.from_numpy(answers), torch.from_numpy(checks), samples
        self.resident: Tensor | None = None
        self.damaged = 0  # records read that had a checksum and failed it
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._pending_bytes = 0
        weakref.finalize(self, close, hold(path))

    @property
    def id(self) -> str:
        return self.path.name

    def rows_of(self, index: Int[Tensor, " B"], view: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The row of each view, on the CPU; -1 for plain images and for samples that the bank does not cover."""
        place, covered = index, view >= 0
        if self.samples is not None:
            place = torch.searchsorted(self.samples, index).clamp(max=len(self.samples) - 1)
            covered = covered & (self.samples[place] == index)
        return torch.where(covered, place * self.views + view % self.views, -1)

    def slots_of(self, rows: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Sample numbers and view slots of rows."""
        place = rows // self.views
        return place if self.samples is None else self.samples[place], rows % self.views

    def read(
        self, rows: Int[Tensor, " B"], rows_there: Int[Tensor, " B"]
    ) -> tuple[Int16[Tensor, "B W"], Bool[Tensor, " B"]]:
        """Records on the device of `rows_there` (the same rows on the device, with 0 for -1), and, on the CPU, which of
        them are valid. Never waits for the device."""
        safe = rows.clamp(min=0)
        if self.resident is not None:
            records, valid = self.resident.index_select(0, rows_there), self._valid[safe]
        else:
            found, valid = self._look_up(safe)
            records = moved(found, rows_there.device)
        if not bool(valid.all()):
            self.damaged += int((~valid & (self.checks[safe] != 0) & (rows >= 0)).sum())
        return records, valid & (rows >= 0)

    def has(self, rows: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which rows hold a valid record; each is checked."""
        if self.resident is not None:
            return self._valid[rows.clamp(min=0)] & (rows >= 0)
        return torch.cat([self._look_up(some.clamp(min=0))[1] for some in rows.split(CHUNK)]) & (rows >= 0)

    def _look_up(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        checks, records = self.checks.index_select(0, rows), self.table.index_select(0, rows)
        return records, self.record.checksum(records, rows) == checks

    def put(self, rows: Int[Tensor, " n"], records: Int16[Tensor, "n W"]) -> None:
        """Store new records, except those of row -1. On a device they wait for `flush`, or until they are many.

        Raises DataError for outputs beyond the range of float16.
        """
        at = (rows >= 0).nonzero()[:, 0]
        if len(at) < len(rows):
            rows, records = rows[at], records.index_select(0, moved(at, records.device))
        if self.resident is not None:
            self.resident.index_copy_(0, moved(rows, records.device), records)
            self._valid[rows] = True
        self._pending.append((rows, records))
        self._pending_bytes += records.nbytes
        if records.device.type == "cpu" or self._pending_bytes > PENDING:
            self.flush()

    def flush(self) -> None:
        """Write pending records to the files. The system brings them to the disk when it chooses: records that a power
        cut loses fail their checksums."""
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        for rows, records in pending:
            records = records.cpu()
            if not bool(self.record.in_range(records).all()):
                raise DataError(
                    f"mentor {self.facts['mentor']} gave outputs that float16 cannot hold (beyond 65504, or NaN), and "
                    "a bank stores float16",
                    hint=f"{WITHOUT} runs it without a bank.",
                )
            self.table.index_copy_(0, rows, records)
            self.checks.index_copy_(0, rows, self.record.checksum(records, rows))

    def load_to(self, device: torch.device) -> None:
        """Copy the table to the device, checking each record; from now on records are read there."""
        self.resident = torch.empty_like(self.table, device=device)
        self._valid = torch.empty(self.rows, dtype=torch.bool)
        for start in range(0, self.rows, CHUNK):
            some = slice(start, min(start + CHUNK, self.rows))
            part = self.resident[some].copy_(self.table[some])
            checks = self.record.checksum(part, torch.arange(some.start, some.stop)).cpu()
            self._valid[some] = checks == self.checks[some]

    def sample(self, count: int) -> Int[Tensor, " n"]:
        """Up to `count` rows with valid records, drawn by a seed that is the bank's id."""
        stored = np.flatnonzero(self.checks.numpy())
        chosen = np.random.default_rng(int(self.id, 16)).choice(stored, min(count, len(stored)), replace=False)
        rows = torch.from_numpy(np.sort(chosen))
        return rows[self.has(rows)]

    def verify(self) -> Iterator[tuple[int, int, int]]:
        """Check every record on the disk; yields (rows checked, stored, damaged) so far."""
        stored = damaged = 0
        for rows in torch.arange(self.rows).split(CHUNK):
            there = self.checks[rows] != 0
            stored += int(there.sum())
            damaged += int((there & ~self._look_up(rows)[1]).sum())
            yield int(rows[-1]) + 1, stored, damaged
