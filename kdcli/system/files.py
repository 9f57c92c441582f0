"""Files that are written whole or not at all."""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from kdcli.errors import DataError

SEAL = b"\nkdcli sha256 "  # before the 64 digits at the end of a sealed file
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows knows no quotas


def write_atomic(path: Path, write: Callable[[Path], object], *, before: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then give it its name.

    With `before`, the file that had the name takes that one: at every instant one of the two is whole.
    Raises DataError when the disk is full or the folder cannot be written; the old file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # not mkstemp's: others may read a run
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, RuntimeError) as error:  # torch and safetensors report a full disk as RuntimeError
        if isinstance(error, RuntimeError) and shutil.disk_usage(path.parent).free > 1 << 20:
            raise
        raise unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):  # there is none after the rename, nor where the folder could not be made
            temporary.unlink()


def unwritable(path: Path, error: Exception) -> DataError:
    """The refusal of the disk in words."""
    full = getattr(error, "errno", None) in FULL or isinstance(error, RuntimeError)
    why = "the disk is full" if full else (getattr(error, "strerror", None) or str(error))
    return DataError(
        f"cannot write {path}: {why}; what was there before is untouched",
        hint="Free some space (`kdcli runs ls` shows sizes, `kdcli runs rm RUN` removes a run), or choose another "
        "place: --out for runs, --file for exported files, KDCLI_HOME for the zoo and banks. A stopped run continues "
        "with --resume.",
    )


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file whole."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def append_line(path: Path, line: str) -> None:
    """Append a line to a UTF-8 file and flush it to the disk, or leave the file as it was. Raises DataError."""
    data = (line + "\n").encode()
    try:
        with open(path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:  # half a line would be glued to the next one
                file.truncate(size)
                raise
    except OSError as error:
        raise unwritable(path, error) from None


def make_folder(path: Path) -> None:
    """A folder and those it lies in. Raises DataError when the disk refuses."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None


def seal(path: Path) -> None:
    """Append the sha256 of a file's bytes to it: torch's own format has checksums that torch.load does not look at."""
    with open(path, "rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(SEAL + digest.encode())


def sealed(path: Path) -> bool:
    """Whether a file ends in the sha256 of all bytes before it."""
    left, digest = path.stat().st_size - len(SEAL) - 64, hashlib.sha256()
    with open(path, "rb") as file:
        while left > 0 and (data := file.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
        return file.read() == SEAL + digest.hexdigest().encode()


def remove_stale(folder: Path) -> None:
    """Remove what a kill in the middle of `write_atomic` left behind."""
    for torn in folder.glob(".*.tmp"):
        torn.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Put a folder's new names on the disk, against power cuts; Windows has no such call."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
