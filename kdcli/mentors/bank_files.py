"""Banks as folders: created with all their disk space, found, described and removed. `bank.py` reads their records."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.errors import DataError, RecipeError
from kdcli.mentors.bank_format import Record
from kdcli.system.files import write_text
from kdcli.system.paths import home

try:
    import fcntl
except ImportError:  # Windows, which refuses to remove open files
    fcntl = None

FORMAT = 1
STALE = 3600.0  # seconds after which a folder that was never finished is a leftover
ZEROS = 2**24  # bytes written at once to reserve space
WITHOUT = "--set classroom.bank=false"


def folder() -> Path:
    """The folder of all banks."""
    return home() / "banks"


def id_of(identity: dict[str, Any]) -> str:
    """A bank's id: the first 16 hexadecimal digits of its identity's sha256."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def record_of(identity: dict[str, Any]) -> Record:
    return Record(identity["classes"], identity["pooled"])


def bytes_of(identity: dict[str, Any]) -> int:
    """The size of a bank, in bytes, on disk and on a device."""
    return sum(_sizes(identity).values())


def _sizes(identity: dict[str, Any]) -> dict[str, int]:
    """A bank's files of records and checksums, with their bytes."""
    rows = identity["samples"] * identity["views"]
    return {"answers.bin": rows * 2 * record_of(identity).words, "checks.bin": rows * 4}


def create(identity: dict[str, Any], *, mentor: str, dataset: str) -> Path:
    """An empty bank with all its space reserved: writing through a memory map to a disk that is full kills the process.

    Raises DataError when there is too little space or the folder cannot be written.
    """
    path, size = folder() / id_of(identity), bytes_of(identity)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    created = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {"identity": identity, "mentor": mentor, "dataset": dataset, "bytes": size, "created": created}
    _remove_stale()
    try:
        temporary.mkdir(parents=True)
        for name, count in _sizes(identity).items():
            _reserve(temporary / name, count)
        write_text(temporary / "bank.json", json.dumps(facts, indent=1))
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():  # if it is, another process was faster
                raise
    except OSError as error:
        raise _no_space(f"a bank of {amount(size)} in {folder()}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def check_space(identities: list[dict[str, Any]]) -> None:
    """Raise DataError when new banks of these identities do not fit on the disk together."""
    size = sum(map(bytes_of, identities))
    existing = next((path for path in (folder(), *folder().parents) if path.is_dir()), folder())
    free = shutil.disk_usage(existing).free
    if size > free:
        count = f"{len(identities)} new bank{'s' * (len(identities) > 1)}"
        raise _no_space(f"{count} of {amount(size)} together in {folder()}, where {amount(free)} are free")


def _no_space(what: str) -> DataError:
    return DataError(
        f"not enough space for {what}",
        hint="Free some space (`kdcli bank ls` lists banks), choose another place with KDCLI_HOME, make banks smaller "
        f"with --set data.views=8, or use none: {WITHOUT}.",
    )


def _reserve(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):  # the C library writes zeros where the file system cannot reserve
            os.posix_fallocate(file.fileno(), 0, size)
            return
        for start in range(0, size, ZEROS):
            file.write(bytes(min(ZEROS, size - start)))
        os.fsync(file.fileno())


def _remove_stale() -> None:
    """Remove folders left by processes that were killed while creating a bank."""
    for path in folder().glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path, ignore_errors=True)


def hold(path: Path) -> int | None:
    """A shared lock on a bank's folder, which keeps it from being removed until `close`; None where there are no locks.

    filelock has no equivalent: its OS locks are exclusive, and its ReadWriteLock keeps an SQLite database.
    """
    if fcntl is None:
        return None
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # a file system without locks
        os.close(file)
        return None
    return file


def close(held: int | None) -> None:
    """Release what `hold` returned."""
    if held is not None:
        os.close(held)


def in_use(path: Path) -> bool:
    """Whether any process, this one included, holds the folder."""
    if fcntl is None:
        return False
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(file)


def read_facts(path: Path) -> dict[str, Any]:
    """A bank's bank.json, checked against its folder's name and its files' sizes.

    Raises DataError (cure: remove the bank) when they contradict each other or a file is missing.
    """
    cure = f"`kdcli bank rm {path.name}` removes it; a new one is created when needed. Or {WITHOUT}."
    try:
        facts = json.loads((path / "bank.json").read_text(encoding="utf-8"))
        identity = facts["identity"]
        if identity["format"] != FORMAT:
            raise DataError(f"{path}: format {identity['format']}; this version of kdcli reads {FORMAT}", hint=cure)
        if identity["top"] is not None:
            raise DataError(f"{path}: stores only {identity['top']} classes, which is no longer supported", hint=cure)
        name, sizes = id_of(identity), _sizes(identity)
        if not isinstance(facts["mentor"], str) or min(identity["samples"], identity["views"]) < 1:
            raise ValueError("samples or views is 0, or the mentor has no name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: bank.json cannot be read ({type(error).__name__}: {error})", hint=cure) from None
    if name != path.name:
        raise DataError(f"{path}: bank.json belongs to bank {name}", hint=cure)
    for file, expected in sizes.items():
        found = (path / file).stat().st_size if (path / file).is_file() else None
        if found != expected:
            what = "missing" if found is None else f"{found} bytes long instead of {expected}"
            raise DataError(f"{path}: {file} is {what}", hint=cure)
    return facts


def every() -> list[Path]:
    """The folders of all banks by name, damaged ones included."""
    found = folder().iterdir() if folder().is_dir() else []
    return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))


def find(name: str) -> Path:
    """A bank by its id or the beginning of it. Raises RecipeError when none or several match."""
    hits = [path for path in every() if path.name.startswith(name)] if name else []
    if len(hits) != 1:
        what = f"{len(hits)} banks begin with {name!r}" if hits else f"no bank called {name!r}"
        raise RecipeError(f"{what} in {folder()}", hint="`kdcli bank ls` lists them.")
    return hits[0]


def describe(path: Path) -> dict[str, Any]:
    """A bank as a row of `kdcli bank ls`. `bytes` is its disk usage, `filled` the share of records stored (0 to 1),
    `state` "ok" or what is wrong, in which case the other keys but `id` and `bytes` are absent."""
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
        "form": "logits and pooled" if identity["pooled"] else "logits",
        "filled": int(np.count_nonzero(checks)) / len(checks),
        "used": used.isoformat(timespec="seconds"),
        "state": "ok",
    }


def remove(path: Path) -> None:
    """Remove a bank. Raises DataError while a process uses it."""
    try:
        if in_use(path):
            raise PermissionError(errno.EBUSY, "a run is using it")
        shutil.rmtree(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be removed: {error.strerror}", hint="Wait for the run, or stop it: it can be resumed."
        ) from None


def amount(size: float) -> str:
    """Bytes in a readable unit."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
