"""Ranks on this machine, started through torch elastic: they print an error once and all exit with its code."""

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
GRACE = 5.0  # seconds that ranks wait for each other before they exit with an error
DIED = 1  # exit code of a rank that lost the connection to the others: torch elastic restarts all of them

Main = Callable[[list[str]], None]
"""Runs a command line and exits."""


def launch(entry: Main, argv: list[str], ranks: int, device: str | None, *, debug: bool = False) -> None:
    """Run a command line in several processes and exit with their code; with one rank it returns at once.

    When a rank dies (without having reported an error) all are restarted, up to RESTARTS times.

    Args:
        entry: called in every rank with `argv`; a function at the top level of its module, which a new process can
            import.

    Raises:
        RecipeError: more ranks than GPUs.
        InterruptedRun: a signal before the ranks could save anything, or a rank that died after the last restart.
    """
    have = torch.cuda.device_count()
    if device not in (None, "auto", "cpu", "cuda"):
        raise RecipeError(
            f"--gpus {ranks} --device {device}: every rank uses a GPU of its own", hint="Use --device cuda, or cpu."
        )
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
        logging.disable(logging.CRITICAL)  # kdcli reports a rank's death itself
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
            code = max(elastic_launch(config, _rank)(entry, argv).values())
    except SignalException as error:
        code = _reported(board)
        if code is None:
            raise InterruptedRun(f"stopped by {error.sigval.name}; the last checkpoint is kept") from None
    except ChildFailedError as error:
        code = _reported(board)
        if code is None:
            number, failure = min(error.failures.items())
            raise InterruptedRun(
                f"rank {number} died ({_ending(failure.exitcode)}), and again after {RESTARTS} restarts",
                hint="SIGKILL often means too little memory: fewer ranks, a smaller train.batch_size or "
                "data.workers=0. `kdcli runs ls` shows the run; --resume continues it.",
            ) from None
    finally:
        logging.disable(logging.NOTSET)
    sys.exit(_reported(board) or code)


def _rank(entry: Main, argv: list[str]) -> int:
    """Run the command line in one of the processes. Returns its exit code: torch elastic would restart a failure."""
    code = 0
    try:
        entry(argv)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    if code == InterruptedRun.exit_code:  # torch elastic and this process would wait for each other
        print(end="", flush=True)
        os._exit(code)
    return code


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _reported(board: "td.Store") -> int | None:
    """The exit code of the error that a rank has printed; None when there is none."""
    return int(board.get("code")) if board.check(["code"]) else None


# --- in a rank --------------------------------------------------------------------------------------------------------


def enter(argv: list[str]) -> None:
    """Set up this process as a rank; only rank 0 prints. Exits if a rank has already reported an error.

    Raises RecipeError for a command that cannot be divided.
    """
    if (code := _reported(distributed.store())) is not None:
        sys.exit(code)
    if os.environ["RANK"] != "0":
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (for the rest of the process)
    command = next((word for word in argv if not word.startswith("-")), "")
    if command and command not in DIVIDED:
        raise RecipeError(f"kdcli {command} runs in one process", hint="Run it without torchrun.")


def leave(error: BaseException, report: Callable[[BaseException], int], *, debug: bool = False) -> NoReturn:
    """End a rank after an error: the first rank with an error prints it with `report`, all exit with its code.

    A rank whose error is a lost connection waits for the other rank's report, which is missing if that one was killed.
    A rank that is interrupted before it had anything to save prints nothing: torch elastic may be ending it because
    another died.
    """
    if isinstance(error, KeyboardInterrupt) and "TORCHELASTIC_RESTART_COUNT" in os.environ:
        os._exit(InterruptedRun.exit_code)
    board, mine = distributed.store(), None
    if not _lost_connection(error) and board.add(f"reporter-{distributed.restarts()}", 1) == 1:
        sys.stderr = sys.__stderr__
        if debug and not isinstance(error, KdcliError):
            traceback.print_exception(error)
        mine = report(error)
        board.set("code", str(mine))
    code = mine if mine is not None else _within(GRACE, lambda: _reported(board))
    together = None
    if code is not None:
        left = f"left-{distributed.restarts()}"
        board.add(left, 1)
        together = _within(GRACE, lambda: board.add(left, 0) >= distributed.expected_ranks() or None)
    if together:
        sys.exit(code)
    print(end="", file=sys.stderr, flush=True)
    os._exit(code or DIED)  # ranks that wait for this one in a collective are ended by torch elastic


def _lost_connection(error: BaseException) -> bool:
    """Whether an error only means that another rank is gone."""
    if isinstance(error, KdcliError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, td.DistError) or any(word in str(error) for word in ("gloo", "Connection closed by peer"))


def _within(seconds: float, poll: Callable[[], int | None]) -> int | None:
    """The first result of `poll` that is not None, or None when time is up."""
    end = time.monotonic() + seconds
    while (found := poll()) is None and time.monotonic() < end:
        time.sleep(0.05)
    return found
