"""The command line: one short file per command, heavy imports inside them, so that --help is quick."""

import sys

import typer
from click.exceptions import Abort, ClickException, Exit
from typer.core import TyperGroup

from kdcli import __version__
from kdcli.errors import KdcliError

COMMANDS = (
    "quickstart", "distill", "compare", "train", "evaluate", "export", "bench", "check",
    "models", "recipes", "runs", "zoo", "data", "doctor",
)  # fmt: skip


class _InOrder(TyperGroup):
    """Commands in the order a newcomer meets them, with the nearest name for a mistyped one."""

    def list_commands(self, ctx: object) -> list[str]:
        return [name for name in COMMANDS if name in self.commands]


def _app() -> typer.Typer:
    import importlib

    app = typer.Typer(
        name="kdcli",
        cls=_InOrder,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        help="Compress image models by knowledge distillation and ship the result.",
        epilog="Start with `kdcli quickstart`. Then: `kdcli distill --teacher resnet34 --student resnet18 --data DIR`.",
    )

    @app.callback()
    def common(
        version: bool = typer.Option(False, "--version", help="Print the version and leave."),
        debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    ) -> None:
        if version:
            typer.echo(f"kdcli {__version__}")
            raise Exit(0)

    for name in COMMANDS:
        module = importlib.import_module(f"kdcli.cli.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            command = getattr(module, name)
            app.command(name, epilog=_examples(module.EXAMPLES))(command)
    return app


def _examples(lines: tuple[str, ...]) -> str:
    return "Examples:\n\n" + "\n\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and leave with the exit code of DESIGN section 7."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _app()(args=argv, prog_name="kdcli", standalone_mode=False)
    except KdcliError as error:
        if "--debug" in argv:
            raise
        _complain(error.message, error.hint)
        sys.exit(error.exit_code)
    except ClickException as error:
        error.show()
        sys.exit(2)
    except (Abort, KeyboardInterrupt):
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except MemoryError:
        _complain("out of memory", "A smaller --set train.batch_size, or fewer mentors.")
        sys.exit(3)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str, hint: str) -> None:
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(message, err=True)
    if hint:
        typer.echo(f"  {hint}", err=True)
