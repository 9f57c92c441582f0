"""Views: from (seed, epoch, sample) to an augmented reading of that sample, named so that it can be drawn again.

Every random number is an integer hash of what names it, computed with wrapping int64 tensor operations: a CPU, a GPU
and a worker process draw the same bits, in any order, without a generator to save.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.autoaugment import AutoAugmentPolicy

from kdcli.errors import RecipeError, did_you_mean

MAX = 2**63 - 1  # views are hashes of 63 bits: never negative, so -1 can mean "plain"
PLAIN = -1
GREY = 128  # what DiSK fills with
TRIES = 10  # at a crop that fits, before the largest centred one is taken
DRAWS = 4 * TRIES + 1  # numbers that a resized crop is made of
STRONG = 3  # what a hash of (sample, view) is for: the name of the strong view beside it


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


_STEP, _M1, _M2, _LOT = (
    _signed(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x632BE59BD9B4E019)
)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014): equal inputs stay equal, near ones part."""
    x = x + _STEP
    x = (x ^ _shift(x, 30)) * _M1
    x = (x ^ _shift(x, 27)) * _M2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical shift right: int64's own drags the sign along."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def hashed(*parts: int | Tensor) -> Tensor:
    """63-bit hashes, in [0, 2^63), of a sequence of integers and int64 tensors broadcast together; the order counts."""
    device = next((part.device for part in parts if isinstance(part, Tensor)), None)
    out = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        out = _mix(out + (part if isinstance(part, Tensor) else part & MAX))
    return out & MAX


def number(*parts: int) -> int:
    """One 63-bit hash of integers, to seed a generator with."""
    return int(hashed(*parts))


def lot(view: Int[Tensor, " B"], which: int, below: int) -> Int[Tensor, " B"]:
    """The `which`-th number drawn from each view, uniform in [0, below)."""
    return (_mix(view + _signed((which + 1) * _LOT % 2**64)) & MAX) % below


def uniform(view: Int[Tensor, " B"], n: int) -> Float[Tensor, "B n"]:
    """The first `n` numbers drawn from each view, uniform in [0, 1), float64."""
    which = torch.arange(1, n + 1, device=view.device) * _LOT
    return ((_mix(view[:, None] + which) & MAX) >> 10) * 2.0**-53


@dataclass(frozen=True)
class Preset:
    """What a named augmentation does, in this order."""

    resized: bool = False  # RandomResizedCrop, scale 0.08..1, ratio 3/4..4/3
    crop: bool = False  # pad by size/8, crop back
    flip: bool = False  # half of the views mirrored
    auto: bool = False  # AutoAugment's CIFAR-10 policy
    rand: bool = False  # RandAugment, two operations of magnitude 10: what makes a view strong
    cutout: bool = False  # one square of half the size set to 0
    fill: int = 0  # what the crop pads with, 0..255

    @property
    def on_host(self) -> bool:
        """Draws image by image, by numbers that the host reads: on a GPU it would wait for them at every batch."""
        return self.resized or self.auto or self.rand


PRESETS: dict[str, Preset] = {
    "none": Preset(),
    "flip": Preset(flip=True),
    "crop": Preset(crop=True),
    "crop-flip": Preset(crop=True, flip=True),
    "cutout": Preset(crop=True, flip=True, cutout=True),
    "disk": Preset(crop=True, flip=True, auto=True, cutout=True, fill=GREY),
    "imagenet": Preset(resized=True, flip=True),
}
AUGMENTS = tuple(PRESETS)


def preset(name: str) -> Preset:
    """The preset of that name. Raises RecipeError naming the nearest."""
    if name not in PRESETS:
        raise RecipeError(f"data.augment = {name!r}: no such preset", hint=did_you_mean(name, ("auto", *AUGMENTS)))
    return PRESETS[name]


