"""kdcli doctor: what this machine can do."""

from typing import Annotated

import typer

from kdcli.cli import options as o

EXAMPLES = ("kdcli doctor", "kdcli doctor --no-test --json")


def doctor(
    test: Annotated[
        bool,
        typer.Option("--test/--no-test", help="Train, export and check a tiny student.", rich_help_panel=o.MACHINE),
    ] = True,
    json: o.Json = False,
) -> None:
    """Show devices, precisions, versions and folders, and run a self-test of under a minute."""
    from kdcli.cli import tables
    from kdcli.workflows import doctor as workflow

    found = workflow.examine(self_test=test)
    if json:
        tables.as_json(found)
    else:
        for part, facts in found.items():
            tables.table([part, ""], [[key, value] for key, value in facts.items()], left=2)
            tables.console.print()
    if test and found["self-test"]["result"] != "passed":
        tables.errors.print("[red bold]error:[/] the self-test failed; the table above shows at which step")
        raise typer.Exit(1)
    if not json:
        tables.next_line("kdcli quickstart")
