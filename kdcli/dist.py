"""Ranks: processes that divide every batch among them, and the one room that knows about them.

A rank draws and forwards its own rows of each batch. What networks answer is then gathered, so that every rank computes
the loss of the whole batch, whatever couples its samples; DistributedDataParallel averages the gradients. Alone, every
function here hands back what it was given. `launch` starts ranks, torchrun does too.
"""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as td
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from kdcli.errors import KdcliError, RecipeError
from kdcli.methods.base import View

if TYPE_CHECKING:
    from kdcli.data import Batch, Split
    from kdcli.recipe import TrainConfig

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
    try:
        value = do() if leads else None
    finally:
        anyone(False)
    return do() if value is None else value


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


# --- one batch, divided -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """The batch of which a rank's own batch is a share: target [n] or [n, K] and index [n] of all its rows.

    It may itself be a micro-batch: rows `at` and following of a batch of `size`.
    """

    target: Tensor
    index: Tensor
    mirrored: bool
    size: int
    at: int = 0


@dataclass(frozen=True)
class _Layout:
    """Which rows of a (micro-)batch are whose."""

    own: slice  # of the rank's own rows of the whole batch, those in this micro-batch
    rows: Int[Tensor, " own"]  # where they lie in the micro-batch
    width: int  # the most rows a rank has
    fewest: int
    order: Int[Tensor, " n"]  # for every row its place in all ranks' rows, padded to `width` and joined


def holders(size: int, mirrored: bool) -> Int[Tensor, " size"]:
    """The rank of each row of a batch: dealt like cards, so that every rank has its share of each micro-batch too.

    `mirrored` gives row i and row -1-i to one rank: the two that mixup and cutmix mix.
    """
    row = torch.arange(size)
    return (torch.minimum(row, size - 1 - row) if mirrored else row) % world()


@cache
def _layout(size: int, at: int, end: int, mirrored: bool, device: torch.device) -> _Layout:
    whose = holders(size, mirrored)
    before, whose = int((whose[:at] == rank()).sum()), whose[at:end]
    rows = [(whose == one).nonzero()[:, 0] for one in range(world())]
    width, mine = max(map(len, rows)), rows[rank()]
    order = torch.empty(end - at, dtype=torch.int64)
    for one, where in enumerate(rows):
        order[where] = one * width + torch.arange(len(where))
    own = slice(before, before + len(mine))
    return _Layout(own, mine.to(device), width, min(map(len, rows)), order.to(device))


def _layout_of(whole: Whole) -> _Layout:
    return _layout(whole.size, whole.at, whole.at + len(whole.index), whole.mirrored, whole.index.device)


def own_rows(count: int, size: int, mirrored: bool) -> tuple[Tensor | slice, int]:
    """Of `count` rows in batches of `size` those that are this rank's, and how many of them a full batch has."""
    if alone():
        return slice(None), size
    batches = [torch.arange(at, min(at + size, count)) for at in range(0, count, size)]
    mine = [rows[holders(len(rows), mirrored) == rank()] for rows in batches]
    return torch.cat(mine), int((holders(size, mirrored) == rank()).sum())


def divide(batch: "Batch", mirrored: bool) -> "Batch":
    """A batch with the pixels of this rank alone, but named in whole, as this rank's share."""
    if alone():
        return batch
    whole = Whole(batch.target, batch.index, mirrored, len(batch.index))
    rows = _layout_of(whole).rows
    target, index, view = (x.index_select(0, rows) for x in (batch.target, batch.index, batch.view))
    return dataclasses.replace(batch, target=target, index=index, view=view, whole=whole)


def micro(batch: "Batch", at: int, end: int) -> "Batch":
    """Rows `at` to `end` of the whole batch, or this rank's share of them."""
    whole, own = batch.whole, slice(at, end)
    if whole is not None:
        whole = dataclasses.replace(whole, target=whole.target[at:end], index=whole.index[at:end], at=at)
        own = _layout_of(whole).own
    cut = {name: getattr(batch, name)[own] for name in ("pixels", "target", "index", "view")}
    return dataclasses.replace(batch, **cut, whole=whole)