class Views:
    """One preset at one image size: names views, and draws them.

    `count` is how many views an image has when they are few (crop and flip at 32 pixels: 9 x 9 x 2 = 162; the view is
    then that number, (dy * 9 + dx) * 2 + flip), else None (the view is a hash everything else is drawn from). With
    `limit` each image keeps to that many hashes of its own, the same ones for every seed. `slots` is how many views an
    image has either way, None when they cannot be counted: `view % slots` tells an image's views apart.

    `strong`: the preset's strong views, with RandAugment (arXiv 1909.13719) and no AutoAugment; they are not counted.

    Raises RecipeError for a `limit` that leaves out nothing.
    """

    def __init__(self, augment: str, size: int, limit: int | None = None, *, strong: bool = False) -> None:
        self.augment, self.size, self.preset = augment, size, preset(augment)
        if strong:
            self.preset = replace(self.preset, auto=False, rand=True)
        self.pad = size // 8 if self.preset.crop else 0
        self.places = 2 * self.pad + 1
        finite = not (self.preset.on_host or self.preset.cutout)
        every = self.places**2 * (1 + self.preset.flip) if finite else None
        if limit is not None and every is not None and limit >= every:
            raise RecipeError(
                f"data.views = {limit}: {augment} at {size} pixels gives an image no more than {every}",
                hint="Leave data.views out, or choose a smaller number.",
            )
        self.count, self.slots = (every, every) if limit is None else (None, limit)
        self._policy = None
        if self.preset.auto:
            self._policy = v2.AutoAugment(AutoAugmentPolicy.CIFAR10, fill=[GREY] * 3)
        elif self.preset.rand:
            self._policy = v2.RandAugment(2, 10)

    def strong(self) -> "Views":
        """The strong views of the same preset: cropped and flipped alike, then RandAugment."""
        return Views(self.augment, self.size, strong=True)

    def draw(self, seed: int, epoch: int, index: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
        """Each sample's view in this epoch, from (seed, epoch, sample index) alone."""
        drawn = hashed(seed, epoch, index)
        return drawn if self.slots is None else self.named(index, drawn % self.slots)

    def named(self, index: Int[Tensor, " N"], slot: Int[Tensor, "..."]) -> Int[Tensor, " N"]:
        """Each sample's view in `slot`, one number for all or one each, in [0, slots): view % slots is the slot."""
        if self.count is not None or self.slots is None:
            return slot.expand_as(index)
        return hashed(index, slot) % (MAX // self.slots) * self.slots + slot

    @staticmethod
    def named_strong(index: Int[Tensor, " N"], view: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
        """The strong view that belongs to each sample's view: a name for `strong()` to draw."""
        return hashed(index, view, STRONG)

    def apply(self, pixels: Tensor, view: Int[Tensor, " B"]) -> Tensor:
        """Views of plain images [B,3,S,S] (uint8, or float as stored), same type; a view of -1 is the image itself."""
        if self.count == 1:
            return pixels
        if self.preset.resized:
            crops = [resized_crop(*one, self.size) for one in zip(pixels, numbers(view), strict=True)]
            return self.finish(torch.stack(crops), view)
        plain = view < 0
        dy, dx, flip = (
            x.masked_fill(plain, at) for x, at in zip(self._place(view), (self.pad, self.pad, 0), strict=True)
        )
        out = _shifted(pixels, dy, dx, flip > 0, self.pad, self.preset.fill)
        if self._policy is not None:
            out = self._auto(out, view)
        if self.preset.cutout:
            out = _cut(out, lot(view, 3, self.size), lot(view, 4, self.size), plain, self.size // 2)
        return out

    def finish(self, pixels: Tensor, view: Int[Tensor, " B"]) -> Tensor:
        """Views of what a decoder hands over: plain images, or, where the preset crops those itself, its crops."""
        if not self.preset.resized:
            return self.apply(pixels, view)
        return pixels if self._policy is None else self._auto(pixels, view)

    def _place(self, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dy, dx, flip) of each view: its digits when views are numbered, else drawn from its hash."""
        n, flips = self.places, 2 if self.preset.flip else 1
        if self.count is None:
            return lot(view, 0, n), lot(view, 1, n), lot(view, 2, flips)
        return view // (flips * n), view // flips % n, view % flips

    def _auto(self, pixels: Tensor, view: Tensor) -> Tensor:
        assert self._policy is not None
        out = []
        with torch.random.fork_rng(devices=[]):
            for image, name in zip(pixels, view.tolist(), strict=True):
                if name >= 0:
                    torch.default_generator.manual_seed(name)
                    image = self._policy(image)
                out.append(image)
        return torch.stack(out)


def _shifted(pixels: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, pad: int, fill: int) -> Tensor:
    """Every image padded, cropped back at its own (dy, dx) and mirrored where told: one gather for the batch."""
    b, c, h, w = pixels.shape
    padded = F.pad(pixels, (pad,) * 4, value=fill if pixels.dtype == torch.uint8 else fill / 255) if pad else pixels
    step_y, step_x = torch.arange(h, device=pixels.device), torch.arange(w, device=pixels.device)
    y = dy[:, None] + step_y
    x = dx[:, None] + torch.where(flip[:, None], w - 1 - step_x, step_x)
    place = (y[:, :, None] * padded.shape[3] + x[:, None, :]).view(b, 1, h * w)
    return padded.flatten(2).gather(2, place.expand(b, c, h * w)).view(b, c, h, w)


def _cut(pixels: Tensor, cy: Tensor, cx: Tensor, plain: Tensor, length: int) -> Tensor:
    """Cutout (DeVries and Taylor, arXiv 1708.04552): a black square of `length` around (cy, cx), clipped."""
    at = torch.arange(pixels.shape[-1], device=pixels.device)
    low, high = length // 2, length - length // 2
    y = (at >= cy[:, None] - low) & (at < cy[:, None] + high) & ~plain[:, None]
    x = (at >= cx[:, None] - low) & (at < cx[:, None] + high)
    return pixels.masked_fill((y[:, :, None] & x[:, None, :])[:, None], 0)


def numbers(view: Int[Tensor, " B"]) -> list[list[float]]:
    """What `resized_crop` makes each view's crop of; nothing for a view of -1."""
    draws = uniform(view, DRAWS).tolist()
    return [one if name >= 0 else [] for one, name in zip(draws, view.tolist(), strict=True)]


def resized_crop(image: Tensor, draws: list[float], size: int) -> Tensor:
    """RandomResizedCrop of [3,H,W] to `size` and flip (Inception's: Szegedy et al., CVPR 2015), made of DRAWS numbers.

    Without numbers the whole image, resized.
    """
    if not draws:
        return resized(image, size, size)
    top, left, height, width = _crop(draws, *image.shape[-2:])
    out = resized(image[:, top : top + height, left : left + width], size, size)
    return out.flip(-1) if draws[-1] < 0.5 else out


def _crop(draws: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width): 8 to 100 % of the area, sides as 3:4 to 4:3, evenly on a logarithmic scale."""
    for n in range(0, 4 * TRIES, 4):
        area = height * width * (0.08 + 0.92 * draws[n])
        ratio = (4 / 3) ** (2 * draws[n + 1] - 1)
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(draws[n + 2] * (height - h + 1)), int(draws[n + 3] * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """[3,H,W] resized by an antialiased bilinear filter; the type stays."""
    if image.shape[-2:] == (height, width):
        return image
    if image.dtype == torch.uint8 and image.device.type != "cpu":  # only a CPU interpolates bytes
        return resized(image.float(), height, width).round_().clamp_(0, 255).byte()
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
