"""Help: quick, without torch, complete, and the same option the same in every command."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from cli_kit import environment, kdcli

from kdcli import __version__
from kdcli.cli import COMMANDS, _app

README = Path(__file__).resolve().parents[2] / "README.md"
GROUPS = {
    "recipes": ("ls", "cat", "cp"), "runs": ("ls", "show", "rm"), "zoo": ("ls", "add", "verify"),
    "data": ("ls", "pack"), "bank": ("build", "ls", "verify", "rm"),
}  # fmt: skip
WITHOUT_TABLE = {("recipes", "cp"), ("runs", "rm"), ("bank", "rm")}
EVERY = [(name,) for name in COMMANDS if name not in GROUPS] + [(g, sub) for g, subs in GROUPS.items() for sub in subs]


def options(*path: str) -> dict[str, object]:
    """The options of a command, by name."""
    command = typer.main.get_command(_app())
    for part in path:
        command = command.commands[part]  # pyright: ignore[reportAttributeAccessIssue]
    return {p.opts[0]: p for p in command.params if p.opts[0].startswith("--")}


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_help_of_every_command_ends_with_two_examples(path):
    said = kdcli(*path, "--help")
    assert f"Usage: kdcli {' '.join(path)}" in said.out
    after = said.out.partition("Examples:")[2]
    assert after.count(f"kdcli {' '.join(path)}") == 2
    assert said.own == []


def test_help_names_every_command_and_imports_neither_torch_nor_timm(tmp_path):
    code = (
        "import sys\nfrom kdcli.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as leaving:\n    assert not leaving.code\n"
        "heavy = {'torch', 'timm', 'torchvision', 'onnx', 'onnxruntime', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=tmp_path, check=True
    )
    assert done.stdout.rstrip().endswith("heavy: []")
    assert all(f" {name} " in done.stdout for name in COMMANDS)


def test_python_m_kdcli_is_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "kdcli", "--version"], capture_output=True, text=True, env=environment(), cwd=tmp_path
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"kdcli {__version__}")


def test_without_arguments_the_help_is_shown():
    said = kdcli(code=None)
    assert said.code in (0, 2)  # older versions of click think that this is no mistake
    assert "Usage: kdcli" in said.out + said.err
    assert all(name in said.out + said.err for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_readme_shows_every_command(name):
    assert f"kdcli {name}" in README.read_text(encoding="utf-8")


def test_an_option_means_the_same_in_every_command():
    seen: dict[str, dict[str, set[object]]] = {}
    for path in EVERY:
        for name, option in options(*path).items():
            facts = seen.setdefault(name, {"help": set(), "metavar": set(), "multiple": set()})
            for kind, values in facts.items():
                values.add(getattr(option, kind))
    shared = ("--data", "--student", "--teacher", "--peers", "--method", "--epochs", "--seed", "--device", "--out",
              "--set", "--recipe", "--json", "--resume", "--data-root", "--skip-corrupt", "--seeds",
              "--bank")  # fmt: skip
    for name in shared:
        assert {kind: len(values) for kind, values in seen[name].items()} == {"help": 1, "metavar": 1, "multiple": 1}, (
            name
        )


@pytest.mark.parametrize("name", ["distill", "check", "compare"])
def test_a_classroom_is_named_by_the_same_options(name):
    classroom = {"--data", "--student", "--teacher", "--peers", "--method", "--recipe", "--epochs", "--set", "--json"}
    assert classroom <= options(name).keys()


@pytest.mark.parametrize("path", [p for p in EVERY if p not in WITHOUT_TABLE], ids=" ".join)
def test_whatever_prints_a_table_prints_json_too(path):
    assert "--json" in options(*path)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["distil"], "distill"),
        (["distill", "--teachr", "x"], "--teacher"),
        (["runs", "remove"], "no such command"),
        (["distill", "--epochs", "many"], "--epochs"),
        (["distill", "--epochs", "0"], "--epochs"),
        (["recipes", "cat"], "name"),
        (["export", "a", "b"], "unexpected"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_mistyped_command_or_flag_is_a_usage_error(typed, says):
    said = kdcli(*typed, code=2)
    assert says in said.err.lower()
    assert "--help" in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_debug_may_stand_anywhere_and_shows_the_traceback():
    said = kdcli("runs", "show", "nothing", code=2)
    assert "Traceback" not in said.err
    from kdcli.errors import RecipeError

    with pytest.raises(RecipeError, match="nothing"):
        kdcli("runs", "show", "nothing", "--debug")
    with pytest.raises(RecipeError, match="nothing"):
        kdcli("--debug", "runs", "show", "nothing")


def test_a_fault_of_kdcli_itself_is_one_line_and_exit_1(monkeypatch):
    from kdcli.training import run

    monkeypatch.setattr(run, "every", lambda: 1 / 0)
    said = kdcli("runs", "ls", code=1)
    assert "ZeroDivisionError" in said.err
    assert "--debug" in said.err
    assert "Traceback" not in said.err
    with pytest.raises(ZeroDivisionError):
        kdcli("runs", "ls", "--debug")
