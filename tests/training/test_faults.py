"""What breaks around a run: a full disk at every write, broken checkpoints, memory, clocks, two writers, divergence."""

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_kit as kit
import pytest
import torch
from cli_kit import Said, kdcli
from torch import Tensor, nn

from kdcli.errors import DataError, DivergedError, LockedError, OutOfMemory, WeightsError
from kdcli.methods.baselines import NoKD
from kdcli.models import cards
from kdcli.system import device as devices, files, lock
from kdcli.training import evaluate, learner as learners, loop, run as runs
from kdcli.training.learner import Learner
from kdcli.training.run import Run
from kdcli.training.session import EpochEnd, Notice, Session, Step
from kdcli.workflows import groups


@pytest.fixture(autouse=True)
def _zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_HOME", str(kit.home()))


def notices(events: list[Any]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice)]


def stopped(session: Session, epoch: int, batch: int) -> Run:
    """Leave a training after a batch without a word, as a kill does."""
    events = groups.go(session)
    for event in events:
        if isinstance(event, Step) and (event.epoch, event.batch) == (epoch, batch):
            break
    events.close()
    return session.run


def resumed(config: Any, run: Run) -> list[str]:
    """Resume to the end; what was said."""
    return notices(kit.drive(groups.go(kit.session(config, run.path, resume=True), resume=True)))


def same_outcome(one: Run, other: Run) -> bool:
    facts = [
        {key: run.provenance[key] for key in ("score", "last", "best", "best_epoch", "epoch")} for run in (one, other)
    ]
    return kit.same(kit.student(one), kit.student(other)) and one.metrics() == other.metrics() and facts[0] == facts[1]


# --- a disk that is full ----------------------------------------------------------------------------------------------

SMALL = ("--set", "data.per_class=3", "--set", "data.image_size=8", "--set", "train.batch_size=8", "--epochs", "2",
         "--data", "digits", "--device", "cpu")  # fmt: skip
ROOM = ("--teacher", kit.MENTORS[1], "--peers", kit.MENTORS[0], "--student", "cifar_resnet10_xxs",
        "--set", "classroom.precision=fp32")  # fmt: skip
WRITERS = {
    "train": ("train", "--model", "cifar_resnet10_xxs", "--keep", "1", "--set", "data.holdout=0.1",
              "--set", "train.tensorboard=true", *SMALL),
    "compare": ("compare", "--methods", "aver", "--seeds", "1", *ROOM, *SMALL),
}  # fmt: skip


def again(command: tuple[str, ...], run: Path) -> Said:
    """Resume it; typed anew where nothing had been written."""
    if (run / "provenance.json").is_file():
        return kdcli(command[0], "--resume", run, "--device", "cpu")
    return kdcli(*command, "--out", run)


def outcome(run: Path) -> dict[str, object]:
    out: dict[str, object] = {
        str(file.relative_to(run)): file.read_bytes()
        for file in run.rglob("*")
        if file.name == "metrics.jsonl" or file.suffix == ".safetensors"
    }
    if (run / "compare.json").is_file():
        out["lines"] = json.loads((run / "compare.json").read_text())["lines"]
    return out


def each_call_fails_once(name: str, call: str, where: Path, patch: pytest.MonkeyPatch, every: int) -> int:
    """Let the disk be full at the first, second, ... `call`, resuming after each; how many calls a whole run makes."""
    command, whole, count, limit = WRITERS[name], getattr(os, call), 0, 0

    def full(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(*args, **options)

    patch.setattr(os, call, full)
    kdcli(*command, "--out", where / "whole")
    expected, calls = outcome(where / "whole"), count
    for limit in range(1, calls + 1, every):
        run, count = where / f"run-{limit}", 0
        said = kdcli(*command, "--out", run, code=None)
        assert said.code in (0, 3), said.err  # 0: the flush of a folder's names is not worth a run
        if said.code == 3:
            assert "the disk is full" in said.err, said.err
            assert "--resume" in said.err or "kdcli runs rm" in said.err
        assert not list(run.rglob(".*.tmp"))
        limit = 0  # there is space again
        again(command, run)
        assert outcome(run) == expected, f"{call} {count}"
        assert not list(run.rglob("previous.ckpt"))
    return calls


def test_a_disk_that_is_full_at_any_rename_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="needs the tensorboard extra")
    monkeypatch.setenv("KDCLI_HOME", str(tmp_path / "home"))
    assert each_call_fails_once("train", "replace", tmp_path, monkeypatch, 2) >= 12


