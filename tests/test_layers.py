"""Imports go down the layers of DESIGN section 4 only, and no files import each other in a circle."""

from pathlib import Path

import structure

FOUND = structure.read(Path(__file__).resolve().parent.parent / "kdcli")


def test_every_room_has_a_layer():
    known = set().union(*structure.LAYERS) | structure.FREE
    assert set(FOUND.rooms) <= known, "add the room to tests/structure.py LAYERS, and to the README's architecture"


def test_imports_go_down_only():
    assert FOUND.upward == []


def test_no_circle_between_files():
    assert FOUND.circles == []


def test_the_reader_sees_every_kind_of_import(tmp_path: Path):
    package = tmp_path / "kdcli"
    for name, text in {
        "losses/x.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kdcli.cli import y\n",
        "cli/y.py": "def f():\n    import kdcli.losses.x\n",
        "cli/__init__.py": "",
        "tasks/z.py": "from kdcli.export import w\n",
        "export/w.py": '"""Doc."""\n\n# comment\nx = (\n    1\n)\n',
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    found = structure.read(package)
    assert found.upward == [("losses/x.py", "cli/y.py"), ("tasks/z.py", "export/w.py")]
    assert found.circles == [["cli/y.py", "losses/x.py"]]
    assert found.rooms["export"].code == 3
