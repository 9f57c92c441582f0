"""Ranks: the processes that share every batch. Who they are, what they must agree on, what they average.

A rank draws and forwards its own rows of each batch. The networks' outputs are then gathered (`shards`), so that every
rank computes the loss of the whole batch even where it couples samples; DistributedDataParallel averages the gradients.
On a single rank every function here does nothing. `kdcli --gpus N` starts ranks; so does torchrun.
"""

import contextlib
import inspect
import os
import platform
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from kdcli.errors import KdcliError, RecipeError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # how long ranks wait for one that is silent; one that died is noticed at once


# --- who they are -----------------------------------------------------------------------------------------------------


def expected_ranks() -> int:
    """The number of ranks that the environment declares (set by torchrun or `kdcli --gpus`); 1 without them."""
    known = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ.get("WORLD_SIZE", "1")) if known else 1


def alone() -> bool:
    """Whether this is the only rank."""
    return not (td.is_available() and td.is_initialized())


def rank() -> int:
    return 0 if alone() else td.get_rank()


def world() -> int:
    return 1 if alone() else td.get_world_size()


def local_ranks() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if expected_ranks() > 1 else 1


def restarts() -> int:
    """How often these ranks were restarted because one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if expected_ranks() > 1 else 0


def describe() -> str:
    """The number of ranks and machines and the backend, for notes and provenance."""
    if alone():
        return "1"
    machines = max(world() // local_ranks(), 1)
    backend = "nccl" if "nccl" in str(td.get_backend_config()) else "gloo"
    return f"{world()} on {machines} machine{'s' if machines > 1 else ''}, {backend}"


def join(device: torch.device, gpus: int | None = None) -> torch.device:
    """Join the process group, if the environment declares one; returns this rank's device.

    Raises RecipeError when `gpus` is not the declared number of ranks, or a rank would have no device.
    """
    if expected_ranks() == 1:
        return device
    if gpus not in (None, expected_ranks()):
        raise RecipeError(
            f"--gpus {gpus}: this process is already one of {expected_ranks()} ranks",
            hint="Leave --gpus out: torchrun's --nproc-per-node sets the number.",
        )
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        if device.index is not None or local >= torch.cuda.device_count():
            raise RecipeError(
                f"rank {os.environ['RANK']} needs GPU {local} of its machine, which has {torch.cuda.device_count()}",
                hint="Start one rank per GPU, and give --device cuda without a number.",
            )
        if not td.is_nccl_available():
            raise RecipeError("this build of torch has no NCCL, which several GPUs need", hint="Use torch for Linux.")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise RecipeError(
            f"--device {device}: several ranks run on cuda or cpu", hint="--device cpu, or a single process."
        )
    td.init_process_group(  # decisions are exchanged over gloo, tensors on GPUs over NCCL
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=td.PrefixStore(f"attempt-{restarts()}", store()),
        rank=int(os.environ["RANK"]),
        world_size=expected_ranks(),
        timeout=TIMEOUT,
    )
    return device


def shutdown() -> None:
    """Leave the process group once every rank has got here."""
    if not alone():
        any_rank(False)
        td.destroy_process_group()


# --- what all ranks must agree on -------------------------------------------------------------------------------------


@cache
def store() -> "td.TCPStore":
    """The key-value store of the ranks; it outlives ranks that are restarted."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    serve = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if address := os.environ.get("KDCLI_BOARD"):  # the launcher's store
        (host, _, port), serve = address.rpartition(":"), False
    return td.TCPStore(host, int(port), is_master=serve, wait_for_workers=False, timeout=TIMEOUT)


def remember_run(path: str) -> None:
    """Store the run that this command writes, for the ranks that are restarted when one dies."""
    if not alone():
        store().set("run", path)


def resumable_run() -> str | None:
    """The run that the ranks before the restart began; None on a first start."""
    if alone() or restarts() == 0 or not store().check(["run"]):
        return None
    return store().get("run").decode()


def on_rank0(do: Callable[[], T]) -> T:
    """Call `do` on rank 0 only; every rank returns its result or raises its KdcliError."""
    if alone():
        return do()
    box: list[Any] = [None]
    if rank() == 0:
        try:
            box = [(do(), None)]
        except KdcliError as error:
            box = [(None, error)]
    td.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    value, error = box[0]
    if error is not None:
        raise error
    return value


