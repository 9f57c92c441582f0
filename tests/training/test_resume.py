"""Runs that are stopped, killed, starved of disk or tampered with: the same bits in the end, or a clear refusal."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import engine_kit as kit
import pytest
import torch
from torch import Tensor

from kdcli import recipe as recipes
from kdcli.errors import DataError, InterruptedRun, KdcliError, RecipeError, WeightsError
from kdcli.models import cards, checkpoint
from kdcli.recipe import Recipe
from kdcli.system import files
from kdcli.training.run import Run
from kdcli.training.session import Session
from kdcli.workflows import compare, groups


@pytest.fixture(autouse=True)
def _zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_HOME", str(kit.home()))


def raise_signal(number: int) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread alone")
    signal.raise_signal(number)


def interrupted(session: Session, epoch: int, batch: int, number: int = signal.SIGTERM) -> InterruptedRun:
    """Train until a signal arrives after that batch (0: the end of the epoch); no further step is begun."""
    with pytest.raises(InterruptedRun) as caught:
        kit.drive(groups.go(session), kit.at(epoch, batch, lambda _: raise_signal(number)))
    return caught.value


# the richest state there is: two learners' worth of optimiser, average, scaler, generator, dropout, and holdout's best
FULL = {"train.ema": 0.9, "data.holdout": 0.05, "train.schedule": "cosine", "train.nesterov": True}


@pytest.fixture
def dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Students that draw random numbers in every step."""
    from kdcli.models import registry

    create = registry.create

    def with_dropout(*args: Any, **options: Any) -> registry.Net:
        net = create(*args, **options)
        net.module.head_drop.p = 0.5  # pyright: ignore
        return net

    monkeypatch.setattr(registry, "create", with_dropout)


@pytest.mark.usefixtures("dropout")
@pytest.mark.parametrize(
    ("epoch", "batch", "stands"),
    [(1, 1, (0, 1)), (1, 3, (0, 3)), (1, 4, (0, 4)), (1, 0, (1, 0)), (2, 2, (1, 2)), (2, 0, (2, 0))],
    ids=["early", "before the last batch", "before the score", "between epochs", "late", "at the end"],
)
def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path, epoch: int, batch: int, stands: tuple[int, int]) -> None:
    config = kit.recipe("classroom", **FULL)
    whole = kit.trained(config, tmp_path / "whole")
    stopped = kit.session(config, tmp_path / "run")
    told = interrupted(stopped, epoch, batch)
    assert told.exit_code == 130
    assert "SIGTERM" in told.message
    assert str(tmp_path / "run") in told.hint
    assert "--resume" in told.hint
    state = stopped.run.load_checkpoint()
    assert (state["epoch"], state["batch"]) == stands
    assert not stopped.run.finished
    again = kit.session(config, tmp_path / "run", resume=True)
    kit.drive(groups.go(again, resume=True))
    assert kit.same(kit.student(again.run), kit.student(whole))
    assert again.run.metrics() == whole.metrics()
    facts, expected = again.run.provenance, whole.provenance
    assert [facts[key] for key in ("score", "best", "best_epoch", "epoch")] == [
        expected[key] for key in ("score", "best", "best_epoch", "epoch")
    ]


def test_a_run_may_be_stopped_many_times(tmp_path: Path) -> None:
    config = kit.recipe("aver")
    whole = kit.trained(config, tmp_path / "whole")
    interrupted(kit.session(config, tmp_path / "run"), 1, 1, signal.SIGINT)
    for epoch, batch in [(1, 3), (2, 1)]:
        again = kit.session(config, tmp_path / "run", resume=True)
        with pytest.raises(InterruptedRun, match="SIGINT"):
            kit.drive(groups.go(again, resume=True), kit.at(epoch, batch, lambda _: raise_signal(signal.SIGINT)))
    last = kit.session(config, tmp_path / "run", resume=True)
    kit.drive(groups.go(last, resume=True))
    assert kit.same(kit.student(last.run), kit.student(whole))
    assert last.run.metrics() == whole.metrics()


