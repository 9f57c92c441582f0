"""SIGINT and SIGTERM: recorded while an update is half done, acted on at once where stopping loses nothing."""

import contextlib
import signal
from collections.abc import Iterable, Iterator
from typing import TypeVar

from kdcli.system import distributed

T = TypeVar("T")


class Stop(BaseException):
    """Raised inside `Signals.breakable` by a signal. A BaseException, so that `except Exception` does not catch it."""


class Signals:
    """Within `with signals:` both signals are recorded by name in `caught`; a second SIGINT is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.caught: list[str] = []
        self._open = False
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Signals":
        with contextlib.suppress(ValueError):  # signals can be caught in the main thread only
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # pyright: ignore[reportArgumentType]

    def _record(self, number: int, _frame: object) -> None:
        if self.caught and number == signal.SIGINT and distributed.alone():  # ranks get it twice: the launcher's too
            raise KeyboardInterrupt
        self.caught.append(signal.Signals(number).name)
        if self._open:
            self._open = False  # the next signal must not interrupt the cleaning up after this one
            raise Stop

    @contextlib.contextmanager
    def breakable(self, when: bool = True) -> Iterator[None]:
        """Let a signal, or one that came before, interrupt the block with `Stop` (unless `when` is false).

        With several ranks nothing is interrupted: the other ranks would wait for this one.
        """
        if not when or not distributed.alone():
            yield
            return
        self._open = True
        try:
            if self.caught:
                raise Stop
            yield
        finally:
            self._open = False

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """`items`; a signal may interrupt the computation of each."""
        source = iter(items)
        while True:
            with self.breakable():
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item
