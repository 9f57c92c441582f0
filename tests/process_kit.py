"""Real kdcli processes, to be killed: forked from a server that has imported torch already, so that each is cheap."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

needs_kill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
LONG = 120  # seconds after which a process that should have left is hung


@dataclass
class Fault:
    """Where a process kills itself: in the `nth` call (from 1) of `call`, before it, after it or with it half done."""

    call: str
    nth: int
    when: str


@dataclass
class Left:
    """How a process left, and what it printed."""

    code: int
    out: str
    err: str


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["kdcli.cli.distill", "kdcli.workflows.compare", "kdcli.workflows.quickstart", "kdcli.export.onnx"]
    )
    return context


@contextlib.contextmanager
def started(
    folder: Path, home: Path, *args: object, fault: Fault | None = None, slow: str = ""
) -> Iterator[BaseProcess]:
    """A kdcli command at work in `folder`; killed at the end of the block if it is still there."""
    words = [str(arg) for arg in args]
    process = _server().Process(target=_run, args=(str(folder), str(home), words, fault, slow))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def left(process: BaseProcess, folder: Path) -> Left:
    """Wait for a command to leave."""
    process.join(LONG)
    assert process.exitcode is not None, f"still there after {LONG} s"
    return Left(process.exitcode, *((folder / name).read_text() for name in ("out.txt", "err.txt")))


def ran(folder: Path, home: Path, *args: object, fault: Fault | None = None, code: int | None = 0) -> Left:
    """A command run to its end; its exit code must be `code` (None: any)."""
    with started(folder, home, *args, fault=fault) as process:
        said = left(process, folder)
    assert code is None or said.code == code, f"exit {said.code}\n{said.out}\n{said.err}"
    return said


def wait_for(path: Path, process: BaseProcess) -> None:
    """Until a file is there."""
    end = time.monotonic() + LONG
    while not path.exists():
        assert process.exitcode is None, f"it left with {process.exitcode} before {path} was there"
        assert time.monotonic() < end, f"no {path} after {LONG} s"
        time.sleep(0.002)


def _run(folder: str, home: str, args: list[str], fault: Fault | None, slow: str) -> None:
    """In the process: a kdcli command with its output in files, fated as `fault` says."""
    os.chdir(folder)
    os.environ["KDCLI_HOME"] = home
    os.environ.pop("KDCLI_DATA", None)
    sys.stdout, sys.stderr = open("out.txt", "w"), open("err.txt", "w")  # noqa: SIM115
    import torch

    from kdcli.cli import main

    torch.set_num_threads(1)
    if fault:
        _doom(fault)
    if slow:
        _slow(slow)
    main(args)


def _doom(fault: Fault) -> None:
    import torch

    home: Any = torch if fault.call == "save" else os
    whole, count = getattr(home, fault.call), 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fated(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count < fault.nth:
            return whole(*args, **options)
        if fault.when == "before":
            die()
        out = whole(*args, **options)
        if fault.when == "half" and fault.call == "save":
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        die()
        return out

    setattr(home, fault.call, fated)


def _slow(what: str) -> None:
    """A part of training (`place:nth`, the nth call from 1) that goes on for ever, and says that it has begun."""
    from kdcli.mentors import mentors
    from kdcli.methods.baselines import Aver
    from kdcli.training import learner, loop

    place, _, nth = what.partition(":")
    homes: dict[str, tuple[Any, str]] = {
        "score": (loop, "score"), "mentors": (mentors.Mentors, "answer"), "step": (learner.Learner, "step"),
        "sweep": (Aver, "begin_epoch"), "setup": (learner.Learner, "_first_lesson"),
    }  # fmt: skip
    home, name = homes[place]
    whole, count = getattr(home, name), 0

    def slowly(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == int(nth):
            Path("begun").touch()
            while True:
                time.sleep(0.05)
        return whole(*args, **options)

    setattr(home, name, slowly)