@pytest.mark.slow
@pytest.mark.parametrize(("name", "call"), [("train", "fsync"), ("compare", "replace"), ("compare", "fsync")])
def test_a_disk_that_is_full_at_any_write_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    if name == "train":
        monkeypatch.setenv("KDCLI_HOME", str(tmp_path / "home"))
    assert each_call_fails_once(name, call, tmp_path, monkeypatch, 1) >= 12


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB that can really be full."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, check=False
        )
    except OSError:
        done = None
    if done is None or done.returncode:
        pytest.skip("may not mount a small disk here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_really_full(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With little, more and much left: the write that fails is another each time, torch's own ones among them."""
    monkeypatch.setenv("KDCLI_HOME", str(tmp_path / "home"))
    pytest.importorskip("tensorboard", reason="needs the tensorboard extra")
    kdcli(*WRITERS["train"], "--out", tmp_path / "whole")
    expected, codes = outcome(tmp_path / "whole"), []
    for free in (0, 8, 16, 40, 200, 400, 600, 800, 1000):  # KiB
        run, ballast = small_disk / "run", small_disk / "ballast"
        ballast.write_bytes(b"")
        with ballast.open("r+b", buffering=0) as file:
            while file.write(bytes(1 << 14)) == 1 << 14:
                if os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize <= free << 10:
                    break
        said = kdcli(*WRITERS["train"], "--out", run, code=None)
        codes.append(said.code)
        assert said.code in (0, 3), f"{free} KiB: {said.err}"
        if said.code == 3:
            assert "the disk is full" in said.err, f"{free} KiB: {said.err}"
        assert not list(run.rglob(".*.tmp"))
        ballast.unlink()
        again(WRITERS["train"], run)
        assert outcome(run) == expected, f"{free} KiB"
        Run(run).remove()
    assert codes.count(3) >= 5


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    files.append_line(path, "one")

    def full(_: int) -> None:
        assert path.read_text() == "one\ntwo\n"
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="the disk is full"):
            files.append_line(path, "two")
    assert path.read_text() == "one\n"
    files.append_line(path, "three")
    assert path.read_text() == "one\nthree\n"


