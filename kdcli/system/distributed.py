"""Ranks: processes that divide every batch among them; who they are, what they agree on, what they average.

A rank draws and forwards its own rows of each batch. What networks answer is then gathered (`shares`), so every rank
computes the loss of the whole batch, whatever couples its samples; DistributedDataParallel averages the gradients.
Alone, every function here and in `shares` hands back what it was given. `launch` starts ranks, torchrun does too.
"""

import contextlib
import inspect
import os
import platform
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from kdcli.errors import KdcliError, RecipeError

if TYPE_CHECKING:
    from kdcli.data import Batch

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # a rank that is silent for longer is given up; one that died is noticed at once


# --- who is here ------------------------------------------------------------------------------------------------------


def expected() -> int:
    """How many ranks the environment speaks of (torchrun's, or `launch`'s); 1 for a process of its own."""
    known = all(name in os.environ for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ.get("WORLD_SIZE", "1")) if known else 1


def alone() -> bool:
    """Whether this process divides its work with nobody."""
    return not (td.is_available() and td.is_initialized())


def rank() -> int:
    return 0 if alone() else td.get_rank()


def world() -> int:
    return 1 if alone() else td.get_world_size()


def neighbours() -> int:
    """How many ranks share this machine's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if expected() > 1 else 1


def attempt() -> int:
    """How often these ranks were started again because one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if expected() > 1 else 0


