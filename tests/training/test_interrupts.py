"""SIGTERM and SIGINT to real training processes: they leave at once, resumable, wherever they are."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import engine_kit as kit
import process_kit as processes
import pytest
from process_kit import needs_kill, ran, started
from test_kills import PLAIN, outcome, resumed

from kdcli.errors import InterruptedRun
from kdcli.system.interrupts import Signals, Stop
from kdcli.training import loop
from kdcli.training.run import Run

COMMAND = ("distill", *PLAIN, "--method", "aver", "--epochs", "2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the command comes to when nobody stops it."""
    folder = tmp_path_factory.mktemp("whole")
    ran(folder, kit.home(), *COMMAND, "--out", folder / "run")
    return outcome(folder / "run")


@needs_kill
@pytest.mark.parametrize(
    ("slow", "stands"),
    [("step:1", None), ("mentors:3", (0, 2)), ("score:1", (0, 4)), ("sweep:2", (1, 0))]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [("setup:1", None), ("sweep:1", None), ("score:2", (1, 4)), ("mentors:8", (1, 3))]
    ],
)
def test_a_signal_need_not_wait(
    tmp_path: Path, whole: dict[str, object], slow: str, stands: tuple[int, int] | None
) -> None:
    """Set-up, a method's look through the data, a first step that compiles, mentors and scores may take minutes."""
    run = tmp_path / "run"
    with started(tmp_path, kit.home(), *COMMAND, "--out", run, slow=slow) as process:
        processes.wait_for(tmp_path / "begun", process)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGTERM)  # a second one loses nothing
        left = processes.left(process, tmp_path)
    assert left.code == 130, left.err
    assert "Traceback" not in left.err
    if run.is_dir():
        assert "SIGTERM" in left.err
        assert f"--resume {run}" in left.err
        assert Run(run).has_checkpoint == (stands is not None)
    if stands:
        state = Run(run).load_checkpoint()
        assert (state["epoch"], state["batch"]) == stands
    ran(tmp_path, kit.home(), *resumed(run, COMMAND))
    assert outcome(run) == whole


@needs_kill
def test_the_command_line_as_it_is_typed(tmp_path: Path, whole: dict[str, object]) -> None:
    run, out = tmp_path / "run", tmp_path / "out.txt"
    words = [sys.executable, "-m", "kdcli", *COMMAND[:-1], "2000", "--out", str(run)]
    env = {**os.environ, "KDCLI_HOME": str(kit.home()), "OMP_NUM_THREADS": "1"}
    with out.open("w") as file, subprocess.Popen(words, env=env, stdout=file, stderr=file) as process:
        end = time.monotonic() + processes.LONG
        while not (run / "last.ckpt").exists():
            assert process.poll() is None, out.read_text()
            assert time.monotonic() < end
            time.sleep(0.01)
        process.terminate()
        assert process.wait(processes.LONG) == 130
    assert "stopped by SIGTERM after" in out.read_text()
    assert Run(run).load_checkpoint()["epoch"] >= 1
    assert whole["recipe"] != Run(run).provenance["recipe"]


def test_a_signal_in_the_last_moment_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compare with streams of their own would go on with the next seed."""
    monkeypatch.setenv("KDCLI_HOME", str(kit.home()))
    opened = kit.session(kit.recipe(), tmp_path / "run")
    each = kit.at(2, 0, lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(InterruptedRun, match="after epoch 2"):
        kit.drive(loop.train(opened), each)


# --- Signals ----------------------------------------------------------------------------------------------------------


def test_a_signal_breaks_off_only_where_it_may() -> None:
    done = []
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        done.append("noted")
        with signals.breakable(when=False):
            done.append("not here")
        with pytest.raises(Stop), signals.breakable():
            done.append("never")
        signal.raise_signal(signal.SIGTERM)
    assert done == ["noted", "not here"]
    assert signals.caught == ["SIGTERM", "SIGTERM"]


def test_what_cleans_up_after_a_stop_is_not_broken_off() -> None:
    cleaned = []

    def works(signals: Signals) -> None:
        with signals.breakable():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)
                cleaned.append(True)

    with Signals() as signals, pytest.raises(Stop):
        works(signals)
    assert cleaned == [True]


def test_items_are_made_breakably_and_used_in_peace() -> None:
    seen = []

    def works(signals: Signals) -> None:
        for item in signals.each(range(5)):
            if item == 2:
                signal.raise_signal(signal.SIGINT)
            seen.append(item)

    with Signals() as signals, pytest.raises(Stop):
        works(signals)
    assert seen == [0, 1, 2]
