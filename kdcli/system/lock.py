"""One writer for a folder: a lock that the operating system releases when its process ends, however it ends."""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from kdcli.errors import LockedError
from kdcli.system.files import make_folder, unwritable

NAME = "run.lock"  # stays in the folder: removing it could remove a lock that another process just took
HOLDER_AT = 1  # Windows keeps other processes from reading byte 0, which filelock locks
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without locks


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep all other processes from writing to a run's folder (created if missing) while the block runs.

    Reading stays possible. Forked children do not inherit the lock. On a file system without locks only a warning is
    printed. Raises LockedError naming the process that holds the folder, DataError if the folder cannot be written.
    """
    path = folder / NAME
    make_folder(folder)
    lock = FileLock(path, timeout=0, fallback_to_soft=False)  # a soft lock would outlive a killed process
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except Timeout:
            raise LockedError(
                f"{folder} is in use by {_holder(path) or 'another process'}",
                hint="Wait for it, or stop it first (Ctrl-C or `kill PROCESS` let it save). Another --out is another "
                "run.",
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise unwritable(path, error) from None
            print(f"warning: no locks on the file system of {folder}: start no second command on it", file=sys.stderr)
        try:
            path.touch()  # without locks it may not be there
            with open(path, "rb+") as file:
                file.seek(HOLDER_AT)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                file.truncate()
        except OSError as error:
            raise unwritable(path, error) from None
        yield


def check(folder: Path) -> None:
    """Raise LockedError if a process holds this folder or the one around it (a compare holds its runs')."""
    for place in (folder, folder.parent):
        if (place / NAME).is_file():
            with hold(place):
                pass


def _holder(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(HOLDER_AT)
        return file.read().decode(errors="replace").strip()
