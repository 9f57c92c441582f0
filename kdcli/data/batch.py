"""A batch: images with targets, each named so that it can be drawn again; and its share on one of several ranks."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcli.system import distributed, shards
from kdcli.system.shards import Layout

Device = torch.device | str


@dataclass(frozen=True)
class GlobalBatch:
    """Targets and indices of a whole batch whose images are divided among ranks.

    It may be a micro-batch: rows `at` to `at + len(index)` of a batch of `size`.
    """

    target: Tensor
    index: Tensor
    mirrored: bool
    size: int
    at: int = 0

    @property
    def layout(self) -> Layout:
        """Which rows are on which rank."""
        return shards.layout(self.size, self.at, self.at + len(self.index), self.mirrored, self.index.device)


@dataclass
class Batch:
    """Some samples; with several ranks this rank's share of a global batch.

    images: [B, 3, H, W] float32 in [0, 1] (float data: as stored), not normalised.
    target: [B, ...], what the task makes of a label: class numbers [B] int64, or [B, K] float32 of several classes or
        after mixup.
    index: [B] int64, each sample's number in its full set.
    view: [B] int64, the name of its augmented reading; -1 for the plain image.
    host: index and view on the CPU where available, to be read without waiting for a device.
    whole: targets and indices of the global batch; None on a single rank.
    strong: [B, 3, H, W] each sample's strong view; None unless a method needs two views.
    """

    images: Tensor
    target: Tensor
    index: Tensor
    view: Tensor
    host: tuple[Tensor, Tensor] | None = None
    whole: GlobalBatch | None = None
    strong: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def global_batch(self) -> "Batch | GlobalBatch":
        """Targets and indices of the whole batch over all ranks."""
        return self.whole or self

    def to(self, device: Device) -> "Batch":
        here = {name: moved(getattr(self, name), device) for name in ("images", "target", "index", "view")}
        return replace(self, **here, strong=None if self.strong is None else moved(self.strong, device))

    def on_host(self) -> tuple[Tensor, Tensor]:
        """Index and view on the CPU; waits for the device only where `host` is not set."""
        return self.host or (self.index.cpu(), self.view.cpu())

    def micro(self, start: int, end: int) -> "Batch":
        """Rows `start` to `end` of the global batch, or this rank's share of them."""
        if start == 0 and end >= len(self.global_batch.index):
            return self
        whole, rows = self.whole, slice(start, end)
        if whole is not None:
            whole = replace(whole, target=whole.target[rows], index=whole.index[rows], at=start)
            rows = whole.layout.own
        cut = {name: getattr(self, name)[rows] for name in ("images", "target", "index", "view")}
        host = None if self.host is None else (self.host[0][rows], self.host[1][rows])
        return replace(self, **cut, host=host, whole=whole, strong=None if self.strong is None else self.strong[rows])

    def share(self, mirrored: bool) -> "Batch":
        """This rank's share: `images` holds its rows already, the other fields those of the global batch."""
        if distributed.alone():
            return self
        whole = GlobalBatch(self.target, self.index, mirrored, len(self.index))
        rows = whole.layout.rows
        target, index, view = (x.index_select(0, rows) for x in (self.target, self.index, self.view))
        host = self.host
        if host is not None:
            here = shards.ranks_of_rows(len(host[0]), mirrored) == distributed.rank()
            host = host[0][here], host[1][here]
        return replace(self, target=target, index=index, view=view, host=host, whole=whole)


def moved(x: Tensor, device: Device) -> Tensor:
    """`x` on `device`. Only copies to CUDA are asynchronous: in the other direction values could be read too early."""
    towards = torch.device(device).type == "cuda"
    if towards and x.device.type == "cpu":
        x = x.pin_memory()  # from memory that may be paged out, a copy waits for the steps before it
    return x.to(device, non_blocking=towards)
