"""The READMEs: short, their links and paths exist, the promised commands are in them, and their tables are complete."""

import re
from pathlib import Path

import pytest

from kdcli.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
METHODS_README = ROOT / "kdcli" / "methods" / "README.md"
PAGES = [README, ROOT / "recipes" / "RESULTS.md", ROOT / "tests" / "README.md", *sorted(ROOT.glob("kdcli/*/README.md"))]
PROMISED = """\
kdcli distill --teacher resnet34 --peers mobilenetv3_small,regnetx_004 --student resnet18 --data imagenet
kdcli export --onnx
kdcli compare --methods aver,classroom
"""
TESTS = 'pip install -e ".[test]" && pytest'
BUILT_IN = {name for name, path in METHODS.items() if path.startswith("kdcli.")}  # tests register others
FIGURE = re.compile(r"\d ?%|±|\d (s|ms|MiB|KiB)\b|\btimes as fast\b")


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[str]:
    """Its code blocks that are not in a language of their own."""
    return re.findall(r"^```\n(.*?)^```$", text(page), re.M | re.S)


def test_the_readme_is_read_in_five_minutes():
    lines = text(README).splitlines()
    assert len(lines) < 200
    assert max(map(len, lines)) <= 160


def test_the_two_commands_and_the_three_lines_are_exact():
    assert blocks(README)[:3] == [
        "pip install -e . && kdcli quickstart\n",
        f"{TESTS}\n",
        PROMISED,
    ]
    assert TESTS in text(ROOT / ".ci" / "run").splitlines()


def test_measured_figures_are_in_results():
    """A figure needs its machine, command and seeds, for which a short page has no room."""
    assert [line for line in text(README).splitlines() if FIGURE.search(line)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_exist(page):
    links = [one for one in re.findall(r"\]\(([^)#\s]+)\)", text(page)) if "://" not in one]
    assert [one for one in links if not (page.parent / one).exists()] == []
    named = re.findall(r"`((?:kdcli|tests|recipes|zoo)/[\w./-]*)(?=[`\s])", text(page))
    assert [one for one in named if not (ROOT / one).exists() and "NAME" not in one] == []


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(([^)#\s]+)\)", text(README)))
    assert {page.relative_to(ROOT).as_posix() for page in PAGES} - {"README.md"} <= linked


def test_the_tree_is_what_is_there():
    (tree,) = [block for block in blocks(README) if block.startswith("kdcli/\n")]
    rooms = set(re.findall(r"^  (\w+)/ ", tree, re.M))
    modules = set(re.findall(r"^  (\w+\.py) ", tree, re.M))
    assert rooms == {path.parent.name for path in (ROOT / "kdcli").glob("*/__init__.py")}
    assert modules == {path.name for path in (ROOT / "kdcli").glob("*.py") if not path.name.startswith("__")}


def test_the_layers_name_every_room_once():
    (layers,) = [block for block in blocks(README) if block.startswith("cli > ")]
    named = re.findall(r"\w+", layers)
    assert len(named) == len(set(named))
    assert set(named) == {path.parent.name for path in (ROOT / "kdcli").glob("*/__init__.py")} | {"recipe", "errors"}


def test_the_tables_of_methods_are_complete():
    kinds, rows = text(METHODS_README).split("## What each method needs and costs")
    assert set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| .*", kinds, re.M)))) >= BUILT_IN
    costs = rows.partition("## A method of your own")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", costs, re.M)) == {*BUILT_IN, "tekap-both"}
