"""kdcli bank: caches of the mentors' outputs."""

from typing import Annotated

import typer

from kdcli.cli import options as o

app = typer.Typer(no_args_is_help=True, help="Caches of the mentors' outputs: build, list, verify, remove.")


@app.command(
    "build",
    epilog="Examples:\n\nkdcli bank build --recipe cifar100/r110-r20\n\n"
    "kdcli bank build --teacher resnet34 --data folder:images --set data.views=8 --epochs 30",
)
def build(
    data: o.Data = None,
    student: o.Student = None,
    teacher: o.Teacher = None,
    peers: o.Peers = None,
    recipe: o.From = None,
    epochs: o.Epochs = None,
    sets: o.Set = None,
    data_root: o.Root = None,
    skip_corrupt: o.SkipCorrupt = False,
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Fill a classroom's banks before its runs: with every view, or with --epochs those that such a run draws.

    A bank is a cache of one mentor's outputs. A build that was stopped continues where it was. A run with --bank fills
    banks as it goes.
    """
    from kdcli.cli import tables
    from kdcli.errors import RecipeError
    from kdcli.mentors import bank_build, bank_files
    from kdcli.system import device as devices
    from kdcli.workflows.groups import open_classroom

    config, notes = o.assemble(
        recipe, data=data, root=data_root, student=student, teacher=teacher, peers=peers, epochs=epochs,
        skip_corrupt=skip_corrupt, bank=True, sets=sets,
    )  # fmt: skip
    if not config.classroom.teacher:
        raise RecipeError("no mentor is named", hint="Add --teacher NAME (and --peers A,B).")
    if not config.classroom.student:  # a classroom needs one, but nothing is trained
        config = config.with_(**{"classroom.student": config.classroom.teacher})
    classroom = open_classroom(config, devices.pick(device))
    mentors = bank_build.open_mentors(classroom, config)
    if not json:
        tables.notes([*notes, *classroom.notes])
    _follow(bank_build.build(mentors, classroom, config, epochs), "views", quiet=json)
    found = [bank_files.describe(bank.path) for bank in dict.fromkeys(mentors.banks)]
    if json:
        tables.as_json(found)
        return
    _table(found)
    student = student or (None if recipe else "NAME")
    again = o.typed(
        "kdcli distill --bank", sets, skip_corrupt, recipe=recipe, teacher=teacher, peers=peers, student=student,
        data=data, epochs=epochs, data_root=data_root, device=device,
    )  # fmt: skip
    tables.next_line(again)


@app.command("ls", epilog="Examples:\n\nkdcli bank ls\n\nkdcli bank ls --json")
def ls(json: o.Json = False) -> None:
    """List the banks: mentor, data, how much is filled, size."""
    from kdcli.cli import tables
    from kdcli.mentors import bank_files

    found = [bank_files.describe(path) for path in bank_files.every()]
    if json:
        tables.as_json(found)
        return
    if not found:
        tables.console.print(f"no banks in {bank_files.folder()}")
        tables.next_line("kdcli bank build --recipe NAME")
        return
    _table(found)
    tables.next_line("kdcli bank verify")


@app.command("verify", epilog="Examples:\n\nkdcli bank verify\n\nkdcli bank verify 3f2a --json")
def verify(
    bank: Annotated[str | None, typer.Argument(help="A bank's id or its beginning; default: all.")] = None,
    json: o.Json = False,
) -> None:
    """Check every record against its checksum."""
    from kdcli.cli import tables
    from kdcli.errors import DataError
    from kdcli.mentors import bank_files
    from kdcli.mentors.bank import Bank

    found = []
    for path in [bank_files.find(bank)] if bank else bank_files.every():
        row = {"id": path.name, "answers": 0, "damaged": 0, "state": "ok"}
        try:
            for _, row["answers"], row["damaged"] in Bank(path).verify():
                pass
        except DataError as error:
            row["state"] = error.message
        if row["damaged"]:
            row["state"] = "damaged"
        found.append(row)
    if json:
        tables.as_json(found)
    else:
        tables.table(["bank", "answers", "damaged", "state"], [[*row.values()] for row in found])
    bad = [row["id"] for row in found if row["state"] != "ok"]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(found)} banks are damaged: {', '.join(bad)}",
            hint="Runs and `kdcli bank build` compute damaged records again; `kdcli bank rm ID` removes a bank.",
        )
    if not json:
        tables.next_line("kdcli distill --bank ...")


@app.command("rm", epilog="Examples:\n\nkdcli bank rm 3f2a\n\nkdcli bank rm --all --yes")
def rm(
    bank: Annotated[str | None, typer.Argument(help="A bank's id or its beginning.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every bank.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Remove a bank; the next run that needs it creates a new one."""
    from kdcli.cli import tables
    from kdcli.errors import RecipeError
    from kdcli.mentors import bank_files

    if (bank is None) != everything:
        raise RecipeError("which bank?", hint="Name one by its id (`kdcli bank ls`), or all with --all.")
    paths = [bank_files.find(bank)] if bank else bank_files.every()
    for path in paths:
        about = bank_files.describe(path)
        if not yes:
            what = f" of {about['mentor']} on {about['data']}" if "mentor" in about else ""
            typer.confirm(f"Remove {path}{what} ({bank_files.amount(about['bytes'])})?", abort=True)
        bank_files.remove(path)
        tables.line("removed", path)
    tables.next_line("kdcli bank ls")


def _table(found) -> None:
    from kdcli.cli import tables
    from kdcli.mentors.bank_files import amount

    rows = [
        [f["id"], f["mentor"], f["data"], f["views"], f["precision"], f["form"], f"{100 * f['filled']:.1f}",
         amount(f["bytes"]), f["used"][:16].replace("T", " ")] if f["state"] == "ok"
        else [f["id"], f["state"], "", "", "", "", "", amount(f["bytes"]), ""]
        for f in found
    ]  # fmt: skip
    columns = ["bank", "mentor", "data", "views", "precision", "form", "filled %", "size", "last used"]
    tables.table(columns, rows, left=3)


def _follow(steps, label, *, quiet) -> None:
    """Run steps that yield (done, total), with a progress bar if this is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from kdcli.cli import tables

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=tables.console, disable=quiet or not tables.console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        for done, total in steps:
            bar.update(task, completed=done, total=total)