# --- broken checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_no_flipped_bit_and_no_cut_changes_what_is_loaded(tmp_path: Path) -> None:
    """A damaged archive is refused, by its CRCs or by torch.load, or gives the same bits: never others without a word.

    torch.load alone takes flipped bits for weights, and reads a member flagged as a folder from uninitialised memory.
    """
    state = {"epoch": 3, "learners": {f"w{n}": torch.randn(3 + n) for n in range(3)}}
    path, broken, dice, silent = tmp_path / "a.ckpt", tmp_path / "b.ckpt", random.Random(0), 0
    torch.save(state, path)
    whole = path.read_bytes()
    assert files.is_whole_zip(path)
    folders = {place + 38 for place in range(len(whole)) if whole[place : place + 4] == b"PK\1\2"}
    assert len(folders) >= 5

    def loads_as_before(damaged: bytes) -> bool | None:
        """None: torch.load refuses it."""
        broken.write_bytes(damaged)
        try:
            found = torch.load(broken, weights_only=True)
            return found["epoch"] == 3 and all(x.equal(state["learners"][key]) for key, x in found["learners"].items())
        except Exception:
            return None

    def noticed(damaged: bytes) -> bool:
        broken.write_bytes(damaged)
        return not files.is_whole_zip(broken) or loads_as_before(damaged) is not False

    for place in {*range(0, len(whole), 3), *folders}:
        bit = 4 if place in folders else dice.randrange(8)  # bit 4 flags a member as a folder
        damaged = whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
        assert noticed(damaged), (place, bit)
        silent += place % 8 == 0 and loads_as_before(damaged) is False
    assert silent > 1  # so torch.load alone would not do
    for _ in range(200):
        place, length = dice.randrange(len(whole)), dice.choice([1, 4, 64, 512])
        damaged = bytearray(whole)
        damaged[place : place + length] = dice.choice([bytes(length), dice.randbytes(length)])
        assert noticed(bytes(damaged[: len(whole)])), (place, length)
    for size in (0, 1, 76, 77, 78, 1000, *range(len(whole) // 2, len(whole))):
        broken.write_bytes(whole[:size])
        assert not files.is_whole_zip(broken), size


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, lambda p: os.truncate(p, 3000), Path.unlink], ids=["bit", "cut", "gone"])
def test_a_broken_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: Any) -> None:
    config = kit.recipe("aver", **{"train.epochs": 4, "data.holdout": 0.1})
    whole = kit.trained(config, tmp_path / "whole")
    run = stopped(kit.session(config, tmp_path / "run"), 4, 1)
    damage(run.path / "last.ckpt")
    said = resumed(config, run)
    assert len(said) == 1
    assert "last.ckpt" in said[0]
    assert "previous.ckpt" in said[0]
    assert same_outcome(run, whole)
    assert not (run.path / "previous.ckpt").exists()


def test_the_warning_reaches_the_error_stream(tmp_path: Path) -> None:
    run = stopped(kit.session(kit.recipe("aver"), tmp_path / "run"), 2, 1)
    (run.path / "last.ckpt").unlink()
    said = kdcli("distill", "--resume", run.path, "--device", "cpu", "--json")
    assert said.json["epoch"] == 2
    assert "warning:" in said.err
    assert "had no checkpoint yet: it starts from the beginning" in said.err


def test_a_broken_checkpoint_never_takes_the_place_of_the_good_one(tmp_path: Path) -> None:
    config = kit.recipe(**{"train.epochs": 4})
    run = stopped(kit.session(config, tmp_path / "run"), 4, 1)
    flip(run.path / "last.ckpt")
    assert "notice" in run.load_checkpoint()
    state = run.load_checkpoint()  # the good one has its name now
    assert "notice" not in state
    assert state["epoch"] == 2


def test_two_broken_checkpoints_are_both_named(tmp_path: Path) -> None:
    run = stopped(kit.session(kit.recipe(**{"train.epochs": 4}), tmp_path / "run"), 4, 1)
    flip(run.path / "last.ckpt")
    flip(run.path / "previous.ckpt")
    with pytest.raises(WeightsError, match=r"last\.ckpt is truncated.*previous\.ckpt") as caught:
        run.load_checkpoint()
    assert "--out" in caught.value.hint


def test_a_good_checkpoint_is_there_at_every_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = kit.recipe(**{"train.epochs": 4})
    opened, replace, moments = kit.session(config, tmp_path / "run"), os.replace, []

    def look(run: Run) -> None:
        if run.has_checkpoint:
            moments.append(any(files.is_whole_zip(path) for path in run.path.glob("*.ckpt")))

    def watched(source: Any, to: Any) -> None:
        look(opened.run)
        replace(source, to)
        look(opened.run)

    monkeypatch.setattr(os, "replace", watched)
    kit.drive(groups.go(opened))
    assert len(moments) > 12
    assert all(moments)


# --- resuming from the beginning, and within an epoch -----------------------------------------------------------------


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    config = kit.recipe("classroom", **{"train.ema": 0.9})
    whole = kit.trained(config, tmp_path / "whole")
    run = stopped(kit.session(config, tmp_path / "run"), 1, 3)
    assert not run.has_checkpoint
    run.log({"epoch": 1, "half": 1})  # it was killed after this
    (run.path / "recipe.toml").unlink()  # or before that
    assert run.recipe == config
    said = resumed(config, run)
    assert said == [f"{run.path} had no checkpoint yet: it starts from the beginning"]
    assert same_outcome(run, whole)
    assert (run.path / "recipe.toml").read_text() == (whole.path / "recipe.toml").read_text()


