"""Which rows of a batch, or of a split that is scored, belong to which rank; joining all ranks' rows again.

On a single rank nothing here is needed: callers check `distributed.alone()` first.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as td
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from kdcli.system import distributed


@dataclass(frozen=True)
class Layout:
    """Which rows of a (micro-)batch are on which rank."""

    own: slice  # this micro-batch's part of this rank's rows of the whole batch
    rows: Int[Tensor, " own"]  # their positions in the micro-batch
    width: int  # rows of the rank that has the most
    fewest: int  # rows of the rank that has the fewest
    order: Int[Tensor, " n"]  # each row's position in the gathered rows, where every rank's are padded to `width`


def ranks_of_rows(size: int, mirrored: bool) -> Int[Tensor, " size"]:
    """The rank of each row of a batch, dealt round-robin, so that every rank has a share of each micro-batch.

    `mirrored` gives rows i and -1-i, which mixup and cutmix mix, to the same rank.
    """
    row = torch.arange(size)
    return (torch.minimum(row, size - 1 - row) if mirrored else row) % distributed.world()


@cache
def layout(size: int, start: int, end: int, mirrored: bool, device: torch.device) -> Layout:
    """The layout of rows `start` to `end` of a batch of `size`."""
    ranks = ranks_of_rows(size, mirrored)
    before, ranks = int((ranks[:start] == distributed.rank()).sum()), ranks[start:end]
    rows = [(ranks == one).nonzero()[:, 0] for one in range(distributed.world())]
    width, own = max(map(len, rows)), rows[distributed.rank()]
    order = torch.empty(end - start, dtype=torch.int64)
    for one, where in enumerate(rows):
        order[where] = one * width + torch.arange(len(where))
    return Layout(
        slice(before, before + len(own)), own.to(device), width, min(map(len, rows)), order.to(device)
    )  # fmt: skip


def own_rows(count: int, size: int, mirrored: bool) -> tuple[Tensor | slice, int]:
    """This rank's rows of `count` rows in batches of `size`, and the number of them in a full batch."""
    if distributed.alone():
        return slice(None), size
    batches = [torch.arange(at, min(at + size, count)) for at in range(0, count, size)]
    own = [rows[ranks_of_rows(len(rows), mirrored) == distributed.rank()] for rows in batches]
    return torch.cat(own), int((ranks_of_rows(size, mirrored) == distributed.rank()).sum())


class Gather(torch.autograd.Function):
    """`Gather.apply(layout, *tensors)`: all ranks' rows of each tensor, in the order of the whole batch.

    Backward returns the gradient of this rank's rows times the number of ranks: every rank has the full gradient of the
    whole loss with respect to its rows, and DistributedDataParallel's average will divide it.
    """

    @staticmethod
    def forward(ctx: Any, layout: Layout, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.rows = layout.rows
        return tuple(_all_rows(x, layout.width).index_select(0, layout.order) for x in own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (None, *(grad.index_select(0, ctx.rows) * distributed.world() for grad in grads))


def _all_rows(rows: Shaped[Tensor, "b ..."], width: int) -> Shaped[Tensor, "n ..."]:
    """Every rank's rows, each rank's padded to `width`, in the order of ranks."""
    padded = torch.cat([rows, rows.new_zeros(width - len(rows), *rows.shape[1:])]) if len(rows) < width else rows
    out = rows.new_empty(distributed.world() * width, *rows.shape[1:])
    all_gather_into(out, padded.contiguous())
    return out


def all_gather_into(out: Tensor, rows: Tensor) -> None:
    """torch's all-gather into one tensor, under the name that this version of torch prefers."""
    gather = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor
    gather(out, rows)


def turns(count: int, size: int) -> list[Int[Tensor, " rows"]]:
    """The rows of every rank when batches of `size` out of `count` rows are dealt round-robin."""
    place = torch.arange(count)
    return [place[place // size % distributed.world() == one] for one in range(distributed.world())]


def rejoin(out: list[Tensor], count: int, size: int) -> Float[Tensor, "count ..."]:
    """All ranks' outputs [<=size, ...] of the batches that `turns` gave them, on the CPU, in the original order."""
    if distributed.alone():
        return torch.cat(out)
    shape = distributed.on_rank0(lambda: tuple(out[0].shape[1:]))  # a rank may have no batch at all
    rows = turns(count, size)
    width = max(map(len, rows))
    parts = _all_rows(torch.cat([torch.empty(0, *shape), *out]), width).split(width)
    joined = torch.empty(count, *shape)
    for where, part in zip(rows, parts, strict=True):
        joined[where] = part[: len(where)]
    return joined
