"""What is printed: notes, tables, progress, and data with --json."""

import json
import re
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from kdcli.training.learner import Learner
    from kdcli.training.run import Run
    from kdcli.training.session import Event, Step
    from kdcli.workflows.distill import Result
    from kdcli.workflows.groups import Follow

console = Console(highlight=False)
if not console.is_terminal:
    console.width = 200  # a file or a pipe has no edge to wrap at
errors = Console(stderr=True, highlight=False)
READABLE = 24  # letters: a column of words is not made narrower than this
_NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?(e[+-]\d+)?( \S+)?( \d[\d.]*)?")  # 1,234  0.5  3.2 MiB  +1.20  70.1 ± 0.3


def notes(items: Iterable[tuple[str, object, str]]) -> None:
    """Everything that was chosen for the user, with where it came from."""
    for key, value, why in items:
        console.print(f"[dim]{_plain(key)}[/] {_plain(value)} [dim]({_plain(why)})[/]", soft_wrap=True)


def table(columns: list[str], rows: list[list[Any]], *, title: str = "", left: int = 1) -> None:
    """A table: the first `left` columns and all that hold words are aligned to the left, numbers to the right.

    Where it is too wide for the terminal it is written row by row instead, each under its first cell, since cells three
    letters wide cannot be read.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    over = sum(widths) + 2 * (len(widths) - 1) - console.width
    longest = max(range(1, len(widths)), key=lambda n: widths[n])
    if over > 0 and widths[longest] - over < READABLE and len(columns) > 2:
        return _stacked(columns, cells, title)
    if over > 0 and columns[0] and len(columns) == 2:  # a long heading (a path) would push the values to the edge
        line(columns[1], columns[0])
        columns, left = ["", ""], 2
    shown = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    shown.show_header = any(columns)
    for n, column in enumerate(columns):
        numbers = n >= left and all(_NUMBER.fullmatch(row[n]) for row in cells if row[n])
        shown.add_column(_plain(column), justify="right" if numbers else "left", overflow="fold", no_wrap=n != longest)
    for row in cells:
        shown.add_row(*map(_plain, row))
    console.print(shown)


def _stacked(columns: list[str], cells: list[list[str]], title: str) -> None:
    if title:
        console.print(f"[italic]{_plain(title)}[/]")
    for row in cells:
        console.print(f"[bold]{_plain(row[0])}[/]", soft_wrap=True)
        named = zip(columns[1:], row[1:], strict=True)
        words = ", ".join(f"[dim]{_plain(name)}[/] {_plain(cell)}" for name, cell in named if cell)
        console.print(Padding(words, (0, 0, 0, 2)))


def line(label: str, value: object, *, style: str = "dim") -> None:
    """A fact on one line that is never wrapped, so that a path or a command in it can be copied."""
    console.print((f"[{style}]{_plain(label)}[/] " if label else "") + _plain(value), soft_wrap=True)


def as_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def next_line(command: str) -> None:
    """The last line: what to type next."""
    console.print(f"\nNext: [bold]{_plain(command)}[/]", soft_wrap=True)


def follower(chosen: Iterable[tuple[str, object, str]] = (), *, quiet: bool = False) -> "Follow":
    """What a workflow reports to: prints what was chosen, `chosen` first, and shows each training's progress."""
    before = list(chosen)

    def report(classroom: Any, events: "Iterator[Event]", label: str) -> None:
        if not quiet:
            notes([*before, *classroom.notes])
            before.clear()
        follow(events, label, quiet=quiet)

    return report


def follow(events: "Iterator[Event]", label: str, *, quiet: bool = False) -> None:
    """Run a training to its end under a progress bar; without a terminal its label is printed. Warnings always show."""
    from kdcli.training.session import Notice, Step

    if quiet or not console.is_terminal:
        if not quiet:
            line("now", label)
        for event in events:
            if isinstance(event, Notice):
                warning(event.text)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=18), MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task(label, total=None, state="")
        drawn = 0.0
        for event in events:
            if isinstance(event, Notice):
                warning(event.text)
            if isinstance(event, Step):
                done = (event.epoch - 1) * event.batches + event.batch
                total = event.epochs * event.batches
                if time.monotonic() - drawn > 1.0 or done == total:  # reading a loss waits for the device
                    drawn = time.monotonic()
                    width = console.width - len(label) - 2 * len(str(total)) - 30  # bar, counts and time left
                    bar.update(task, completed=done, total=total, state=_progress(event)[: max(width, 0)])


def _progress(step: "Step") -> str:
    rate = step.images / max(step.seconds, 1e-9)
    return f"epoch {step.epoch}/{step.epochs} {rate:,.0f} img/s {_state(step.learners[-1])}"


def _state(learner: "Learner") -> str:
    metric, notes = learner.task.metrics[0], learner.meter.means("note/")
    words = [f"{learner.name}" if "-" in learner.name else ""]
    words.append(f"{metric.label} {learner.training_score().value:.1f}{metric.unit}")
    words += [f"{name} {value:.3f}" for name, value in learner.meter.means("term/").items()]
    if "active" in notes:
        words.append(f"active {sum(notes['active']):.1f}/{len(notes['active'])}")
    return " ".join(word for word in words if word)


def result(found: "Result") -> None:
    """A finished training's figures, next to the published one where its recipe has one."""
    metric = found.metric
    rows = [[metric.title, f"{found.value:.2f}"], ["of epoch", found.epoch]]
    rows.append([f"last epoch {metric.unit}", f"{found.last:.2f}"])
    rows.append([f"best epoch {metric.unit} ({found.best_epoch})", f"{found.best:.2f}"])
    if published := found.published:
        difference = f"off by {published.measured - published.value:+.2f}"
        rows.append([f"published ({published.epoch} epoch) {metric.unit}", f"{published.value:.2f}"])
        rows.append(["", "reproduced" if published.reproduced else difference])
    rows += [[f"stage {name} {metric.unit}", f"{one['score'][metric.name]:.2f}"] for name, one in found.stages.items()]
    table(["", f"{found.data} test"], rows)
    line("run", found.run.path)


def _plain(value: object) -> str:
    return str(value).replace("[", "\\[")


def warning(text: str) -> None:
    """What did not go as the recipe says; on the error stream, so that --json prints nothing else."""
    errors.print(f"[yellow]warning:[/] {_plain(text)}", soft_wrap=True)


def named(run: "Run", given: str | None) -> None:
    """Print which run was taken where the user named none; on the error stream, so that --json prints nothing else."""
    if given is None:
        errors.print(f"[dim]run[/] {_plain(run.path)} [dim](the newest)[/]", soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    for limit, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "under a second"


def count(n: float) -> str:
    """1,736,564 as 1.74 M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.2f} {unit}"
    return str(int(n))


def size(n: float) -> str:
    """Bytes as KiB or MiB."""
    return f"{n / 2**20:.2f} MiB" if n >= 2**20 else f"{n / 2**10:.1f} KiB"