def test_the_first_file_of_a_run_is_all_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = runs.write_text, []

    def killed(path: Path, text: str) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, text)

    command = ("compare", "--methods", "aver", "--seeds", "1", *ROOM, *SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_text", killed)
        kdcli(*command, "--out", tmp_path / "run", code=130)
    assert written == ["provenance.json"]
    kdcli("compare", "--resume", tmp_path / "run", "--device", "cpu")
    kdcli(*command, "--out", tmp_path / "whole")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert (tmp_path / "run" / "recipe.toml").read_text() == (tmp_path / "whole" / "recipe.toml").read_text()


def test_a_folder_with_nothing_but_a_lock_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / lock.NAME).touch()
    said = kdcli("distill", "--resume", tmp_path / "run", code=2)
    assert "stopped before it wrote anything" in said.err


def test_a_part_of_a_compare_is_not_resumed_by_itself(tmp_path: Path) -> None:
    kdcli("compare", "--methods", "aver", "--seeds", "1", *ROOM, *SMALL, "--epochs", "1", "--out", tmp_path / "c")
    said = kdcli("distill", "--resume", tmp_path / "c" / "aver-0", code=2)
    assert f"kdcli compare --resume {tmp_path / 'c'}" in said.err


def test_checkpoints_within_an_epoch_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kit.trained(kit.recipe("classroom"), tmp_path / "whole")
    often = kit.recipe("classroom", **{"train.checkpoint_minutes": 1e-9})
    assert often.hash() == kit.recipe("classroom").hash()  # it decides nothing
    opened, stands, checkpoint = kit.session(often, tmp_path / "run"), [], Run.checkpoint

    def told(run: Run, state: dict[str, Any]) -> None:
        stands.append((state["epoch"], state["batch"]))
        checkpoint(run, state)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", told)
        kit.drive(groups.go(opened))
    each = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0)]
    assert stands == each
    assert same_outcome(opened.run, whole)
    run = stopped(kit.session(often, tmp_path / "killed"), 1, 3)
    assert (run.load_checkpoint()["epoch"], run.load_checkpoint()["batch"]) == (0, 3)
    assert resumed(often, run) == []
    assert same_outcome(run, whole)


class Moody(NoKD):
    """What it does in an epoch hangs on what it did at the epoch's beginning, once."""

    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(()))

    def begin_epoch(self, epoch: int, train_pass: Any) -> None:
        self.factor += 0.5 * torch.rand(())

    def loss(self, lesson: Any, phase: Any) -> Any:
        return {"hard": self.factor * super().loss(lesson, phase)["hard"]}


@pytest.mark.parametrize(("epoch", "batch"), [(1, 2), (2, 1)])
def test_an_epoch_is_begun_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, batch: int) -> None:
    from kdcli import methods

    monkeypatch.setattr(methods, "build", lambda *_: Moody())
    config = kit.recipe(**{"train.checkpoint_minutes": 1e-9})
    whole = kit.trained(config, tmp_path / "whole")
    run = stopped(kit.session(config, tmp_path / "run"), epoch, batch)
    assert run.load_checkpoint()["batch"] == batch
    torch.rand(7)  # the process that resumes has drawn other numbers
    resumed(config, run)
    assert same_outcome(run, whole)
    factor = [one.load_checkpoint()["learners"]["nokd"]["method"]["factor"] for one in (run, whole)]
    assert factor[0] == factor[1] != 1


