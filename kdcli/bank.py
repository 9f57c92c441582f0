"""A bank: one mentor's answers to the views of one training set, on disk, found by everything they depend on.

A folder KDCLI_HOME/banks/<id> holds `bank.json` (the identity in words; the id is its hash), `answers.bin` (one record
for each sample and view) and `checks.bin` (a checksum of each record; 0: not there yet). Records are written before
their checksums, so whatever a crash leaves half-written is found out when it is read, and answered anew.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Int16
from torch import Tensor

from kdcli.data.base import moved
from kdcli.errors import DataError, RecipeError
from kdcli.files import write_text
from kdcli.home import home
from kdcli.record import Record

try:
    import fcntl
except ImportError:  # Windows, which lets nobody remove a file that is open
    fcntl = None

FORMAT = 1
CHUNK = 2**16  # records looked at together where all are
ZEROS = 2**24  # bytes written at once to reserve them
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
PENDING = 64 * 2**20  # bytes of new records a device may keep before they are fetched
STALE = 60.0  # seconds after which a folder nobody holds is no longer being made
WITHOUT = "--set classroom.bank=false"


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


# --- banks as folders -------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where the banks lie."""
    return home() / "banks"


def id_of(identity: dict[str, Any]) -> str:
    """The first 16 hexadecimal digits of an identity's sha256: a bank's name."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def record_of(identity: dict[str, Any]) -> Record:
    return Record(identity["classes"], identity["top"], identity["pooled"])


def bytes_of(identity: dict[str, Any]) -> int:
    """What a whole bank takes, on disk or on a device."""
    return identity["samples"] * identity["views"] * (2 * record_of(identity).words + 4)


def make(identity: dict[str, Any], **about: str) -> Path:
    """An empty bank, all of its space reserved: a disk that fills up later cannot stop a training that writes to it.

    Raises DataError when there is too little room.
    """
    path, size = folder() / id_of(identity), bytes_of(identity)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    facts = {"identity": identity, **about, "bytes": size, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    checks = 4 * identity["samples"] * identity["views"]
    _sweep()
    try:
        temporary.mkdir(parents=True)
        lock = hold(temporary)
        if shutil.disk_usage(temporary).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _reserve(temporary / "answers.bin", size - checks)
        _reserve(temporary / "checks.bin", checks)
        write_text(temporary / "bank.json", json.dumps(facts, indent=1))
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():  # where it is, another process was quicker
                raise
        del lock
    except OSError as error:
        there = folder() if folder().is_dir() else home()
        free = amount(shutil.disk_usage(there).free) if there.is_dir() else "nothing"
        raise DataError(
            f"cannot make the bank {path} of {amount(size)}: {error.strerror} ({free} free)",
            hint="Free some space (`kdcli bank ls` shows banks), choose another place by KDCLI_HOME, make it smaller "
            f"with --set data.views=8 or --set classroom.bank_top=8, or do without: {WITHOUT}.",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _reserve(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # macOS and Windows have no such call, some file systems neither
            if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
                raise
            for start in range(0, size, ZEROS):
                file.write(bytes(min(ZEROS, size - start)))
            os.fsync(file.fileno())


def hold(path: Path) -> Any:
    """A lock on a folder that others may share but that keeps it from being removed, for as long as it is kept."""
    if fcntl is None:
        return None
    with contextlib.suppress(OSError):  # a file system without locks
        return _Lock(path, fcntl.LOCK_SH)


class _Lock:
    """A folder's advisory lock, given back with this object."""

    handle = -1

    def __init__(self, path: Path, kind: int) -> None:
        assert fcntl is not None
        self.handle = os.open(path, os.O_RDONLY)
        fcntl.flock(self.handle, kind | fcntl.LOCK_NB)

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)


def in_use(path: Path) -> bool:
    """Whether some process (this one too) holds the folder."""
    if fcntl is None:
        return False
    try:
        _Lock(path, fcntl.LOCK_EX)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _sweep() -> None:
    """Remove what a process that was killed while it made a bank has left."""
    for path in folder().glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if fcntl is not None and time.time() - path.stat().st_mtime > STALE and not in_use(path):
                shutil.rmtree(path, ignore_errors=True)


