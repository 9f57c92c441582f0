"""Files that are written whole or not at all."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from kdcli.errors import DataError

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows knows no quotas


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then give it its name.

    Raises DataError when the disk is full or the folder cannot be written; the old file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # not mkstemp's: others may read a run
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
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
        hint="Free some space (`kdcli runs ls` shows sizes, `kdcli runs rm RUN` removes one), or choose another place: "
        "--out for runs, KDCLI_HOME for the zoo. A run that was stopped goes on with --resume.",
    )


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file whole."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
