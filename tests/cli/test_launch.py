"""--gpus and torchrun: what is said once, exit codes, a rank that dies, signals, and runs handed from many to one."""

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cli_kit as kit
import pytest
import torch
import torch.distributed as td
from safetensors.torch import load_file

from kdcli.cli import launch
from kdcli.errors import DataError, KdcliError, RecipeError
from kdcli.system import distributed
from kdcli.training.run import Run

RANKS = ("--gpus", "2", "--device", "cpu")
QUICK = ("--epochs", "2", "--set", "data.per_class=3", "--set", "train.batch_size=8", "--set", "data.image_size=8")
LONG = ("--epochs", "8", "--set", "data.per_class=30", "--set", "train.batch_size=16", "--set", "data.image_size=8")
SHORT_OF = 300.0  # seconds that nothing here takes

needs_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks' processes in /proc")


@pytest.fixture(autouse=True)
def _room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kit.add_mentors(kit.TEACHER, kit.PEER, image_size=8)


def ended(process: kit.Started, code: int | None = 0) -> kit.Said:
    said = process.said(SHORT_OF)
    assert code is None or said.code == code, f"exit {said.code}\n{said.out}\n{said.err}"
    return said


def ran(*args: object, code: int | None = 0, module: tuple[str, ...] = ("kdcli",)) -> kit.Said:
    return ended(kit.Started(*args, module=module), code)


def until(true: Callable[[], object], process: kit.Started) -> None:
    """Wait for something that a running command does."""
    end = time.monotonic() + SHORT_OF
    while not true():
        assert process.poll() is None, process.printed()
        assert time.monotonic() < end
        time.sleep(0.02)