def read_facts(path: Path) -> dict[str, Any]:
    """A bank's bank.json, checked against its folder's name and its files' sizes.

    Raises DataError (cure: remove it) when they contradict each other or a file is missing.
    """
    cure = f"Remove it with `kdcli bank rm {path.name}`: it is made anew when needed; or {WITHOUT}."
    try:
        facts = json.loads((path / "bank.json").read_text(encoding="utf-8"))
        identity = facts["identity"]
        name, size = id_of(identity), bytes_of(identity)
        checks = 4 * identity["samples"] * identity["views"]
        if identity["format"] != FORMAT:
            raise DataError(f"{path}: a bank of format {identity['format']}; this kdcli reads {FORMAT}", hint=cure)
        if not isinstance(facts["mentor"], str) or min(identity["samples"], identity["views"]) < 1:
            raise ValueError("nobody's answers to nothing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: bank.json cannot be read ({type(error).__name__}: {error})", hint=cure) from None
    if name != path.name:
        raise DataError(f"{path}: bank.json speaks of another bank ({name})", hint=cure)
    for file, expected in (("answers.bin", size - checks), ("checks.bin", checks)):
        found = (path / file).stat().st_size if (path / file).is_file() else None
        if found != expected:
            what = "missing" if found is None else f"{found} bytes long instead of {expected}"
            raise DataError(f"{path}: {file} is {what}", hint=cure)
    return facts


def every() -> list[Path]:
    """The folders of all banks, by name, broken ones too."""
    found = folder().iterdir() if folder().is_dir() else []
    return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))


def find(name: str) -> Path:
    """A bank by its id or the beginning of it. Raises RecipeError when none or several are meant."""
    hits = [path for path in every() if path.name.startswith(name)] if name else []
    if len(hits) != 1:
        several = f"{len(hits)} banks begin with {name!r}" if hits else f"no bank called {name!r}"
        raise RecipeError(f"{several} in {folder()}", hint="`kdcli bank ls` lists them.")
    return hits[0]


def describe(path: Path) -> dict[str, Any]:
    """What a list of banks says of one: see the keys; `state` is "ok" or what is wrong with it."""
    files = [file.stat() for file in path.iterdir() if file.is_file()]
    size = sum(getattr(file, "st_blocks", 0) * 512 or file.st_size for file in files)
    row: dict[str, Any] = {"id": path.name, "bytes": size}
    try:
        facts = read_facts(path)
    except DataError as error:
        return {**row, "state": error.message}
    identity = facts["identity"]
    checks = np.memmap(path / "checks.bin", np.int32, "r")
    used = datetime.fromtimestamp((path / "bank.json").stat().st_mtime, UTC)
    return {
        **row,
        "mentor": facts["mentor"],
        "data": facts["dataset"],
        "views": identity["views"],
        "precision": identity["precision"],
        "form": form(identity),
        "filled": int(np.count_nonzero(checks)) / len(checks),
        "used": used.isoformat(timespec="seconds"),
        "state": "ok",
    }


def form(identity: dict[str, Any]) -> str:
    """`logits`, `top 8`, with ` and pooled`: how answers are kept."""
    whole = "logits" if identity["top"] is None else f"top {identity['top']}"
    return whole + (" and pooled" if identity["pooled"] else "")


def verify(path: Path) -> Iterator[tuple[int, int, int]]:
    """Check every record: (rows looked at, filled, damaged) so far. Raises DataError as `read_facts` does."""
    bank = Bank(path)
    filled = damaged = 0
    for rows in torch.arange(bank.rows).split(CHUNK):
        there = bank.checks[rows] != 0
        filled += int(there.sum())
        damaged += int((there & ~bank.has(rows)).sum())
        yield int(rows[-1]) + 1, filled, damaged


def remove(path: Path) -> None:
    """Remove a bank. Raises DataError while somebody uses it."""
    try:
        if in_use(path):
            raise PermissionError(errno.EBUSY, "a run uses it")
        shutil.rmtree(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be removed: {error.strerror}", hint="Wait for the run, or stop it: it can be resumed."
        ) from None


def amount(size: float) -> str:
    """Bytes in the unit a person would use."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
