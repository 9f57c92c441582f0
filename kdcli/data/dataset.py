"""An opened data set: splits of named samples, and batches of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from kdcli.data.batch import Batch, Device, moved
from kdcli.data.views import PLAIN, Views
from kdcli.errors import RecipeError
from kdcli.system.cuda_graph import Captured
from kdcli.system.sizes import Size

STD_FLOOR = 1e-2  # a constant channel must not be divided by zero


class Store(Protocol):
    """Where the pixels of a full set are stored."""

    views: Views

    def batches(self, index: Tensor, view: Tensor, size: int, device: Device) -> Iterator[Tensor]:
        """The named views, `size` at a time, as float pixels [<=size,3,H,W] on `device`."""
        ...

    def strong(self) -> "Store":
        """The same images, for names of strong views (`Views.named_strong`)."""
        ...


class Pixels:
    """A small set held as one tensor [N,3,H,W] on a device: uint8, or float, which is returned as stored."""

    def __init__(self, pixels: Tensor, views: Views) -> None:
        self.pixels, self.views = pixels, views
        self.draw: Callable[[Tensor, Tensor], Tensor] = self._draw

    def record(self) -> None:
        """From now on draw by a CUDA graph, where pixels are on CUDA and views are drawn there."""
        if self.pixels.device.type == "cuda" and not self.views.preset.on_host:
            recorded = Captured(self._draw)
            self.draw = lambda rows, names: recorded(rows, names).clone()  # the next batch overwrites it

    def batches(self, index: Tensor, view: Tensor, size: int, device: Device) -> Iterator[Tensor]:
        here = self.pixels.device
        index, view = index.to(here), view.to(here)  # once an epoch: no transfer in a step
        for rows, names in zip(index.split(size), view.split(size), strict=True):
            yield as_float(moved(self.draw(rows, names), device))

    def strong(self) -> "Pixels":
        """As in `Store`, drawn on the host. Raises RecipeError for images that are not 8-bit."""
        if self.pixels.dtype != torch.uint8:
            raise RecipeError(
                "strong views are drawn by RandAugment, which needs 8-bit images; these are floating-point",
                hint="Choose a method that needs no second view (kd, dkd), or store the images as uint8.",
            )
        return Pixels(self.pixels.cpu(), self.views.strong())

    def _draw(self, rows: Tensor, names: Tensor) -> Tensor:
        return self.views.apply(self.pixels.index_select(0, rows), names)


def as_float(pixels: Tensor) -> Tensor:
    """uint8 as float32 in [0,1], float data unchanged; multiplied, since CPU and GPU divide by 255 differently."""
    return pixels * (1 / 255) if pixels.dtype == torch.uint8 else pixels.float()


class Split:
    """One part of a data set: samples of a store, each with its target and its number in the full set.

    targets: [N, ...], what the task makes of the labels: class numbers [N] int64, or 0/1 [N, K] float32.
    full: number of samples in the full set.
    """

    def __init__(
        self,
        store: Store,
        targets: Shaped[Tensor, "N ..."],
        index: Int[Tensor, " N"] | None = None,
        full: int | None = None,
    ) -> None:
        self.store = store
        self.targets = targets.cpu()
        self.index = torch.arange(len(targets)) if index is None else index
        self.full = len(targets) if full is None else full

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, rows: Int[Tensor, " n"]) -> "Split":
        """These rows of the split; the samples keep their numbers."""
        return Split(self.store, self.targets[rows], self.index[rows], self.full)

    def plain(self, batch_size: int, device: Device = "cpu") -> Iterator[Batch]:
        """In order, unaugmented; the last batch may be short."""
        if not len(self):  # a rank's share of a few images may be empty; torch would split it into one empty batch
            return
        view = torch.full_like(self.index, PLAIN)
        host = zip(self.index.split(batch_size), view.split(batch_size), strict=True)
        names = zip(*(x.to(device).split(batch_size) for x in (self.targets, self.index, view)), strict=True)
        pixels = self.store.batches(self.index, view, batch_size, device)
        for x, (target, index, plain), here in zip(pixels, names, host, strict=True):
            yield Batch(x, target, index, plain, here)

    def take(self, n: int) -> Float[Tensor, "n 3 H W"]:
        """`n` plain images (all, when there are fewer) spread evenly over the split, on the CPU, for export checks."""
        n = min(n, len(self))
        rows = torch.arange(n) * len(self) // max(n, 1)
        return next(self.subset(rows).plain(n)).images


@dataclass
class DataSet:
    """A data set, opened."""

    name: str  # the recipe's, e.g. "cifar100" or "npz:foo.npz"
    classes: list[str]
    wnids: list[str] | None  # WordNet ids, where the class folders have such names
    hash: str  # sha256 of the whole source, before holdout and per_class: trained mentors are found by it
    mean: tuple[float, float, float]  # for a student whose architecture has none
    std: tuple[float, float, float]
    image_size: Size
    augment: str  # the preset in force, never "auto"
    train: Split
    test: Split
    holdout: Split | None = None
    views: int | None = None  # distinct views of an image when they can be counted, or are limited
    notes: list[tuple[str, object, str]] = field(default_factory=list)  # settings chosen: (recipe key, value, why)
    skipped: list[str] = field(default_factory=list)  # corrupt files left out
    pixels: str = ""  # as `hash`, but different for a packed copy: outputs of models are stored under it

    def __post_init__(self) -> None:
        self.pixels = self.pixels or self.hash


def sized(pixels: Tensor, size: Size) -> Tensor:
    """[N,C,h,w] as [N,3,H,W] of `size`: grey repeated, resized by an antialiased bilinear filter; the type stays."""
    n, c = pixels.shape[:2]
    if pixels.shape[2:] != size:
        small = torch.empty((n, c, *size), dtype=pixels.dtype)
        for start in range(0, n, 4096):
            part = F.interpolate(pixels[start : start + 4096].float(), size, mode="bilinear", antialias=True)
            part = part.round_().clamp_(0, 255) if pixels.dtype == torch.uint8 else part
            small[start : start + 4096] = part.to(pixels.dtype)
        pixels = small
    return pixels.expand(-1, 3, -1, -1).contiguous() if c == 1 else pixels.contiguous()


Triple = tuple[float, float, float]


def moments(split: Split, some: int | None = None) -> tuple[Triple, Triple]:
    """Mean and standard deviation (at least 0.01) of each channel over the plain images, or `some` spread evenly."""
    rows = torch.arange(len(split)) if some is None or some >= len(split) else torch.arange(some) * len(split) // some
    total, squares, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for few in rows.split(64):  # a few images at a time: all of them may not fit in memory
        part = next(split.subset(few).plain(64)).images.double()
        total += part.sum((0, 2, 3))
        squares += part.square().sum((0, 2, 3))
        count += part.numel() // 3
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt().clamp_min(STD_FLOOR)
    a, b = [[round(float(x), 4) for x in t] for t in (mean, std)]
    return (a[0], a[1], a[2]), (b[0], b[1], b[2])