def test_signals_are_given_back_after_training(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    opened = kit.session(kit.recipe(), tmp_path / "run")
    during = {}
    kit.drive(groups.go(opened), kit.at(1, 1, lambda _: during.update({1: signal.getsignal(signal.SIGTERM)})))
    assert during[1] is not before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_second_sigint_breaks_in(tmp_path: Path) -> None:
    opened = kit.session(kit.recipe(), tmp_path / "run")

    def twice(_: Any) -> None:
        raise_signal(signal.SIGINT)
        raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        kit.drive(groups.go(opened), kit.at(1, 1, twice))


@pytest.mark.usefixtures("dropout")
@pytest.mark.parametrize(("epoch", "batch"), [(1, 2), (2, 1)])
def test_a_stopped_compare_ends_with_the_same_bits(tmp_path: Path, epoch: int, batch: int) -> None:
    config, methods, seeds = kit.recipe("classroom"), ["classroom"], [0, 1]

    whole = kit.compared(config, tmp_path / "whole", methods, seeds)
    with pytest.raises(InterruptedRun):
        kit.compared(
            config, tmp_path / "run", methods, seeds, kit.at(epoch, batch, lambda _: raise_signal(signal.SIGTERM))
        )
    assert not (tmp_path / "run" / "compare.json").exists()
    compare.resume(Run(tmp_path / "run"), kit.CPU, kit.follow)
    for learner in whole.runs:
        a, b = Run(tmp_path / "whole" / learner), Run(tmp_path / "run" / learner)
        assert kit.same(kit.student(a), kit.student(b)), learner
        assert a.metrics() == b.metrics(), learner
    told = [json.loads((tmp_path / name / "compare.json").read_text()) for name in ("whole", "run")]
    assert told[0]["lines"] == told[1]["lines"]


# --- killed -----------------------------------------------------------------------------------------------------------

VICTIM = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
import torch
import engine_kit as kit
from kdcli.workflows import groups

torch.set_num_threads(1)
save, count = torch.save, 0

def killed_while_writing(state, path):
    global count
    count += 1
    save(state, path)
    if count == 2:
        with open(path, "rb+") as file:
            file.truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = killed_while_writing
kit.drive(groups.go(kit.session(kit.recipe("classroom", **{"train.epochs": 3}), Path(sys.argv[3]))))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_run_killed_in_the_middle_of_its_checkpoint_ends_with_the_same_bits(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parents[1]
    config = kit.recipe("classroom", **{"train.epochs": 3})
    whole = kit.trained(config, tmp_path / "whole")
    victim = subprocess.run(
        [sys.executable, "-c", VICTIM, str(here), str(here.parent), str(tmp_path / "run")],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert victim.returncode == -signal.SIGKILL, victim.stderr
    run = Run(tmp_path / "run")
    torn = list(run.path.glob(".last.ckpt.*"))
    assert [path.stat().st_size for path in torn] == [1000]
    assert len(run.metrics()) == 2  # the second epoch was logged, but its checkpoint is not there
    again = kit.session(config, run.path, resume=True)
    kit.drive(groups.go(again, resume=True))
    assert kit.same(kit.student(run), kit.student(whole))
    assert run.metrics() == whole.metrics()
    assert not list(run.path.glob(".*"))


def test_a_run_killed_before_its_student_was_written_only_writes_it(tmp_path: Path) -> None:
    run = kit.trained(kit.recipe(), tmp_path / "run")
    before = kit.student(run)
    (run.path / "student.safetensors").unlink()
    (run.path / "student.toml").unlink()
    again = kit.session(kit.recipe(), tmp_path / "run", resume=True)
    assert kit.drive(groups.go(again, resume=True)) == []
    assert kit.same(kit.student(run), before)


def test_a_last_line_cut_off_by_a_kill_is_forgotten(tmp_path: Path) -> None:
    config = kit.recipe()
    whole = kit.trained(config, tmp_path / "whole")
    interrupted(kit.session(config, tmp_path / "run"), 2, 1)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lr": 0.0')
    again = kit.session(config, tmp_path / "run", resume=True)
    kit.drive(groups.go(again, resume=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (whole.path / "metrics.jsonl").read_text()


# --- what may not be resumed ------------------------------------------------------------------------------------------


def test_other_pictures_are_refused(tmp_path: Path) -> None:
    opened = kit.session(kit.recipe(), tmp_path / "run")
    room = kit.classroom(kit.recipe())
    groups.check_unchanged(opened.run, room)
    room.data.hash = "another"
    with pytest.raises(WeightsError, match="other images than digits") as caught:
        groups.check_unchanged(opened.run, room)
    assert caught.value.exit_code == 3


def test_other_mentors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_HOME", str(tmp_path / "home"))
    config = kit.recipe("kd", **{"classroom.teacher": kit.MENTORS[0], "classroom.peers": []})
    kit.add_mentor(kit.MENTORS[0], 1)
    opened = kit.session(config, tmp_path / "run")
    groups.check_unchanged(opened.run, kit.classroom(config))
    kit.add_mentor(kit.MENTORS[0], 2)  # newer, so the bare name finds it
    with pytest.raises(WeightsError, match=f"mentor {kit.MENTORS[0]} had other weights") as caught:
        groups.check_unchanged(opened.run, kit.classroom(config))
    assert caught.value.exit_code == 3
    assert "@PATH" in caught.value.hint


def stopped_run(tmp_path: Path) -> Run:
    opened = kit.session(kit.recipe(), tmp_path / "run")
    interrupted(opened, 1, 2)
    return opened.run


def resume(run: Run, config: Recipe | None = None) -> None:
    kit.drive(groups.go(kit.session(config or kit.recipe(), run.path, resume=True), resume=True))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-2000]), "truncated"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.write_bytes(b"not a checkpoint at all"), "truncated"),
        (lambda path: torch.save({"epoch": 3}, path), "not a kdcli checkpoint"),
        (lambda path: torch.save([torch.zeros(2)], path), "not a kdcli checkpoint"),
    ],
    ids=["truncated", "empty", "text", "foreign", "a list"],
)
def test_a_broken_checkpoint_is_named(tmp_path: Path, damage: Any, says: str) -> None:
    run = stopped_run(tmp_path)
    damage(run.path / "last.ckpt")
    with pytest.raises(WeightsError, match=says) as caught:
        resume(run)
    assert "last.ckpt" in caught.value.message
    assert caught.value.exit_code == 3
    assert "--out" in caught.value.hint


