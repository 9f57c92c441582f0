"""Shares: which rows of a batch, and of a split that is scored, are whose, and how ranks' answers become one again.

Alone, every function here hands back what it was given.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as td
from jaxtyping import Float, Int
from torch import Tensor

from kdcli.errors import RecipeError
from kdcli.methods.base import Maps, View
from kdcli.system import distributed

if TYPE_CHECKING:
    from kdcli.data import Batch, Split
    from kdcli.recipe import TrainConfig


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
    return (torch.minimum(row, size - 1 - row) if mirrored else row) % distributed.world()


@cache
def _layout(size: int, at: int, end: int, mirrored: bool, device: torch.device) -> _Layout:
    whose = holders(size, mirrored)
    before, whose = int((whose[:at] == distributed.rank()).sum()), whose[at:end]
    rows = [(whose == one).nonzero()[:, 0] for one in range(distributed.world())]
    width, mine = max(map(len, rows)), rows[distributed.rank()]
    order = torch.empty(end - at, dtype=torch.int64)
    for one, where in enumerate(rows):
        order[where] = one * width + torch.arange(len(where))
    own = slice(before, before + len(mine))
    return _Layout(own, mine.to(device), width, min(map(len, rows)), order.to(device))


def _layout_of(whole: Whole) -> _Layout:
    return _layout(whole.size, whole.at, whole.at + len(whole.index), whole.mirrored, whole.index.device)


def own_rows(count: int, size: int, mirrored: bool) -> tuple[Tensor | slice, int]:
    """Of `count` rows in batches of `size` those that are this rank's, and how many of them a full batch has."""
    if distributed.alone():
        return slice(None), size
    batches = [torch.arange(at, min(at + size, count)) for at in range(0, count, size)]
    mine = [rows[holders(len(rows), mirrored) == distributed.rank()] for rows in batches]
    return torch.cat(mine), int((holders(size, mirrored) == distributed.rank()).sum())


def divide(batch: "Batch", mirrored: bool) -> "Batch":
    """A batch with the pixels of this rank alone, but named in whole, as this rank's share."""
    if distributed.alone():
        return batch
    whole = Whole(batch.target, batch.index, mirrored, len(batch.index))
    rows = _layout_of(whole).rows
    target, index, view = (x.index_select(0, rows) for x in (batch.target, batch.index, batch.view))
    host = batch.host
    if host is not None:
        own = holders(len(host[0]), mirrored) == distributed.rank()
        host = host[0][own], host[1][own]
    return dataclasses.replace(batch, target=target, index=index, view=view, host=host, whole=whole)


def micro(batch: "Batch", at: int, end: int) -> "Batch":
    """Rows `at` to `end` of the whole batch, or this rank's share of them."""
    whole, own = batch.whole, slice(at, end)
    if whole is not None:
        whole = dataclasses.replace(whole, target=whole.target[at:end], index=whole.index[at:end], at=at)
        own = _layout_of(whole).own
    cut = {name: getattr(batch, name)[own] for name in ("pixels", "target", "index", "view")}
    host = None if batch.host is None else (batch.host[0][own], batch.host[1][own])
    strong = None if batch.strong is None else batch.strong[own]
    return dataclasses.replace(batch, **cut, host=host, whole=whole, strong=strong)


def check(images: int, config: "TrainConfig") -> None:
    """Raise RecipeError for batches that leave a rank without images."""
    if distributed.alone():
        return
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
                    f"{distributed.world()} ranks to have one",
                    hint="Fewer ranks, a larger batch, a smaller train.accumulate; --set train.drop_last=true leaves a "
                    "short last batch out.",
                )


# --- one loss ---------------------------------------------------------------------------------------------------------


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
        return (None, *(grad.index_select(0, ctx.rows) * distributed.world() for grad in grads))


def _gathered(rows: Float[Tensor, "b ..."], width: int) -> Float[Tensor, "n ..."]:
    """Every rank's rows, each padded to `width`, in the order of ranks."""
    padded = torch.cat([rows, rows.new_zeros(width - len(rows), *rows.shape[1:])]) if len(rows) < width else rows
    out = rows.new_empty(distributed.world() * width, *rows.shape[1:])
    all_gather_into(out, padded.contiguous())
    return out


def all_gather_into(out: Tensor, rows: Tensor) -> None:
    """torch's all-gather into one tensor, under the name that this version of torch prefers."""
    gather = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor
    gather(out, rows)


def whole(view: View, batch: "Batch", dim: int = 0) -> View:
    """An answer to this rank's rows made one to all rows of the (micro-)batch; `dim` is the rows' (mentors: 1)."""
    if batch.whole is None:
        return view
    parts: list[Tensor] = []
    _spread(view, dim, parts)
    # all in one: what a loss leaves out then has a gradient of zero, and no rank waits for one that never comes
    joined = iter(_Gather.apply(_layout_of(batch.whole), *parts))  # pyright: ignore
    return _gather_up(view, dim, joined)


def _spread(view: View, dim: int, parts: list[Tensor]) -> None:
    """All tensors of an answer, their rows first."""
    pooled = view.pooled if isinstance(view.pooled, tuple) else [view.pooled] if view.pooled is not None else []
    maps = view.maps if isinstance(view.maps, tuple) else [view.maps] if view.maps is not None else []
    parts += [view.out.movedim(dim, 0), *pooled, *(x for each in maps for x in each.values())]
    for beside in (view.strong, view.deep):
        if beside is not None:
            _spread(beside, dim, parts)


def _gather_up(view: View, dim: int, parts: Iterator[Tensor]) -> View:
    """An answer like `view` made of the tensors that `_spread` laid out."""

    def maps_of(each: Maps) -> Maps:
        return {name: next(parts) for name in each}

    out, pooled, maps = next(parts).movedim(0, dim), view.pooled, view.maps
    if pooled is not None:
        pooled = tuple(next(parts) for _ in pooled) if isinstance(pooled, tuple) else next(parts)
    if maps is not None:
        maps = tuple(maps_of(each) for each in maps) if isinstance(maps, tuple) else maps_of(maps)
    strong, deep = (None if one is None else _gather_up(one, dim, parts) for one in (view.strong, view.deep))
    return View(out, pooled, maps, strong, deep)


# --- scores -----------------------------------------------------------------------------------------------------------


def own_batches(split: "Split", size: int) -> "Split":
    """This rank's share of a split that is read in order: whole batches, the very ones that one rank would read."""
    return split if distributed.alone() else split.subset(_turns(len(split), size)[distributed.rank()])


def _turns(count: int, size: int) -> list[Int[Tensor, " rows"]]:
    """The rows of every rank when batches of `size` are dealt one by one."""
    place = torch.arange(count)
    return [place[place // size % distributed.world() == one] for one in range(distributed.world())]


def rejoin(out: list[Tensor], count: int, size: int) -> Float[Tensor, "count K"]:
    """All ranks' answers [<=size, K] to their `own_batches`, on the CPU, as one in the split's order."""
    if distributed.alone():
        return torch.cat(out)
    columns = distributed.first(lambda: out[0].shape[1])  # a rank may have had no batch at all
    turns = _turns(count, size)
    width = max(map(len, turns))
    got = _gathered(torch.cat([torch.empty(0, columns), *out]), width).split(width)
    joined = torch.empty(count, columns)
    for rows, answers in zip(turns, got, strict=True):
        joined[rows] = answers[: len(rows)]
    return joined
