"""Training processes killed at any moment, and resumed until they are through: the bits of one never stopped."""

import json
import random
import signal
import time
from pathlib import Path

import engine_kit as kit
import process_kit as processes
import pytest
from process_kit import Fault, needs_kill, ran, started

pytestmark = needs_kill

CLASSROOM = ("--teacher", kit.MENTORS[1], "--peers", kit.MENTORS[0], "--student", "cifar_resnet10_xxs")
PLAIN = (*CLASSROOM, "--data", "digits", "--device", "cpu", "--set", "data.per_class=3", "--set", "data.image_size=8",
         "--set", "train.batch_size=8", "--set", "classroom.precision=fp32")  # fmt: skip
RICH = (*PLAIN, "--set", "train.ema=0.9", "--set", "data.holdout=0.1", "--set", "train.checkpoint_minutes=0.0004")
"""Everything that has state, with a checkpoint after about every second update."""
COMMANDS = {
    "distill": ("distill", *RICH),
    "compare": ("compare", *RICH, "--methods", "classroom", "--seeds", "2"),
    "independent": ("compare", *RICH, "--methods", "aver", "--seeds", "2", "--independent"),
}
CALLS = {"replace": 30, "fsync": 50, "save": 12, "unlink": 20}  # how many of each a short run makes, about


def outcome(run: Path) -> dict[str, object]:
    """What may not depend on how often a run was stopped: students to the byte, metrics to the letter, the table."""
    files = [*run.rglob("student.safetensors"), *run.rglob("metrics.jsonl")]
    out: dict[str, object] = {str(file.relative_to(run)): file.read_bytes() for file in files}
    if (run / "compare.json").is_file():
        out["lines"] = json.loads((run / "compare.json").read_text())["lines"]
    facts = json.loads((run / "provenance.json").read_text())
    return out | {key: facts.get(key) for key in ("score", "last", "best", "best_epoch", "epoch", "recipe")}


def resumed(run: Path, command: tuple[str, ...]) -> tuple[str, ...]:
    """How the command goes on; typed again where it was killed before anything was written."""
    if (run / "provenance.json").is_file():
        return (command[0], "--resume", str(run), "--device", "cpu")
    return (*command, "--out", str(run))


def finished(run: Path, command: tuple[str, ...]) -> bool:
    """Whether the kill came after the last write."""
    if command[0] == "compare":
        return (run / "compare.json").is_file()
    return (run / "provenance.json").is_file() and json.loads((run / "provenance.json").read_text()).get("finished")


def reached(run: Path) -> str:
    """How far it had come."""
    rows = [len(file.read_text().splitlines()) for file in run.rglob("metrics.jsonl")]
    parts = [path.name for path in run.rglob("*.tmp")]
    held = sorted(path.name for path in run.rglob("*.ckpt"))
    return f"rows {rows}, checkpoints {held}, half written {parts}" if run.is_dir() else "no folder yet"


def killed_and_resumed(
    folder: Path, name: str, kills: int, seed: int, faults: list[Fault | float], epochs: int = 3
) -> list[str]:
    """Kill a command `kills` times at random moments or at `faults`, resuming each time; what the kills hit."""
    dice, command, home = random.Random(seed), (*COMMANDS[name], "--epochs", str(epochs)), kit.home()
    began = time.monotonic()
    ran(folder, home, *command, "--out", folder / "whole")
    length = time.monotonic() - began
    whole, hits, number = outcome(folder / "whole"), [], 0
    plan = list(faults)
    while True:
        run = folder / f"run-{number}"
        fate = None if len(hits) >= kills else plan.pop(0) if plan else _drawn(dice, length)
        fault = fate if isinstance(fate, Fault) else None
        with started(folder, home, *resumed(run, command), fault=fault) as process:
            if isinstance(fate, float):
                process.join(fate)
                process.kill()
            left = processes.left(process, folder)
        if left.code == -signal.SIGKILL:
            hits.append(f"{fate}: {reached(run)}")
            if not finished(run, command):
                continue
        else:
            assert left.code == 0, f"{fate} after {hits}:\n{left.err}"
        assert outcome(run) == whole, f"after {hits}"
        assert not [path for path in run.rglob("*") if path.name.startswith(".") or path.name == "previous.ckpt"]
        if len(hits) >= kills:
            return hits
        number += 1  # it got through before its end: on with another


def _drawn(dice: random.Random, length: float) -> Fault | float:
    if dice.random() < 0.4:
        return dice.uniform(0, length)
    call = dice.choice(list(CALLS))
    return Fault(call, dice.randint(1, CALLS[call]), dice.choice(["before", "after", "half"]))


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("distill", [Fault("replace", 2, "before"), Fault("save", 2, "half"), Fault("replace", 7, "after")]),
        ("compare", [Fault("replace", 4, "after"), Fault("save", 5, "before")]),
    ],
)
def test_a_killed_command_ends_with_the_same_bits(tmp_path: Path, name: str, faults: list[Fault | float]) -> None:
    """At the layout of the folders, within a checkpoint, between its two names, and wherever the calls happen to be."""
    killed_and_resumed(tmp_path, name, len(faults), 0, faults)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(COMMANDS))
def test_twenty_kills_leave_the_same_bits(tmp_path: Path, name: str) -> None:
    hits = killed_and_resumed(tmp_path, name, 20, 1, [], epochs=8)
    print(name, *hits, sep="\n")
    assert len(hits) == 20
