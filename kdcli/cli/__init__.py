"""The command line: one short file a command, which imports torch and the like when it is called, not for --help."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from kdcli import __version__
from kdcli.errors import KdcliError
from kdcli.system import user_code

# Newer typer includes a copy of click, older ones import it: the base class of what typer raises is taken from typer.
UsageError = typer.BadParameter.__bases__[0]

COMMANDS = (
    "quickstart", "distill", "compare", "train", "evaluate", "export", "bench", "check",
    "models", "recipes", "runs", "zoo", "data", "bank", "doctor",
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
        epilog="Start with `kdcli quickstart`. Your own images, one folder a class, are `--data folder:DIR`.",
    )

    @app.callback()
    def common(
        version: bool = typer.Option(
            False, "--version", help="Print the version and exit.", is_eager=True, callback=_version
        ),
        debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    ) -> None:
        """Both are read elsewhere: --version before anything else, --debug in `main`, wherever it is typed."""

    for name in COMMANDS:
        module = importlib.import_module(f"kdcli.cli.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            command = getattr(module, name)
            app.command(name, epilog=_examples(module.EXAMPLES))(command)
    return app


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"kdcli {__version__}")
        raise typer.Exit(0)


def _examples(lines: tuple[str, ...]) -> str:
    return "Examples:\n\n" + "\n\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with the code of its error (see `errors`); 1 is a bug in kdcli."""
    argv = sys.argv[1:] if argv is None else argv
    debug, ranked = "--debug" in argv, False
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
        from kdcli.cli import launch
        from kdcli.system import distributed

        ranked = distributed.expected_ranks() > 1
    try:
        with _sigterm_as_interrupt():
            if ranked:
                launch.enter(argv)
            code = _app()(
                args=[arg for arg in argv if arg != "--debug"], prog_name="kdcli", standalone_mode=False,
                obj=(main, argv),  # for ranks, which run the same command line
            )  # fmt: skip
            if ranked and code == 130:
                raise KeyboardInterrupt
            if ranked and not code:
                distributed.shutdown()
    except (Exception, KeyboardInterrupt) as error:
        if ranked:
            launch.leave(error, _report, debug=debug)
        if debug and not isinstance(error, (UsageError, typer.Abort, KeyboardInterrupt)):
            raise
        sys.exit(_report(error))
    if code == 130:  # typer handles Ctrl-C itself and prints nothing
        _print_error("interrupted", "", 130)
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C: half-written files are removed, and the exit code is that of an interruption."""

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(error: BaseException) -> int:
    """Print what went wrong and the cure in one paragraph; returns the exit code."""
    if isinstance(error, KdcliError):
        return _print_error(error.message, error.hint, error.exit_code)
    if isinstance(error, (typer.Abort, KeyboardInterrupt)):
        return _print_error("interrupted", "", 130)
    if isinstance(error, UsageError):
        return _usage(error)
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return _print_error("out of memory", "Use a smaller --set train.batch_size, or fewer mentors.", 3)
    if user_code.blame(error):
        return _print_error(
            user_code.words(error),
            "--debug shows the traceback; `kdcli check --method FILE.py:CLASS` tries a method.",
            2,
        )
    return _print_error(f"{type(error).__name__}: {text}", "This is a bug in kdcli; --debug shows the traceback.", 1)


def _usage(error: Any) -> int:
    """Print what is wrong with a command or flag; a command that needs arguments and has none shows its help."""
    message, where = error.format_message(), error.ctx.command_path if error.ctx else "kdcli"
    if type(error).__name__ == "NoArgsIsHelpError":  # constructing it has printed the help where rich formats it
        if message.strip():
            typer.echo(message)
        return 2
    return _print_error(message.strip(), f"`{where} --help` lists what is allowed.", 2)


def _print_error(message: str, hint: str, code: int) -> int:
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
    typer.echo(message, err=True)
    if hint:
        typer.echo(f"  {hint}", err=True)
    return code
