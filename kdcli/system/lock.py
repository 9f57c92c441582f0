"""One writer a folder: a lock the operating system gives back when its process dies, however it dies."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from kdcli.errors import LockedError
from kdcli.system.files import make_folder, unwritable

NAME = "run.lock"  # stays in the folder: whoever removed it could remove another's
FAR = 1 << 30  # Windows also keeps others from reading what is locked, so the locked byte lies behind the words
BUSY = (errno.EAGAIN, errno.EACCES)
NONE_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without locks

_held: set[int] = set()


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep all other processes from writing into a run's folder (made if it is missing) while the block runs.

    Reading is not hindered. Where the file system has no locks nothing is held.
    Raises LockedError naming the process that holds it, DataError when the folder cannot be written.
    """
    path = folder / NAME
    make_folder(folder)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise unwritable(path, error) from None
    _held.add(file)
    try:
        _take(file, folder)
        try:
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            raise unwritable(path, error) from None
        yield
    finally:
        if file in _held:
            _held.remove(file)
            os.close(file)  # and with it the lock


def check(folder: Path) -> None:
    """Raise LockedError when a process holds this folder, or the compare that it lies in."""
    for place in (folder, folder.parent):
        if (place / NAME).is_file():
            with hold(place):
                pass


def _take(file: int, folder: Path) -> None:
    try:
        _lock(file)
    except OSError as error:
        if error.errno in NONE_HERE:
            return
        if error.errno not in BUSY:
            raise unwritable(folder / NAME, error) from None
        who = (folder / NAME).read_text(errors="replace").strip() or "another process"
        raise LockedError(
            f"{folder} is in use by {who}",
            hint="Wait for it, or stop it first (Ctrl-C or `kill PROCESS` let it save). Another --out is another run.",
        ) from None


try:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

except ImportError:  # Windows
    import msvcrt

    def _lock(file: int) -> None:
        os.lseek(file, FAR, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            os.lseek(file, 0, os.SEEK_SET)


def _after_fork() -> None:
    """A forked child (a decoding process) must not hold on to the lock when its parent was killed."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