def test_a_checkpoint_of_another_student_is_refused(tmp_path: Path) -> None:
    run = stopped_run(tmp_path)
    with pytest.raises(WeightsError, match="not a checkpoint of this recipe") as caught:
        resume(run, kit.recipe(**{"classroom.student": "cifar_resnet8"}))
    assert "recipe.toml" in caught.value.hint


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    run = stopped_run(tmp_path)
    with pytest.raises(RecipeError, match="has no learner aver"):
        resume(run, kit.recipe("aver"))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    run = stopped_run(tmp_path)
    torch.save({"epoch": Path("x"), "batch": 0, "learners": print}, run.path / "last.ckpt")
    with pytest.raises(WeightsError, match=r"last\.ckpt"):
        resume(run)


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path: Path) -> None:
    run = stopped_run(tmp_path)
    with pytest.raises(RecipeError, match="already holds a run") as caught:
        kit.session(kit.recipe(), run.path)
    assert f"--resume {run.path}" in caught.value.hint


# --- a full disk ------------------------------------------------------------------------------------------------------


def tensors(found: Any) -> list[Tensor]:
    """Every tensor anywhere inside."""
    if isinstance(found, Tensor):
        return [found]
    values = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else []
    return [tensor for value in values for tensor in tensors(value)]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EACCES, "Permission denied")],
    ids=["full", "forbidden"],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    whole = kit.trained(kit.recipe(), tmp_path / "whole")
    opened, save, count = kit.session(kit.recipe(), tmp_path / "run"), torch.save, []

    def failing(state: Any, path: Path) -> None:
        count.append(path)
        save(state, path)
        if len(count) == 2:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing)
        with pytest.raises(DataError, match=r"cannot write .*last\.ckpt.*untouched") as caught:
            kit.drive(groups.go(opened))
    assert caught.value.exit_code == 3
    assert "--resume" in caught.value.hint
    assert ("disk is full" in caught.value.message) == (error.errno == errno.ENOSPC)
    assert opened.run.load_checkpoint()["epoch"] == 1
    assert not list((tmp_path / "run").glob(".*"))
    resume(opened.run)
    assert kit.same(kit.student(opened.run), kit.student(whole))
    assert opened.run.metrics() == whole.metrics()