def check(images: int, config: "TrainConfig") -> None:
    """Raise RecipeError for batches that leave a rank without images, and for norms that cannot be synchronised."""
    if alone():
        return
    if config.sync_bn and "nccl" not in str(td.get_backend_config()):
        raise RecipeError(
            "train.sync_bn: torch synchronises batch statistics between GPUs only, and these ranks compute on the CPU",
            hint="--set train.sync_bn=false, or ranks on GPUs.",
        )
    mixing = bool(config.mixup or config.cutmix)
    rest = 0 if config.drop_last else images % config.batch_size
    for size in {config.batch_size, 0 if mixing and rest % 2 else rest} - {0}:
        step = -(-size // config.accumulate)
        for at in range(0, size, step):
            end = min(at + step, size)
            if not _layout(size, at, end, mixing, torch.device("cpu")).fewest:
                kind = "a micro-batch" if step < size else "a batch" if size == config.batch_size else "the last batch"
                raise RecipeError(
                    f"train.batch_size = {config.batch_size}: {kind} of {end - at} images, too few for each of "
                    f"{world()} ranks to have one",
                    hint="Fewer ranks, a larger batch, a smaller train.accumulate; --set train.drop_last=true leaves a "
                    "short last batch out.",
                )


# --- one loss, one update ---------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """All ranks' rows in the whole batch's order; back comes the gradient of the own ones, times the number of ranks.

    Each rank holds the whole loss's full gradient with respect to its own rows, and the average that
    DistributedDataParallel takes over ranks would divide their sum.
    """

    @staticmethod
    def forward(ctx: Any, layout: _Layout, *locals_: Tensor) -> tuple[Tensor, ...]:
        ctx.rows = layout.rows
        return tuple(_gathered(x, layout.width).index_select(0, layout.order) for x in locals_)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (None, *(grad.index_select(0, ctx.rows) * world() for grad in grads))


def _gathered(rows: Float[Tensor, "b ..."], width: int) -> Float[Tensor, "n ..."]:
    """Every rank's rows, each padded to `width`, in the order of ranks."""
    padded = torch.cat([rows, rows.new_zeros(width - len(rows), *rows.shape[1:])]) if len(rows) < width else rows
    out = rows.new_empty(world() * width, *rows.shape[1:])
    td.all_gather_into_tensor(out, padded.contiguous())
    return out


def whole(view: View, batch: "Batch", dim: int = 0) -> View:
    """An answer to this rank's rows made one to all rows of the (micro-)batch; `dim` is the rows' (mentors: 1)."""
    if batch.whole is None:
        return view
    maps = view.maps or {}
    given = {"out": view.out, "pooled": view.pooled, **{f"maps/{name}": x for name, x in maps.items()}}
    given = {name: x.movedim(dim, 0) for name, x in given.items() if x is not None}
    # all in one: what a loss leaves out then has a gradient of zero, and no rank waits for one that never comes
    got = dict(zip(given, _Gather.apply(_layout_of(batch.whole), *given.values()), strict=True))  # pyright: ignore
    got = {name: x.movedim(0, dim) for name, x in got.items()}
    joined = {name: got[f"maps/{name}"] for name in maps}
    return View(got["out"], got.get("pooled"), joined if view.maps is not None else None)


def parallel(module: nn.Module, learns: bool) -> nn.Module:
    """The module with gradients averaged over ranks, where it learns; its own names and state stay as they are."""
    if alone() or not learns:
        return module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 has a new name for broadcast_buffers, 2.11 has not
        return DistributedDataParallel(
            module,
            broadcast_buffers=False,  # `even_out` does it, once an update
            find_unused_parameters=True,  # also keeps the order in which gradients are summed the same after a resume
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
        x.view(-1)
        for module in modules.values()
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and not isinstance(norm, nn.SyncBatchNorm) and norm.training
        for x in (norm.running_mean, norm.running_var)
        if x is not None
    ]
    _summed(stats, len(batch.index) / batch.whole.size)
    _summed([p.grad.view(-1) for p in replicated if p.grad is not None], 1 / world())


@torch.no_grad()
def _summed(flat: list[Tensor], share: float) -> None:
    """Every vector becomes the sum over ranks of `share` times it, all in one exchange."""
    if flat:
        joined = torch.cat(flat).mul_(share)
        td.all_reduce(joined)
        for x, mean in zip(flat, joined.split([len(x) for x in flat]), strict=True):
            x.copy_(mean)


def sync_norms(module: nn.Module) -> None:
    """Batch norms that normalise by the statistics of the whole batch, where several ranks divide it."""
    from timm.layers import convert_sync_batchnorm  # torch's own would lose the activations inside timm's norms

    if not alone():
        convert_sync_batchnorm(module)


# --- scores -----------------------------------------------------------------------------------------------------------


def own_batches(split: "Split", size: int) -> "Split":
    """This rank's share of a split that is read in order: whole batches, the very ones that one rank would read."""
    return split if alone() else split.subset(_turns(len(split), size)[rank()])


def _turns(count: int, size: int) -> list[Int[Tensor, " rows"]]:
    """The rows of every rank when batches of `size` are dealt one by one."""
    place = torch.arange(count)
    return [place[place // size % world() == one] for one in range(world())]


def rejoin(out: list[Tensor], count: int, size: int) -> Float[Tensor, "count K"]:
    """All ranks' answers [<=size, K] to their `own_batches`, on the CPU, as one in the split's order."""
    if alone():
        return torch.cat(out)
    columns = first(lambda: out[0].shape[1])  # a rank may have had no batch at all
    turns = _turns(count, size)
    width = max(map(len, turns))
    got = _gathered(torch.cat([torch.empty(0, columns), *out]), width).split(width)
    joined = torch.empty(count, columns)
    for rows, answers in zip(turns, got, strict=True):
        joined[rows] = answers[: len(rows)]
    return joined