def test_the_scaler_of_fp16_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float16 needs CUDA, its scaler does not: growing every third step, it must keep count across a stop."""
    real = torch.amp.GradScaler  # pyright: ignore
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: real("cpu", init_scale=8.0, growth_interval=3))
    config = kit.recipe("aver", **{"train.checkpoint_minutes": 1e-9, "train.clip_grad": 1.0})
    whole = kit.session(config, tmp_path / "whole")
    kit.drive(groups.go(whole))
    run = stopped(kit.session(config, tmp_path / "run"), 2, 1)
    assert run.load_checkpoint()["learners"]["aver"]["trained"]["main"]["scaler"]["_growth_tracker"] == 2
    again = kit.session(config, run.path, resume=True)
    kit.drive(groups.go(again, resume=True))
    assert again.learners[0].scaler.state_dict() == whole.learners[0].scaler.state_dict()
    assert whole.learners[0].scaler.get_scale() == 32.0
    assert same_outcome(run, whole.run)


# --- training that diverged -------------------------------------------------------------------------------------------


def test_resuming_what_diverged_says_that_it_will_again(tmp_path: Path) -> None:
    config = kit.recipe(**{"train.epochs": 3})
    whole, opened = kit.trained(config, tmp_path / "whole"), kit.session(config, tmp_path / "run")

    def poison(event: Step) -> None:
        next(event.learners[0].student.parameters()).data.fill_(float("nan"))

    with pytest.raises(DivergedError):
        kit.drive(groups.go(opened), kit.at(2, 2, poison))
    assert "hard" in opened.run.provenance["diverged"]
    assert opened.run.load_checkpoint()["epoch"] == 1
    said = resumed(config, opened.run)
    assert len(said) == 1
    assert "went on until its training diverged" in said[0]
    assert "--set train.lr" in said[0]
    assert same_outcome(opened.run, whole)
    assert "diverged" not in opened.run.provenance  # this time it did not


# --- memory -----------------------------------------------------------------------------------------------------------


def short_of_memory(learner: Learner, most: int, *, step: int = 0) -> list[int]:
    """Let `learner` have memory for `most` images from a step on; the sizes it was asked for."""
    forward, asked = learner._forward, []

    def limited(name: str, pixels: Tensor, whole: bool) -> Tensor:
        asked.append(len(pixels))
        out = forward(name, pixels, whole)  # batch statistics are touched before memory runs out
        if len(pixels) > most and len(asked) > step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return out

    learner._forward = limited
    return asked


def test_a_batch_too_large_goes_through_in_halves_that_a_resumed_run_keeps(tmp_path: Path) -> None:
    halves = kit.trained(kit.recipe("aver", **{"train.accumulate": 4}), tmp_path / "halves")
    config = kit.recipe("aver", **{"train.checkpoint_minutes": 1e-9})
    opened = kit.session(config, tmp_path / "run")
    asked = short_of_memory(opened.learners[0], 2)
    events = []
    for event in (driving := groups.go(opened)):
        events.append(event)
        if isinstance(event, Step) and (event.epoch, event.batch) == (1, 3):
            driving.close()
    assert asked == [8, 4, 2, 2, 2, 2, *[2] * 8]
    assert notices(events) == [
        "aver: out of memory, so batches of 8 are trained in 4 micro-batches of 2 from here on (train.accumulate = 4); "
        "gradients stay those of the whole batch, batch-norm statistics are now the micro-batches'"
    ]
    assert opened.run.provenance["accumulate"] == 4
    again = kit.session(config, opened.run.path, resume=True)
    asked = short_of_memory(again.learners[0], 2)
    assert notices(kit.drive(groups.go(again, resume=True))) == []
    assert max(asked) == 2
    assert same_outcome(opened.run, halves)  # not one number of the failed tries is left anywhere


def test_a_loss_over_whole_batches_is_not_halved(tmp_path: Path) -> None:
    opened = kit.session(kit.recipe("classroom"), tmp_path / "run")
    short_of_memory(opened.learners[0], 4)
    with pytest.raises(OutOfMemory, match=r"classroom: out of memory in a step of 8 images") as caught:
        kit.drive(groups.go(opened))
    assert caught.value.exit_code == 3
    assert "train.batch_size=4" in caught.value.hint
    assert "couples the samples" in caught.value.hint


def test_two_images_are_the_least(tmp_path: Path) -> None:
    opened = kit.session(kit.recipe("aver"), tmp_path / "run")
    asked = short_of_memory(opened.learners[0], 0)
    with pytest.raises(OutOfMemory, match=r"aver: out of memory") as caught:
        kit.drive(groups.go(opened))
    assert "Not even 2 images fit" in caught.value.hint
    assert min(asked) == 2


def test_an_update_that_has_begun_is_not_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = kit.recipe("aver")
    whole, opened = kit.trained(config, tmp_path / "whole"), kit.session(config, tmp_path / "run")
    calls, step = [], opened.learners[0].optimizer.step

    def out(*_: Any) -> None:
        calls.append(1)
        step()
        if len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(opened.learners[0].optimizer, "step", out)
    with pytest.raises(OutOfMemory, match="in the optimizer's update") as caught:
        kit.drive(groups.go(opened))
    assert "train.optimizer=sgd" in caught.value.hint
    assert len(calls) == 6
    assert opened.run.load_checkpoint()["epoch"] == 1
    resumed(config, opened.run)
    assert same_outcome(opened.run, whole)


def test_mentors_without_memory_are_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = kit.session(kit.recipe("aver"), tmp_path / "run")

    def out(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(opened.mentors, "answer", out)
    with pytest.raises(OutOfMemory, match="while the mentors answered 8 images") as caught:
        kit.drive(groups.go(opened))
    assert "classroom.precision=bf16" in caught.value.hint


def test_other_faults_of_a_step_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = kit.session(kit.recipe("aver"), tmp_path / "run")

    def breaks(*_: object) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    opened.learners[0]._forward = breaks
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        kit.drive(groups.go(opened))
    assert devices.out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert devices.out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert not devices.out_of_memory(MemoryError())


def test_scoring_goes_on_in_smaller_batches() -> None:
    room = kit.classroom(kit.recipe("nokd"))
    student, sizes = room.student(0), []

    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = student

        def forward(self, pixels: Tensor) -> Tensor:
            sizes.append(len(pixels))
            if len(pixels) > 70:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return student(pixels)

    whole = evaluate.outputs(student, room.data.test, kit.CPU)
    parts = evaluate.outputs(Short(), room.data.test, kit.CPU)
    torch.testing.assert_close(parts, whole)
    assert sizes[:3] == [256, 128, 64]
    with pytest.raises(torch.OutOfMemoryError):
        evaluate.outputs(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError()), room.data.test, kit.CPU)  # type: ignore


def test_a_step_that_fits_is_not_copied_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, copied = kit.session(kit.recipe("aver"), tmp_path / "run"), []

    class Counted(learners.Snapshot):
        def __init__(self, modules: Any) -> None:
            copied.append(1)
            super().__init__(modules)

    monkeypatch.setattr(learners, "Snapshot", Counted)
    kit.drive(groups.go(opened))
    assert len(copied) == 2  # the first full batch and the first last one


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_the_newest_run_is_known_though_the_clock_was_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for n, started in enumerate(("2030-01-01", "2020-01-01", "2020-01-01")):
        run = Run(Path("runs") / f"{'zax'[n]}-run")
        run.start(kit.recipe(), {**runs.provenance("distill", kit.recipe()), "started": started})
        run.amend(finished=True)
    assert [run.name for run in runs.every()] == ["z-run", "a-run", "x-run"]
    assert runs.find(None).name == "x-run"
    (tmp_path / "runs" / "x-run" / "provenance.json").write_text("{")
    late = Run(Path("runs/late"))
    late.start(kit.recipe(), runs.provenance("distill", kit.recipe()))
    assert late.provenance["number"] == 3


def test_the_newest_card_is_known_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KDCLI_HOME", str(tmp_path))
    first = kit.add_mentor(kit.MENTORS[0], 0)
    monkeypatch.setattr(cards, "now", lambda: "2001-01-01T00:00:00.000000+00:00")
    assert cards.stamp() > first.created
    alone = {"classroom.student": kit.MENTORS[0], "classroom.teacher": None, "classroom.peers": [], "train.epochs": 1}
    run = kit.trained(kit.recipe(**alone), tmp_path / "run")
    cards.add(kit.student(run), cards.read_card(run.path / "student.toml"))
    found = cards.find(kit.MENTORS[0], first.data_hash)
    assert found is not None
    assert found.origin == str(run.path)


# --- two writers ------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from kdcli.system import lock
with lock.hold(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Run, subprocess.Popen[str]]]:
    """A stopped run that another process is writing into."""
    run = stopped(kit.session(kit.recipe("aver"), tmp_path / "run"), 2, 1)
    place = str(Path(__file__).resolve().parents[2])
    words = [sys.executable, "-c", HOLDER, place, str(run.path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield run, holder
        holder.kill()


def test_a_run_has_one_writer(held: tuple[Run, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    run, holder = held
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    for command in (("distill", "--resume", run.path, "--device", "cpu"), ("runs", "rm", run.path, "--yes")):
        said = kdcli(*command, code=2)
        assert f"{run.path} is in use by process {holder.pid} on " in said.err
        assert "Another --out" in said.err
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before
    monkeypatch.chdir(run.path.parent)
    assert kdcli("runs", "show", "run", "--json").json["metrics"] == run.metrics()  # who reads is not hindered
    holder.kill()  # the lock goes with the process, not with its manners
    holder.wait()
    kdcli("distill", "--resume", run.path, "--device", "cpu")
    kdcli("runs", "rm", run.path, "--yes")
    assert not run.path.exists()


def test_a_new_run_does_not_begin_where_another_does(held: tuple[Run, subprocess.Popen[str]]) -> None:
    run, _ = held
    (run.path / "provenance.json").unlink()  # the other has taken the folder, and written nothing yet
    words = ("distill", *ROOM, *SMALL, "--out", run.path)
    assert "is in use by process" in kdcli(*words, code=2).err
    assert "is in use by process" in kdcli("train", "--model", "cifar_resnet8", *SMALL, "--out", run.path, code=2).err
    assert "is in use by process" in kdcli("compare", *ROOM, *SMALL, "--out", run.path, code=2).err
    assert not (run.path / "provenance.json").exists()


def test_a_part_of_a_compare_at_work_is_not_removed(held: tuple[Run, subprocess.Popen[str]]) -> None:
    run, _ = held
    with pytest.raises(LockedError):
        lock.check(run.path / "aver-0")
    lock.check(run.path.parent)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """As decoding processes do, it outlives a parent that was killed."""
    (reading, writing), (told, ready) = os.pipe(), os.pipe()
    with lock.hold(tmp_path):
        child = os.fork()
        if not child:
            os.close(writing)
            os.write(ready, b"1")
            os.read(reading, 1)
            os._exit(0)
        os.read(told, 1)
        with pytest.raises(LockedError, match=f"process {os.getpid()} "), lock.hold(tmp_path):
            pass
    with lock.hold(tmp_path):
        pass
    os.close(writing)
    os.waitpid(child, 0)
    for end in (reading, told, ready):
        os.close(end)


def test_where_there_are_no_locks_a_run_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(number: int) -> Any:
        def take(*_: int) -> None:
            raise OSError(number, os.strerror(number))

        return take

    monkeypatch.setattr("fcntl.flock", refuses(errno.ENOLCK))
    with lock.hold(tmp_path / "new"):
        assert (tmp_path / "new" / lock.NAME).is_file()
    assert "no locks on the file system of" in capsys.readouterr().err
    monkeypatch.setattr("fcntl.flock", refuses(errno.EIO))
    with pytest.raises(DataError, match="cannot write"), lock.hold(tmp_path / "new"):
        pass


def test_an_epochs_rows_are_told_as_before(tmp_path: Path) -> None:
    events = kit.drive(loop.train(kit.session(kit.recipe(), tmp_path / "run")))
    assert [type(event) for event in events] == [*[Step] * 4, EpochEnd] * 2
