"""What the terminal sees: notes, tables, progress. Tables as data with --json."""

import json
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from kdcli.engine import EpochEnd, Learner, Step

console = Console(highlight=False)
if not console.is_terminal:
    console.width = 200  # a file or a pipe has no edge to wrap at
errors = Console(stderr=True, highlight=False)


def notes(items: Iterable[tuple[str, object, str]]) -> None:
    """Everything that was chosen for the user, with where it came from."""
    for key, value, why in items:
        console.print(f"[dim]{key}[/] {_plain(value)} [dim]({_plain(why)})[/]")


def table(columns: list[str], rows: list[list[Any]], *, title: str = "", left: int = 1) -> None:
    """A table; the first `left` columns are words, the others numbers."""
    shown = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for n, column in enumerate(columns):
        shown.add_column(column, justify="left" if n < left else "right", no_wrap=n < 1, overflow="fold")
    for row in rows:
        shown.add_row(*["" if cell is None else _plain(cell) for cell in row])
    console.print(shown)


def as_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def next_line(command: str) -> None:
    """The last line: what to type next."""
    console.print(f"\nNext: [bold]{_plain(command)}[/]")


def follow(events: "Iterator[Step | EpochEnd]", label: str, *, quiet: bool = False) -> None:
    """Run a training to its end under a progress bar; no bar where there is no terminal."""
    from kdcli.engine import Step

    if quiet or not console.is_terminal:
        for _ in events:
            pass
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=18), MofNCompleteColumn(),
        TextColumn("{task.fields[says]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task(label, total=None, says="")
        drawn = 0.0
        for event in events:
            if isinstance(event, Step):
                done = (event.epoch - 1) * event.batches + event.batch
                total = event.epochs * event.batches
                if time.monotonic() - drawn > 1.0 or done == total:  # reading a loss waits for the device
                    drawn = time.monotonic()
                    bar.update(task, completed=done, total=total, says=_says(event))


def _says(step: "Step") -> str:
    rate = step.images / max(step.seconds, 1e-9)
    learner = step.learners[-1]
    return f"epoch {step.epoch}/{step.epochs} {_state(learner)} {rate:,.0f} img/s"


def _state(learner: "Learner") -> str:
    means = learner.tally.means()
    right = 100 * means.pop("right", 0.0) * learner.tally.batches / max(learner.tally.images, 1)
    words = [f"{learner.name}" if "-" in learner.name else "", f"top-1 {right:.1f}%"]
    words += [f"{name[5:]} {value:.3f}" for name, value in means.items() if name.startswith("term/")]
    if "note/active" in means:
        words.append(f"active {sum(means['note/active']):.1f}/{len(means['note/active'])}")
    return " ".join(word for word in words if word)


def _plain(value: object) -> str:
    return str(value).replace("[", "\\[")


def count(n: float) -> str:
    """1,736,564 as 1.74 M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.2f} {unit}"
    return str(int(n))


def size(n: float) -> str:
    """Bytes as KiB or MiB."""
    return f"{n / 2**20:.2f} MiB" if n >= 2**20 else f"{n / 2**10:.1f} KiB"
