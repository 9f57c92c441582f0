"""Starting ranks on this machine through torch elastic, and how they leave: one word, one exit code, whoever failed."""

import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as td

from kdcli.errors import InterruptedRun, KdcliError, RecipeError
from kdcli.system import distributed

DIVIDED = ("distill", "train", "compare")  # the commands whose work ranks can divide
RESTARTS = 3
GRACE = 5.0  # seconds that ranks wait for each other before they leave with an error
DIED = 1  # exit code of a rank that lost the others: torch elastic starts all of them again


def launch(argv: list[str], ranks: int, device: str | None, *, debug: bool = False) -> None:
    """Run a command line in several processes; returns when one is enough, else leaves with their exit code.

    A rank that dies (and not one that has said what is wrong) has all of them started again, RESTARTS times.

    Raises:
        RecipeError: more ranks than GPUs.
        InterruptedRun: a signal before the ranks could save anything, or one rank died once too often.
    """
    have = torch.cuda.device_count()
    if device not in (None, "auto", "cpu", "cuda"):
        raise RecipeError(f"--gpus {ranks} --device {device}: ranks take one GPU each", hint="--device cuda, or cpu.")
    if device != "cpu" and ranks > have:
        raise RecipeError(
            f"--gpus {ranks}: this machine has {have or 'no'} CUDA device{'s' if have != 1 else ''} that torch can use",
            hint=f"{f'--gpus {have}; ' if have else ''}--gpus {ranks} --device cpu divides the work among processes.",
        )
    if ranks == 1:
        return
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    board = td.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ["KDCLI_BOARD"] = f"127.0.0.1:{board.port}"
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // ranks, 1)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when a rank imports torch
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # seconds to end a step or a score and save
    if not debug:
        logging.disable(logging.CRITICAL)  # elastic's account of a death; kdcli gives its own
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=ranks,
                run_id="kdcli",
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",
                local_addr="127.0.0.1",
                max_restarts=RESTARTS,
                monitor_interval=0.1,
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )
            code = max(elastic_launch(config, _rank)(argv).values())
    except SignalException as error:
        code = _settled(board)
        if code is None:
            raise InterruptedRun(f"stopped by {error.sigval.name}; what the last checkpoint holds stands") from None
    except ChildFailedError as error:
        code = _settled(board)
        if code is None:
            number, failure = min(error.failures.items())
            raise InterruptedRun(
                f"rank {number} died ({_ending(failure.exitcode)}), and again after {RESTARTS} restarts",
                hint="SIGKILL is mostly a lack of memory: fewer ranks, a smaller train.batch_size, data.workers=0. "
                "`kdcli runs ls` shows the run; --resume continues it.",
            ) from None
    finally:
        logging.disable(logging.NOTSET)
    sys.exit(_settled(board) or code)


def _rank(argv: list[str]) -> int:
    """What every process does: the same command line. Its exit code is no failure to torch elastic."""
    from kdcli import cli

    code = 0
    try:
        cli.main(argv)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    if code == InterruptedRun.exit_code:  # torch elastic waits for this process to end, which would else wait for it
        print(end="", flush=True)
        os._exit(code)
    return code


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _settled(board: "td.Store") -> int | None:
    """The exit code that a rank has told a reason for."""
    return int(board.get("code")) if board.check(["code"]) else None


# --- in a rank --------------------------------------------------------------------------------------------------------


def enter(argv: list[str]) -> None:
    """Become one of several ranks: rank 0 alone speaks. Leaves at once when all that is to be said has been said.

    Raises RecipeError for a command that cannot be divided.
    """
    if (code := _settled(distributed.store())) is not None:
        sys.exit(code)
    if os.environ["RANK"] != "0":
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (for the rest of the process)
    command = next((word for word in argv if not word.startswith("-")), "")
    if command and command not in DIVIDED:
        raise RecipeError(f"kdcli {command} is the work of one process", hint="Run it without torchrun.")


def leave(error: BaseException, say: Callable[[BaseException], int], *, debug: bool = False) -> NoReturn:
    """End a rank after an error: the first to have one says it, all leave with its exit code.

    A rank whose error is the loss of another waits for that one's word; there is none when it died without. One that is
    broken off before it had anything to save says nothing: torch elastic may be ending it because another died.
    """
    if isinstance(error, KeyboardInterrupt) and "TORCHELASTIC_RESTART_COUNT" in os.environ:
        os._exit(InterruptedRun.exit_code)
    board, mine = distributed.store(), None
    if not _echo(error) and board.add(f"speaker-{distributed.restarts()}", 1) == 1:
        sys.stderr = sys.__stderr__
        if debug and not isinstance(error, KdcliError):
            traceback.print_exception(error)
        mine = say(error)
        board.set("code", str(mine))
    code = mine if mine is not None else _within(GRACE, lambda: _settled(board))
    together = None
    if code is not None:
        left = f"left-{distributed.restarts()}"
        board.add(left, 1)
        together = _within(GRACE, lambda: board.add(left, 0) >= distributed.expected_ranks() or None)
    if together:
        sys.exit(code)
    print(end="", file=sys.stderr, flush=True)
    os._exit(code or DIED)  # some wait for this one in an exchange that will never be: torch elastic ends them


def _echo(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    if isinstance(error, KdcliError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, td.DistError) or any(word in str(error) for word in ("gloo", "Connection closed by peer"))


def _within(seconds: float, ask: Callable[[], int | None]) -> int | None:
    """The first answer that is not None, or None when time is up."""
    end = time.monotonic() + seconds
    while (answer := ask()) is None and time.monotonic() < end:
        time.sleep(0.05)
    return answer
