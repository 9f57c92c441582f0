"""SIGINT and SIGTERM: noted while something is half done, obeyed at once where breaking off loses nothing."""

import contextlib
import signal
from collections.abc import Iterable, Iterator
from typing import TypeVar

from kdcli.system import distributed

T = TypeVar("T")


class Stop(BaseException):
    """Raised inside `Signals.breakable` by a signal; like KeyboardInterrupt nothing but its receiver catches it."""


class Signals:
    """Within `with signals:` both signals are noted in `caught` by name; a second SIGINT is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.caught: list[str] = []
        self._open = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Signals":
        with contextlib.suppress(ValueError):  # not the main thread, where signals cannot be caught
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, _frame: object) -> None:
        if self.caught and number == signal.SIGINT and distributed.alone():  # a launcher passes on what came to all
            raise KeyboardInterrupt
        self.caught.append(signal.Signals(number).name)
        if self._open:
            self._open = False  # what cleans up after the stop is not to be broken off by the next signal
            raise Stop

    @contextlib.contextmanager
    def breakable(self, when: bool = True) -> Iterator[None]:
        """Let a signal, also one that has come already, break off the block with `Stop` (`when`: if at all).

        One of several ranks is never broken off: the others would wait for it.
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
        """`items`, with the making of each breakable."""
        source = iter(items)
        while True:
            with self.breakable():
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item