def describe() -> str:
    """The ranks in words, for notes and provenance."""
    if alone():
        return "1"
    machines = max(world() // neighbours(), 1)
    backend = "nccl" if "nccl" in str(td.get_backend_config()) else "gloo"
    return f"{world()} on {machines} machine{'s' if machines > 1 else ''}, {backend}"


def join(device: torch.device, asked: int | None = None) -> torch.device:
    """Meet the other ranks, if there are any; returns the device that is this rank's own.

    Raises RecipeError when the environment's ranks are not the `asked` ones, or one of them would have no device.
    """
    if expected() == 1:
        return device
    if asked not in (None, expected()):
        raise RecipeError(
            f"--gpus {asked}: this process is one of {expected()} ranks already",
            hint="Leave --gpus out: torchrun's --nproc-per-node says how many.",
        )
    if device.type == "cuda":
        own = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        if device.index is not None or own >= torch.cuda.device_count():
            raise RecipeError(
                f"rank {os.environ['RANK']} wants GPU {own} of its machine, which has {torch.cuda.device_count()}",
                hint="One rank a GPU, and --device cuda without a number.",
            )
        if not td.is_nccl_available():
            raise RecipeError("this build of torch has no NCCL, over which GPUs exchange gradients", hint="Use Linux.")
        device = torch.device("cuda", own)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise RecipeError(f"--device {device}: ranks compute on cuda or cpu", hint="--device cpu, or one process.")
    td.init_process_group(  # what is decided travels over gloo, what lies on GPUs over NCCL
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=td.PrefixStore(f"attempt-{attempt()}", store()),
        rank=int(os.environ["RANK"]),
        world_size=expected(),
        timeout=PATIENCE,
    )
    return device


def part() -> None:
    """Leave the others, when all have come to the end."""
    if not alone():
        anyone(False)
        td.destroy_process_group()


# --- what all ranks must agree on -------------------------------------------------------------------------------------


@cache
def store() -> "td.TCPStore":
    """Where ranks leave words for each other, and for those that are started in their place."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    serve = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if board := os.environ.get("KDCLI_BOARD"):  # the launcher's own
        (host, _, port), serve = board.rpartition(":"), False
    return td.TCPStore(host, int(port), is_master=serve, wait_for_workers=False, timeout=PATIENCE)


def begin(path: str) -> None:
    """Remember the run that this command writes, for the ranks that are started again when one dies."""
    if not alone():
        store().set("run", path)


def begun() -> str | None:
    """The run that the ranks before these began and did not end."""
    if alone() or attempt() == 0 or not store().check(["run"]):
        return None
    return store().get("run").decode()


def first(do: Callable[[], T]) -> T:
    """What rank 0 gets from `do`, which it alone calls; the others wait for it, or for its KdcliError."""
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


def in_turn(do: Callable[[], T]) -> T:
    """What `do` returns, called by one rank of each machine before the others: what it downloads, it downloads once."""
    if alone():
        return do()
    leads = os.environ.get("LOCAL_RANK", "0") == "0"
    if not leads:
        anyone(False)  # waits for those who lead
        return do()
    try:
        return do()
    finally:
        anyone(False)


def alike(facts: dict[str, str]) -> None:
    """Raise RecipeError when ranks do not see the same recipe, data or weights: their machines hold different files."""
    if alone():
        return
    told: list[Any] = [None] * world()
    td.all_gather_object(told, (platform.node(), facts))
    for number, (machine, theirs) in enumerate(told):
        if wrong := [name for name, value in theirs.items() if told[0][1].get(name) != value]:
            raise RecipeError(
                f"rank {number} on {machine} finds another {wrong[0]} than rank 0 on {told[0][0]}",
                hint="Every machine needs the same data, KDCLI_HOME and recipe, best on a shared disk.",
            )


def anyone(flag: bool) -> bool:
    """Whether any rank says yes; a wait for the slowest, on the CPU, not for a device."""
    if alone():
        return flag
    said = torch.tensor(int(flag))
    td.all_reduce(said, td.ReduceOp.MAX)
    return bool(said)


def noise() -> tuple[int, ...]:
    """What to mix into the seed of noise that must differ between ranks: nothing on rank 0."""
    return (rank() + 2**32,) if rank() else ()


# --- one update -------------------------------------------------------------------------------------------------------


def parallel(module: nn.Module, learns: bool) -> nn.Module:
    """The module with gradients averaged over ranks, where it learns; its own names and state stay as they are."""
    if alone() or not learns:
        return module
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.13 and newer
    buffers = "forward_sync_buffers" if renamed else "broadcast_buffers"
    return DistributedDataParallel(
        module,
        find_unused_parameters=True,  # also keeps the order in which gradients are summed the same after a resume
        **{buffers: False},  # `even_out` does it, once an update
    )


@contextlib.contextmanager
def quiet(modules: "dict[str, nn.Module]", last: bool) -> Iterator[None]:
    """No exchange of gradients but in the last of an update's micro-batches."""
    with contextlib.ExitStack() as stack:
        for module in modules.values():
            if isinstance(module, DistributedDataParallel) and not last:
                stack.enter_context(module.no_sync())
        yield


def even_out(modules: "dict[str, nn.Module]", replicated: list[nn.Parameter], batch: "Batch") -> None:
    """After the gradients: make the same on all ranks what is not averaged with them.

    Running statistics of batch norms become the mean over ranks, weighed by their images. Gradients of parameters
    outside `modules` (a method's own) are full on every rank, but for rounding on devices that add in any order.
    """
    if batch.whole is None:
        return
    stats = [
        x
        for module in modules.values()
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and not isinstance(norm, nn.SyncBatchNorm) and norm.training
        for x in (norm.running_mean, norm.running_var)
        if x is not None
    ]
    _sum(stats, len(batch.index) / batch.whole.size)
    _sum([p.grad for p in replicated if p.grad is not None], 1 / world())


@torch.no_grad()
def _sum(values: list[Tensor], share: float) -> None:
    """Every tensor becomes the sum over ranks of `share` times it, all in one exchange."""
    if values:
        joined = torch.cat([x.reshape(-1) for x in values]).mul_(share)
        td.all_reduce(joined)
        for x, mean in zip(values, joined.split([x.numel() for x in values]), strict=True):
            x.copy_(mean.view_as(x))


def sync_norms(module: nn.Module) -> None:
    """Have batch norms normalise by the statistics of the whole batch, where several ranks divide it.

    Raises RecipeError on CPUs, which torch does not synchronise them on.
    """
    from timm.layers import convert_sync_batchnorm  # torch's own would lose the activations inside timm's norms

    if alone():
        return
    if "nccl" not in str(td.get_backend_config()):
        raise RecipeError(
            "train.sync_bn: torch synchronises batch statistics between GPUs only, and these ranks compute on the CPU",
            hint="--set train.sync_bn=false, or ranks on GPUs.",
        )
    convert_sync_batchnorm(module)