def test_torchs_own_word_for_a_full_disk_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):  # with room on the disk it is something else
        files.write_atomic(tmp_path / "x", fails)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    with pytest.raises(DataError, match="the disk is full"):
        files.write_atomic(tmp_path / "x", fails)
    assert list(tmp_path.iterdir()) == []


def test_a_score_line_that_cannot_be_written_is_a_clear_word(tmp_path: Path) -> None:
    opened = kit.session(kit.recipe(), tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match=r"cannot write .*metrics\.jsonl"):
        kit.drive(groups.go(opened))


@pytest.mark.parametrize("what", ["student", "card"])
def test_a_student_that_cannot_be_written_is_a_clear_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    opened, write = kit.session(kit.recipe(), tmp_path / "run"), cards._write
    suffix = {"student": ".safetensors", "card": ".toml"}[what]

    def full(path: Path, data: bytes) -> None:
        if path.suffix == suffix:
            raise WeightsError(f"no space left to write {path}")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(cards, "_write", full)
        with pytest.raises(KdcliError, match=f"no space left.*{suffix}") as caught:
            kit.drive(groups.go(opened))
    assert caught.value.exit_code == 3
    resume(opened.run)
    assert checkpoint.digest(kit.student(opened.run)) == checkpoint.digest(kit.state(opened.learners[0]))


# --- what a checkpoint holds ------------------------------------------------------------------------------------------


def test_no_mentor_is_ever_in_a_checkpoint(tmp_path: Path) -> None:
    opened = kit.session(kit.recipe("classroom", **{"train.ema": 0.9}), tmp_path / "run")
    before = [checkpoint.digest(mentor.net) for mentor in opened.mentors.members]
    kit.drive(groups.go(opened))
    state = opened.run.load_checkpoint()
    held = {checkpoint.digest({"x": tensor}) for tensor in tensors(state) if tensor.numel() > 20}
    assert len(held) > 10
    for mentor in opened.mentors.members:
        theirs = {
            checkpoint.digest({"x": tensor}) for tensor in mentor.net.state_dict().values() if tensor.numel() > 20
        }
        assert not held & theirs
    assert [checkpoint.digest(mentor.net) for mentor in opened.mentors.members] == before
    assert not any(mentor.training for mentor in opened.mentors.members)
    assert not any(p.requires_grad for mentor in opened.mentors.members for p in mentor.parameters())
    assert all(p.grad is None for mentor in opened.mentors.members for p in mentor.parameters())


def test_a_checkpoint_is_smaller_than_its_parts_and_safe_to_read(tmp_path: Path) -> None:
    """Weights, momentum and a little more; nothing but tensors and plain values."""
    opened = kit.session(kit.recipe("classroom"), tmp_path / "run")
    kit.drive(groups.go(opened))
    student = sum(v.numel() * v.element_size() for v in opened.learners[0].student.state_dict().values())
    size = sum(v.numel() * v.element_size() for v in tensors(opened.run.load_checkpoint()))
    assert student < size < 3 * student
    assert recipes.load(str(tmp_path / "run" / "recipe.toml")).hash() == kit.recipe("classroom").hash()
