"""Every way kdcli can refuse: what was wrong, where, what is allowed, and the cure, with one exit code each.

DESIGN section 7: 0 done, 2 usage or recipe, 3 data or weights missing or broken, 4 training diverged,
5 export failed its parity check, 130 interrupted (resumable).
"""

import difflib
from collections.abc import Iterable


class KdcliError(Exception):
    """A refusal the user can act on. `message` says what and where, `hint` what to do about it."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(KdcliError):
    """A recipe, a flag or a name that means nothing (exit 2)."""


class DataError(KdcliError):
    """Pictures that are missing, broken or do not fit (exit 3)."""

    exit_code = 3


class WeightsError(KdcliError):
    """Weights that are missing, broken or belong to another network (exit 3)."""

    exit_code = 3


class DivergedError(KdcliError):
    """A loss that is no longer a number (exit 4)."""

    exit_code = 4


class OutOfMemory(KdcliError):
    """Networks and batch that do not fit into the device's memory (exit 3)."""

    exit_code = 3


class ParityError(KdcliError):
    """An exported file that does not answer as the student does (exit 5)."""

    exit_code = 5


class LockedError(KdcliError):
    """A run that another process is writing (exit 2)."""


class InterruptedRun(KdcliError):
    """SIGINT or SIGTERM after the run was saved (exit 130)."""

    exit_code = 130


def nearest(name: str, allowed: Iterable[str], n: int = 3) -> list[str]:
    """The up to `n` names of `allowed` that `name` most resembles, best first; may be empty."""
    folded: dict[str, str] = {}
    for option in allowed:
        folded.setdefault(option.lower(), option)
    return [folded[hit] for hit in difflib.get_close_matches(name.lower(), folded, n=n, cutoff=0.5)]


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A sentence naming the nearest of `allowed`, or all of them when none is near and they are few."""
    options = list(allowed)
    hits = nearest(name, options)
    if hits:
        return f"Did you mean {' or '.join(hits)}?"
    return f"Allowed: {', '.join(options)}." if len(options) <= 20 else ""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 200 characters; the exception's type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
