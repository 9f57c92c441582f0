"""What the terminal sees: tables that fit, commands that can be copied."""

import pytest
from rich.console import Console

from kdcli.cli import tables


@pytest.fixture
def narrow(monkeypatch):
    """An 80-column terminal's text."""
    console = Console(width=80, highlight=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    monkeypatch.setattr(tables, "console", console)
    return lambda: console.export_text().splitlines()


def test_numbers_go_right_and_words_left(narrow):
    tables.table(["name", "count", "said"], [["a", "1,234", "yes"], ["bb", "5", "certainly"]])
    assert [line.rstrip() for line in narrow()] == ["name  count  said", "a     1,234  yes", "bb        5  certainly"]


def test_one_long_column_of_words_wraps_and_the_others_do_not(narrow):
    tables.table(["name", "what", "n"], [["x" * 30, "several words " * 6, "12"]])
    lines = narrow()
    assert lines[1].startswith("x" * 30)
    assert lines[1].rstrip().endswith("12")
    assert all(len(line) <= 80 for line in lines)
    assert len(lines) > 2


def test_a_table_too_wide_for_the_terminal_is_written_row_by_row(narrow):
    path = "runs/20261121-020828-cifar_resnet10_xxs-classroom/student.onnx"
    tables.table(["file", "size", "p50 ms", "p90 ms", "images/s"], [[path, "52.8 KiB", "0.058", "0.058", "17,250"]])
    lines = narrow()
    assert lines[0].strip() == path
    assert lines[1].strip() == "size 52.8 KiB, p50 ms 0.058, p90 ms 0.058, images/s 17,250"


def test_a_long_heading_does_not_push_the_values_away(narrow):
    tables.table(["p" * 90, "what"], [["size", "52.8 KiB"]])
    lines = narrow()
    assert lines[0].strip() == "what " + "p" * 90
    assert lines[-1].split() == ["size", "52.8", "KiB"]


def test_a_command_to_type_is_never_broken_in_two(narrow):
    command = "kdcli evaluate runs/" + "x" * 100 + "/student.onnx"
    tables.next_line(command)
    tables.notes([("data.name", "y" * 100, "no train/ and val/ [0]")])
    lines = narrow()
    assert lines[1] == f"Next: {command}"
    assert lines[2] == f"data.name {'y' * 100} (no train/ and val/ [0])"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "under a second"), (45, "45 s"), (600, "10.0 min"), (9000, "2.5 h"), (3e5, "3.5 days")]
)
def test_durations_are_in_the_unit_a_person_would_use(seconds, words):
    assert tables.duration(seconds) == words


def test_counts_and_sizes():
    assert [tables.count(n) for n in (12, 1736564, 4.1e9)] == ["12", "1.74 M", "4.10 G"]
    assert [tables.size(n) for n in (2048, 3 * 2**20)] == ["2.0 KiB", "3.00 MiB"]


def test_the_bar_leaves_the_end_of_a_training_on_the_screen(monkeypatch, tmp_path):
    """On a terminal the events are shown; elsewhere nothing is printed."""
    from types import SimpleNamespace

    from kdcli.tasks import Classify
    from kdcli.training.meters import EpochMeter
    from kdcli.training.session import Step

    score = SimpleNamespace(value=50.0)
    learner = SimpleNamespace(name="classroom", meter=EpochMeter(), task=Classify(10), training_score=lambda: score)
    events = [Step(1, 1, n, 2, 8 * n, 1.0 * n, [learner]) for n in (1, 2)]  # pyright: ignore[reportArgumentType]
    with open(tmp_path / "out", "w+") as file:
        monkeypatch.setattr(tables, "console", Console(width=80, force_terminal=True, file=file))
        tables.follow(iter(events), "classroom")
        file.seek(0)
        text = file.read()
    assert "2/2" in text
    assert "epoch 1/1 8 img/s top-1 50.0%" in text