def local_rank0_first(do: Callable[[], T]) -> T:
    """Call `do` on one rank of each machine first, then on the others, so that a download happens once."""
    if alone():
        return do()
    if os.environ.get("LOCAL_RANK", "0") != "0":
        any_rank(False)  # waits for the first rank of every machine
        return do()
    try:
        return do()
    finally:
        any_rank(False)


def check_equal(facts: dict[str, str]) -> None:
    """Raise RecipeError when a rank's recipe, data or weights differ from rank 0's: machines with different files."""
    if alone():
        return
    gathered: list[Any] = [None] * world()
    td.all_gather_object(gathered, (platform.node(), facts))
    first_machine, first = gathered[0]
    for number, (machine, own) in enumerate(gathered):
        if wrong := [name for name, value in own.items() if first.get(name) != value]:
            raise RecipeError(
                f"rank {number} on {machine} has another {wrong[0]} than rank 0 on {first_machine}",
                hint="Every machine needs the same data, KDCLI_HOME and recipe, best on a shared disk.",
            )


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank. Waits for the slowest rank, but not for a device."""
    if alone():
        return flag
    flags = torch.tensor(int(flag))
    td.all_reduce(flags, td.ReduceOp.MAX)
    return bool(flags)


def seed_offset() -> tuple[int, ...]:
    """Numbers to mix into the seed of noise that must differ between ranks; none on rank 0."""
    return (rank() + 2**32,) if rank() else ()


# --- one update -------------------------------------------------------------------------------------------------------


def data_parallel(module: nn.Module, learns: bool) -> nn.Module:
    """The module, with its gradients averaged over ranks if it learns. The module itself is not changed."""
    if alone() or not learns:
        return module
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.13 and newer
    options: dict[str, Any] = {
        "find_unused_parameters": True,  # also keeps the order of summation the same after a resume
        "forward_sync_buffers" if renamed else "broadcast_buffers": False,  # `sync_stats_and_grads` averages them
    }
    return DistributedDataParallel(module, **options)


@contextlib.contextmanager
def no_sync(modules: "dict[str, nn.Module]", last: bool) -> Iterator[None]:
    """Exchange gradients in the last micro-batch of an update only."""
    with contextlib.ExitStack() as stack:
        for module in modules.values():
            if isinstance(module, DistributedDataParallel) and not last:
                stack.enter_context(module.no_sync())
        yield


def sync_stats_and_grads(modules: "dict[str, nn.Module]", replicated: list[nn.Parameter], share: float) -> None:
    """After backward, make equal on all ranks what DistributedDataParallel does not average.

    Running statistics of batch norms become the mean over ranks, weighted by `share`, this rank's share of the images.
    Gradients of `replicated` parameters (a method's own) are complete on every rank already and differ by rounding
    only; they are averaged.
    """
    stats = [
        x
        for module in modules.values()
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and not isinstance(norm, nn.SyncBatchNorm) and norm.training
        for x in (norm.running_mean, norm.running_var)
        if x is not None
    ]
    _sum(stats, share)
    _sum([p.grad for p in replicated if p.grad is not None], 1 / world())


@torch.no_grad()
def _sum(values: list[Tensor], share: float) -> None:
    """Replace every tensor by the sum over ranks of `share` times it, in one exchange."""
    if values:
        joined = torch.cat([x.reshape(-1) for x in values]).mul_(share)
        td.all_reduce(joined)
        for x, mean in zip(values, joined.split([x.numel() for x in values]), strict=True):
            x.copy_(mean.view_as(x))


def sync_norms(module: nn.Module) -> None:
    """Make batch norms use the statistics of the whole batch, where several ranks share it.

    Raises RecipeError on CPUs, where torch cannot synchronise them.
    """
    from timm.layers import convert_sync_batchnorm  # torch's function would lose the activations inside timm's norms

    if alone():
        return
    if "nccl" not in str(td.get_backend_config()):
        raise RecipeError(
            "train.sync_bn: torch synchronises batch statistics between GPUs only, and these ranks run on the CPU",
            hint="--set train.sync_bn=false, or ranks on GPUs.",
        )
    convert_sync_batchnorm(module)
