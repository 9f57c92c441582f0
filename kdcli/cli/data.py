"""kdcli data: which pictures there are."""

import typer

from kdcli.cli import options as o

app = typer.Typer(no_args_is_help=True, help="Data sets: what there is, and where it is looked for.")


@app.command("ls", epilog="Examples:\n\nkdcli data ls\n\nkdcli data ls --data-root pictures --json")
def ls(data_root: o.Root = None, json: o.Json = False) -> None:
    """List the data sets kdcli knows and whether they are here."""
    from kdcli.cli import show
    from kdcli.data import available
    from kdcli.home import data_root as where

    found = available(data_root)
    if json:
        show.as_json(found)
        return
    rows = [[f["name"], "here" if f["present"] else "not here", f["images"], f["classes"], f["where"]] for f in found]
    show.table(["name", "state", "images", "classes", "where"], rows, left=2)
    show.line("data root", f"{where(data_root)} (--data-root or KDCLI_DATA)")
    show.next_line("kdcli train --model NAME --data folder:DIR")
