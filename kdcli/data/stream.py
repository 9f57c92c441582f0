"""The stream of training batches: a function of the seed, from any batch on."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from timm.data.mixup import Mixup
from torch import Tensor

from kdcli.data.batch import Batch, Device
from kdcli.data.dataset import DataSet
from kdcli.data.views import Views, number
from kdcli.errors import RecipeError
from kdcli.system import shards

ORDER, MIX = 1, 2  # purposes of a hash of (seed, epoch)


class Stream:
    """Shuffled, augmented batches of `data.train` on `device`.

    Order and views are functions of (seed, epoch) and (seed, epoch, sample index): no state, nothing to save. With
    `mixup` (arXiv 1710.09412) or `cutmix` (arXiv 1905.04899), the Beta parameters (both: one of them at random for each
    batch), targets are [B,K] with `label_smoothing` folded in, and an odd last batch is dropped, since images are mixed
    in pairs; without, targets are the split's and smoothing is left to the loss. Raises RecipeError when a batch would
    be larger than the training set, and for mixing where targets are not class numbers. Each of several ranks draws its
    own rows of the same batches.

    `strong` adds every sample's strong view (`Views.strong`); refused with mixing, which would mix two views of
    different images, and where strong views cannot be drawn.
    """

    def __init__(
        self,
        data: DataSet,
        batch_size: int,
        *,
        seed: int,
        drop_last: bool = False,
        device: Device = "cpu",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        strong: bool = False,
    ) -> None:
        n = len(data.train)
        if batch_size > n:
            raise RecipeError(
                f"train.batch_size = {batch_size} is larger than the training set of {data.name}, {n} images",
                hint=f"--set train.batch_size={2 ** (max(n // 4, 1).bit_length() - 1)} fits.",
            )
        self.data, self.batch_size, self.seed, self.device = data, batch_size, seed, device
        self.mixing = bool(mixup or cutmix)
        if self.mixing and data.train.targets.ndim > 1:
            raise RecipeError(
                f"mixup and cutmix mix class numbers; the targets of {data.name} have shape "
                f"{tuple(data.train.targets.shape)}",
                hint="--set train.mixup=0 --set train.cutmix=0",
            )
        classes = {"num_classes": len(data.classes), "label_smoothing": label_smoothing}
        self._mixup = Mixup(mixup, cutmix, **classes) if self.mixing else None
        if strong and self.mixing:
            raise RecipeError(
                "the method reads a second, strong view of every image, and mixup and cutmix mix only the first",
                hint="--set train.mixup=0 --set train.cutmix=0, or a method of one view (kd, dkd).",
            )
        self._strong = data.train.store.strong() if strong else None
        full, rest = divmod(n, batch_size)
        self._batches = full + bool(rest and not drop_last and not (self.mixing and rest % 2))
        if self.mixing and batch_size % 2:
            raise RecipeError(
                f"mixup and cutmix pair images, so train.batch_size = {batch_size} must be even",
                hint=f"--set train.batch_size={batch_size + 1 if batch_size < n else batch_size - 1}",
            )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._batches

    def order(self, epoch: int) -> Int[Tensor, " N"]:
        """The epoch's permutation of the rows of `data.train`."""
        generator = torch.Generator().manual_seed(number(self.seed, epoch, ORDER))
        return torch.randperm(len(self.data.train), generator=generator)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start`, without drawing those before it."""
        train, size = self.data.train, self.batch_size
        rows = self.order(epoch)[start * size : len(self) * size]
        if not len(rows):
            return
        index = train.index[rows]
        view = train.store.views.draw(self.seed, epoch, index)
        host = zip(index.split(size), view.split(size), strict=True)
        names = zip(*(x.to(self.device).split(size) for x in (train.targets[rows], index, view)), strict=True)
        mine, few = shards.own_rows(len(rows), size, self.mixing)
        pixels = train.store.batches(index[mine], view[mine], few, self.device)
        seconds: Iterator[Tensor | None] = itertools.repeat(None)
        if self._strong is not None:
            again = Views.named_strong(index, view)[mine]
            seconds = self._strong.batches(index[mine], again, few, self.device)
        for n, (x, (target, index, view), here) in enumerate(zip(pixels, names, host, strict=True), start):
            if self.mixing:
                x, target = self._mix(x, target, number(self.seed, epoch, MIX, n))
            yield Batch(x, target, index, view, here, strong=next(seconds)).share(self.mixing)

    def again(self, index: Int[Tensor, " B"], view: Int[Tensor, " B"]) -> Float[Tensor, "B 3 H W"]:
        """The pixels that an epoch yielded under these names, to the bit (before mixing)."""
        return next(self.data.train.store.batches(index, view, max(len(index), 1), self.device))

    def _mix(self, pixels: Tensor, target: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        assert self._mixup is not None
        before = np.random.get_state()  # timm draws from numpy's global generator: seeded here, restored after
        np.random.seed(seed % 2**32)
        try:
            return self._mixup(pixels, target)
        finally:
            np.random.set_state(before)