def epochs(folder: str) -> int:
    path = Path(folder) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def rank_pids(launcher: int) -> list[int]:
    """The ranks' processes in the order of their ranks."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return sorted(int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())


def same(a: str, b: str) -> bool:
    one, other = (load_file(Path(folder) / "student.safetensors") for folder in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- what is said -----------------------------------------------------------------------------------------------------


def test_two_ranks_train_one_model_and_say_so_once() -> None:
    said = ran("train", "--model", kit.STUDENT, "--data", "digits", *QUICK, *RANKS, "--out", "run")
    assert said.own == []
    assert said.out.count("ranks 2 on 1 machine, gloo") == said.out.count("run run") == 1
    assert said.next.startswith(f"kdcli distill --teacher {kit.STUDENT}")
    run = Run(Path("run"))
    assert run.finished
    assert [row["epoch"] for row in run.metrics()] == [1, 2]
    assert run.provenance["ranks"] == "2 on 1 machine, gloo"
    assert run.provenance["command"].startswith("kdcli train") or "train" in run.provenance["command"]
    assert not any("module." in key for key in load_file(run.path / "student.safetensors"))
    state = run.load_checkpoint()["learners"]["nokd"]["learners"]["student"]
    assert all(key.startswith("net.") for key in state)
    cards = list(Path(os.environ["KDCLI_HOME"], "zoo").glob(f"{kit.STUDENT}*.toml"))
    assert len(cards) == 1


@pytest.mark.slow
def test_what_is_wrong_is_said_once_with_its_exit_code() -> None:
    said = ran("distill", *kit.CLASSROOM, *QUICK, *RANKS, "--set", "train.batch_size=29", "--json", code=2)
    assert said.out == ""
    assert said.err.count("error:") == 1
    assert "the last batch of 1 images has too few for each of 2 ranks" in said.err
    assert "Traceback" not in said.err
    assert not Path("runs").exists()


class Left(Exception):
    """A process that ended itself."""


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int | str | None, list[BaseException]]]:
    """Leave as one rank of two, with a store that both share: how it ended and what it said."""
    board = td.HashStore()
    monkeypatch.setattr(distributed, "store", lambda: board)
    monkeypatch.setattr(distributed, "expected_ranks", lambda: 2)
    monkeypatch.setattr(launch, "GRACE", 0.1)

    def ended_itself(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(os, "_exit", ended_itself)

    def leave(error: BaseException) -> tuple[int | str | None, list[BaseException]]:
        said: list[BaseException] = []

        def say(what: BaseException) -> int:
            said.append(what)
            return what.exit_code if isinstance(what, KdcliError) else 1

        with pytest.raises((SystemExit, Left)) as caught:
            launch.leave(error, say)
        return (caught.value.code if isinstance(caught.value, SystemExit) else f"died {caught.value}"), said

    return leave


ECHO = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")


def test_the_first_to_fail_speaks_and_its_code_is_everyones(rank: Callable) -> None:
    error = DataError("a picture is gone")
    assert rank(error) == ("died 3", [error])  # the other is still in an exchange: torch elastic must end it
    assert rank(ECHO) == (3, [])
    with pytest.raises(SystemExit) as caught:
        launch.enter(["distill"])  # started again by torch elastic, which knows no words
    assert caught.value.code == 3


def test_of_two_that_fail_alike_one_speaks(rank: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 10.0)
    wrong = RecipeError("no such model")
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(rank, [wrong, wrong]))
    assert sorted(code for code, _ in found) == [2, 2]
    assert [error for _, said in found for error in said] == [wrong]


def test_a_rank_that_only_lost_the_others_says_nothing_and_is_started_again(rank: Callable) -> None:
    assert rank(ECHO) == ("died 1", [])
    assert not distributed.store().check(["code"])


def test_a_rank_that_is_ended_while_it_loads_does_not_stop_the_others_being_started_again(
    rank: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert rank(KeyboardInterrupt()) == ("died 130", [])
    assert not distributed.store().check(["code"])
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")  # nobody who would start it again, or has a word to say
    stopped = KeyboardInterrupt()
    assert rank(stopped) == ("died 1", [stopped])


def test_a_command_that_cannot_be_divided_is_refused(rank: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    del rank
    monkeypatch.setenv("RANK", "0")
    launch.enter(["--debug", "distill"])
    launch.enter(["--help"])
    with pytest.raises(RecipeError, match="kdcli export runs in one process"):
        launch.enter(["export", "--onnx"])


def test_more_gpus_than_there_are_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for command in (("train", "--model", "x"), ("distill",), ("compare",)):
        said = kit.kdcli(*command, "--gpus", 3, code=2)
        assert "--gpus 3: this machine has 1 CUDA device" in said.err
        assert "--gpus 1; --gpus 3 --device cpu" in said.err


# --- what is too long for every run -----------------------------------------------------------------------------------


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_starts_all_again_and_ends_with_the_same_bits(victim: int) -> None:
    ran("distill", *kit.CLASSROOM, *LONG, *RANKS, "--out", "whole")
    process = kit.Started("distill", *kit.CLASSROOM, *LONG, *RANKS, "--out", "run")
    until(lambda: epochs("run") >= 3, process)
    os.kill(rank_pids(process.pid)[victim], signal.SIGKILL)
    said = ended(process)
    assert "a rank died: all were started again, 1 time" in said.err
    assert "Traceback" not in said.err
    assert same("run", "whole")
    assert Run(Path("run")).metrics() == Run(Path("whole")).metrics()


@needs_proc
@pytest.mark.slow
def test_a_rank_killed_before_the_first_checkpoint_starts_anew() -> None:
    process = kit.Started(
        "distill", *kit.CLASSROOM, *QUICK, *RANKS, "--set", "data.per_class=100", "--set", "train.eval_every=2"
    )
    until(lambda: list(Path("runs").glob("*/provenance.json")) if Path("runs").is_dir() else False, process)
    os.kill(rank_pids(process.pid)[1], signal.SIGKILL)
    said = ended(process)
    assert "started again" in said.err
    (folder,) = Path("runs").iterdir()
    assert Run(folder).finished


@needs_proc
@pytest.mark.slow
def test_a_rank_that_always_dies_is_given_up_in_words() -> None:
    process = kit.Started("distill", *kit.CLASSROOM, *LONG, *RANKS, "--out", "run")
    for deaths in range(4):
        seen: set[int] = set()
        until(lambda seen=seen: len(pids := rank_pids(process.pid)) == 2 and not seen.update(pids), process)
        os.kill(max(seen), signal.SIGKILL)
        if deaths < 3:
            until(lambda seen=seen: not seen & set(rank_pids(process.pid)), process)
    said = ended(process, 130)
    assert "rank 1 died (SIGKILL), and again after 3 restarts" in said.err
    assert "memory" in said.err
    assert "Traceback" not in said.err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "then"), [(signal.SIGTERM, ()), (signal.SIGINT, RANKS)], ids=["TERM", "INT"])
def test_a_signal_to_the_launcher_leaves_a_run_that_any_number_of_ranks_resumes(number: int, then: tuple[str]) -> None:
    ran("distill", *kit.CLASSROOM, *LONG, *RANKS, "--out", "whole")
    process = kit.Started("distill", *kit.CLASSROOM, *LONG, *RANKS, "--out", "run")
    until(lambda: epochs("run") >= 2, process)
    os.kill(process.pid, number)
    said = ended(process, 130)
    assert said.err.count("error:") == 1
    assert "saved in run" in said.err
    assert "--resume run" in said.err
    assert not Run(Path("run")).finished
    assert Run(Path("run")).load_checkpoint()["epoch"] >= 2
    ran("distill", "--resume", "run", *then)
    assert Run(Path("run")).finished
    if then:
        assert same("run", "whole")
    else:
        assert Run(Path("run")).provenance["ranks"] == "2 on 1 machine, gloo, then 1"
        assert [row["epoch"] for row in Run(Path("run")).metrics()] == list(range(1, 9))


@pytest.mark.slow
def test_two_ranks_resume_what_one_began() -> None:
    process = kit.Started("distill", *kit.CLASSROOM, *LONG, "--device", "cpu", "--out", "run")
    until(lambda: epochs("run") >= 2, process)
    process.terminate()
    ended(process, 130)
    ran("distill", "--resume", "run", *RANKS)
    assert Run(Path("run")).finished
    assert Run(Path("run")).provenance["ranks"] == "1, then 2 on 1 machine, gloo"


@pytest.mark.slow
@pytest.mark.parametrize("independent", [(), ("--independent",)], ids=["shared", "independent"])
def test_two_ranks_compare(independent: tuple[str, ...]) -> None:
    args = ("--methods", "kd,classroom", "--seeds", "2", *independent)
    said = ran("compare", *kit.CLASSROOM, *QUICK, *RANKS, *args, "--out", "both", "--json")
    found = said.json
    assert [line["method"] for line in found["lines"]] == ["nokd", "kd", "classroom"]
    assert json.loads(Path("both/compare.json").read_text()) == found
    for method in ("nokd", "kd", "classroom"):
        for seed in (0, 1):
            assert Run(Path(f"both/{method}-{seed}")).finished
    assert not list(Path("both").glob(".seed*"))


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("independent", [(), ("--independent",)], ids=["shared", "independent"])
def test_a_rank_killed_in_a_compare_starts_all_again(independent: tuple[str, ...]) -> None:
    args = ("compare", *kit.CLASSROOM, *LONG, *RANKS, "--methods", "kd", "--seeds", "2", *independent)
    ran(*args, "--out", "whole")
    process = kit.Started(*args, "--out", "run")
    until(lambda: epochs("run/kd-1") >= 3, process)
    os.kill(rank_pids(process.pid)[0], signal.SIGKILL)
    said = ended(process)
    assert "started again" in said.err
    for learner in ("nokd-0", "kd-0", "nokd-1", "kd-1"):
        assert same(f"run/{learner}", f"whole/{learner}")
    lines = [json.loads(Path(f"{folder}/compare.json").read_text())["lines"] for folder in ("run", "whole")]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_torchrun_does_the_same() -> None:
    args = ("distill", *kit.CLASSROOM, *QUICK, "--device", "cpu")
    ran(*args, "--gpus", "2", "--out", "launched")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdcli")
    said = ran(*args, "--out", "run", module=torchrun)
    assert same("run", "launched")
    assert said.out.count("Next: ") == 1
    said = ran(*args, "--gpus", "3", "--out", "other", module=torchrun, code=1)
    assert said.err.count("--gpus 3: this process is already one of 2 ranks") == 1
    said = ran("models", "resnet", module=torchrun, code=1)
    assert said.err.count("kdcli models runs in one process") == 1


@needs_proc
@pytest.mark.slow
def test_torchruns_own_restart_continues_the_run() -> None:
    args = ("distill", *kit.CLASSROOM, *LONG, "--device", "cpu")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "kdcli")
    process = kit.Started(*args, module=torchrun)
    until(lambda: any(epochs(str(run)) >= 3 for run in Path("runs").glob("*")), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(max(map(int, children)), signal.SIGKILL)
    said = ended(process)
    assert "a rank died: all were started again, 1 time" in said.err
    (folder,) = Path("runs").iterdir()
    assert Run(folder).finished
    assert len(Run(folder).metrics()) == 8


@pytest.mark.slow
def test_a_fault_that_one_rank_alone_meets_ends_all_with_its_word(tmp_path: Path) -> None:
    pictures = kit.picture_folder(tmp_path / "pictures", ("dark", "light"), train=64, size=80)
    options = ("--data", f"folder:{pictures}", "--set", "data.image_size=72", "--set", "train.batch_size=16")
    more = ("--set", "data.workers=0", "--set", "data.augment=imagenet", "--epochs", "50")
    process = kit.Started("train", "--model", kit.STUDENT, *options, *more, *RANKS, "--out", "run")
    until(lambda: epochs("run") >= 1, process)
    (pictures / "train" / "dark" / "dark_7.jpg").write_bytes(b"no longer a picture")
    said = ended(process, 3)
    assert said.err.count("error:") == 1
    assert "dark_7.jpg" in said.err
    assert "Traceback" not in said.err
    assert Run(Path("run")).load_checkpoint()["epoch"] >= 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("more", [(), ("--set", "train.sync_bn=true")], ids=["own norms", "synchronised norms"])
def test_two_gpus_train_one_model(more: tuple[str, ...]) -> None:
    precise = ("--set", "train.precision=fp32", "--set", "classroom.precision=fp32")
    ran("distill", *kit.CLASSROOM, *QUICK, *precise, *more, "--gpus", "2", "--device", "cuda", "--out", "two")
    ran("distill", *kit.CLASSROOM, *QUICK, *precise, "--device", "cuda", "--out", "one")
    assert Run(Path("two")).provenance["ranks"] == "2 on 1 machine, nccl"
    one, two = (load_file(Path(folder) / "student.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    if more:  # else every GPU normalises by its own share, and they end apart
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=2e-2, atol=2e-2)
