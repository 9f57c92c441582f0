"""Files that are written whole or not at all, and what is said when the disk refuses."""

import contextlib
import errno
import os
import secrets
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from kdcli.errors import DataError

FOLDER = 0x10  # MS-DOS's flag in a zip member's attributes
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no EDQUOT


def write_atomic(path: Path, write: Callable[[Path], object], *, before: Path | None = None) -> None:
    """Let `write` fill a temporary file in the same folder, flush it to the disk, then rename it to `path`.

    `before` is a new name for the file that was at `path`: at every instant one of the two files is whole.
    Raises DataError when the disk is full or the folder cannot be written; the old file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # mkstemp's would be unreadable for others
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
        with contextlib.suppress(OSError):  # it is gone after the rename, and never existed without the folder
            temporary.unlink()


def unwritable(path: Path, error: Exception) -> DataError:
    """A failed write as a DataError: the disk is full, or the system's own reason."""
    full = getattr(error, "errno", None) in FULL or isinstance(error, RuntimeError)
    why = "the disk is full" if full else (getattr(error, "strerror", None) or str(error))
    return DataError(
        f"cannot write {path}: {why}; what was there before is untouched",
        hint="Free some space (`kdcli runs ls` shows sizes, `kdcli runs rm RUN` removes a run), or choose another "
        "place: --out for runs, --file for exported files, KDCLI_HOME for the zoo and banks. A stopped run continues "
        "with --resume.",
    )


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file, whole or not at all."""
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
            except OSError:  # half a line would run into the next one
                file.truncate(size)
                raise
    except OSError as error:
        raise unwritable(path, error) from None


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises DataError when it cannot be created."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None


def is_whole_zip(path: Path) -> bool:
    """Whether a zip archive, such as torch.save writes, ends where it should and every member matches its CRC.

    torch.load does not check the CRCs, and takes a member flagged as a folder from uninitialised memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            folders = any(member.external_attr & FOLDER for member in archive.infolist())
            return not folders and archive.testzip() is None
    except Exception:  # zipfile raises many kinds for damaged headers
        return False


def remove_stale(folder: Path) -> None:
    """Remove temporary files that a kill in the middle of `write_atomic` left behind."""
    for torn in folder.glob(".*.tmp"):
        torn.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Bring a folder's new names to the disk, against power cuts; Windows cannot open folders."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
