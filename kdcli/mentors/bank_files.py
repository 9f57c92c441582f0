"""Banks as folders: made with all their space, found, described and removed; what is in one is `bank.py`'s."""

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
except ImportError:  # Windows, which lets nobody remove a file that is open
    fcntl = None

FORMAT = 1
STALE = 60.0  # seconds after which a folder nobody holds is no longer being made
ZEROS = 2**24  # bytes written at once to reserve them
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
WITHOUT = "--set classroom.bank=false"


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

    Raises DataError when there is too little room, or none that may be written to.
    """
    path, size = folder() / id_of(identity), bytes_of(identity)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    facts = {"identity": identity, **about, "bytes": size, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    checks = 4 * identity["samples"] * identity["views"]
    _remove_stale()
    try:
        temporary.mkdir(parents=True)
        lock = hold(temporary)
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
        raise _no_room(f"a bank of {amount(size)} in {folder()}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def check_room(identities: list[dict[str, Any]]) -> None:
    """Raise DataError, before any is made, when these banks do not all fit on the disk."""
    size = sum(map(bytes_of, identities))
    there = next((path for path in (folder(), *folder().parents) if path.is_dir()), folder())
    free = shutil.disk_usage(there).free
    if size > free:
        count = f"{len(identities)} new bank{'s' * (len(identities) > 1)}"
        raise _no_room(f"{count} of {amount(size)} together in {folder()}, where {amount(free)} are free")


def _no_room(what: str) -> DataError:
    return DataError(
        f"no room for {what}",
        hint="Free some space (`kdcli bank ls` shows banks), choose another place by KDCLI_HOME, make them smaller "
        f"with --set data.views=8 or --set classroom.bank_top=8, or do without: {WITHOUT}.",
    )


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


def _remove_stale() -> None:
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
