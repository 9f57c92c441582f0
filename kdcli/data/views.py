"""Views: from (seed, epoch, sample) to an augmented reading of that sample, named so that it can be drawn again.

Every random number is an integer hash of what names it, computed with wrapping int64 tensor operations: a CPU, a GPU
and any thread draw the same bits, in any order, without generator state to save. All presets are here: the file is
long.
"""

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.transforms import v2
from torchvision.transforms.autoaugment import AutoAugmentPolicy

from kdcli.errors import RecipeError, did_you_mean
from kdcli.system.sizes import Size, pair, text

MAX = 2**63 - 1  # views are hashes of 63 bits: never negative, so -1 can mean "plain"
PLAIN = -1
GREY = 128  # fill value of DiSK's augmentation
TRIES = 10  # attempts at a crop that fits, before the largest centred one is taken
DRAWS = 4 * TRIES + 1  # random numbers of one resized crop
STRONG = 3  # purpose of a hash of (sample, view): the name of the sample's strong view


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


_STEP, _M1, _M2, _LOT = (
    _signed(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x632BE59BD9B4E019)
)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014): a bijection that scatters similar inputs."""
    x = x + _STEP
    x = (x ^ _shift(x, 30)) * _M1
    x = (x ^ _shift(x, 27)) * _M2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical shift right; int64's own shift is arithmetic."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def hashed(*parts: int | Tensor) -> Tensor:
    """63-bit hashes, in [0, 2^63), of a sequence of integers and int64 tensors broadcast together; order matters."""
    device = next((part.device for part in parts if isinstance(part, Tensor)), None)
    out = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        out = _mix(out + (part if isinstance(part, Tensor) else part & MAX))
    return out & MAX


def number(*parts: int) -> int:
    """One 63-bit hash of integers, to seed a generator."""
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
    """The operations of a named augmentation, in this order."""

    resized: bool = False  # RandomResizedCrop, scale 0.08..1, aspect ratio 3/4..4/3 times the view's
    crop: bool = False  # pad each side by an eighth of the image, crop back
    flip: bool = False  # half of the views mirrored
    auto: bool = False  # AutoAugment's CIFAR-10 policy
    rand: bool = False  # RandAugment, two operations of magnitude 10: what makes a view strong
    cutout: bool = False  # one rectangle of half the height and half the width set to 0
    fill: int = 0  # padding value of the crop, 0..255

    @property
    def on_host(self) -> bool:
        """Whether images are drawn one by one, from numbers on the host: a GPU would wait for these in each batch."""
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
    """One preset at one image size (a number for a square, or (height, width)): names views, and draws them.

    `count` is the number of views of an image where it is small (crop and flip at 32 pixels: 9 x 9 x 2 = 162; the view
    is then that number, (dy * places_x + dx) * 2 + flip), else None (the view is a hash that all random numbers are
    drawn from). With `limit` each image has that many views of its own, hashes that are the same for every seed.
    `slots` is the number of views of an image in both cases, None when they cannot be counted: `view % slots`
    distinguishes an image's views.

    `strong`: the preset's strong views, with RandAugment (arXiv 1909.13719) and no AutoAugment; they are not counted.

    Raises RecipeError for a `limit` that excludes nothing.
    """

    def __init__(
        self, augment: str, size: int | Sequence[int], limit: int | None = None, *, strong: bool = False
    ) -> None:
        self.augment, self.size, self.preset = augment, pair(size), preset(augment)
        if strong:
            self.preset = replace(self.preset, auto=False, rand=True)
        height, width = self.size
        self.pad: Size = (height // 8, width // 8) if self.preset.crop else (0, 0)
        self.places: Size = (2 * self.pad[0] + 1, 2 * self.pad[1] + 1)  # positions of the crop, down and across
        finite = not (self.preset.on_host or self.preset.cutout)
        every = self.places[0] * self.places[1] * (1 + self.preset.flip) if finite else None
        if limit is not None and every is not None and limit >= every:
            raise RecipeError(
                f"data.views = {limit}: {augment} at {text(size)} pixels has only {every} views of an image",
                hint="Leave data.views out, or choose a smaller number.",
            )
        self.count, self.slots = (every, every) if limit is None else (None, limit)
        self._policy = None
        if self.preset.auto:
            self._policy = v2.AutoAugment(AutoAugmentPolicy.CIFAR10, fill=[GREY] * 3)
        elif self.preset.rand:
            self._policy = v2.RandAugment(2, 10)

    def strong(self) -> "Views":
        """The strong views of the same preset: its crop and flip, then RandAugment."""
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
        """Views of plain images [B,3,H,W] (uint8, or float as stored), same type; a view of -1 is the image itself."""
        if self.count == 1:
            return pixels
        if self.preset.resized:
            crops = [resized_crop(*one, self.size) for one in zip(pixels, numbers(view), strict=True)]
            return self.finish(torch.stack(crops), view)
        out = _shifted(pixels, *self._place(view), self.pad, self.preset.fill)
        if self._policy is not None:
            out = self._auto(out, view)
        if self.preset.cutout:
            height, width = self.size
            out = _cut(out, lot(view, 3, height), lot(view, 4, width), view < 0)
        return out

    def finish(self, pixels: Tensor, view: Int[Tensor, " B"]) -> Tensor:
        """Views of a decoder's images: of plain ones, or of crops where the preset crops decoded images itself."""
        if not self.preset.resized:
            return self.apply(pixels, view)
        return pixels if self._policy is None else self._auto(pixels, view)

    def move(
        self, points: Float[Tensor, "B N 2"], view: Int[Tensor, " B"], sizes: Int[Tensor, "B 2"] | None = None
    ) -> Float[Tensor, "B N 2"]:
        """Points of plain images, each an (x, y) in pixels, in the pixels of their views.

        Coordinates are continuous, as in COCO's boxes: (0, 0) is the image's top left corner, (0.5, 0.5) the centre of
        its first pixel, (W, H) the bottom right corner. Where an annotation counts pixels, add 0.5. A point may land
        outside the view; which of two joints is the left one after a flip is up to the caller.

        `sizes`: each decoded image's (height, width), for a preset that crops decoded images itself (imagenet);
        `points` are then in the decoded image's pixels. None: the images are in memory, at the views' size.

        Raises RecipeError for presets that also rotate and shear.
        """
        if self._policy is not None:
            raise RecipeError(
                f"data.augment = {self.augment!r} also rotates and shears images; coordinates cannot follow",
                hint="--set data.augment=crop-flip, or imagenet",
            )
        height, width = self.size
        if self.preset.resized:
            if sizes is None:
                sizes = torch.tensor([self.size]).expand(len(view), 2)
            boxes, flips = [], []
            for draws, (high, wide) in zip(numbers(view), sizes.tolist(), strict=True):
                boxes.append(_crop(draws, high, wide, self.size) if draws else (0, 0, high, wide))
                flips.append(bool(draws) and _mirrored(draws))
            box, flip = torch.tensor(boxes, dtype=points.dtype, device=points.device), torch.tensor(flips)
            origin, scale = box[:, [1, 0]], points.new_tensor([width, height]) / box[:, [3, 2]]
            moved = (points - origin[:, None]) * scale[:, None]
        else:
            dy, dx, flip = self._place(view.to(points.device))
            offset = torch.stack([self.pad[1] - dx, self.pad[0] - dy], -1)
            moved = points + offset[:, None].to(points.dtype)
        x, y = moved.unbind(-1)
        return torch.stack([torch.where(flip.to(points.device)[:, None], width - x, x), y], -1)

    def _place(self, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dy, dx, flip) of each view: computed from its number when views are numbered, else drawn from its hash."""
        down, across = self.places
        flips = 2 if self.preset.flip else 1
        if self.count is None:
            dy, dx, flip = lot(view, 0, down), lot(view, 1, across), lot(view, 2, flips)
        else:
            dy, dx, flip = view // (flips * across), view // flips % across, view % flips
        plain = view < 0
        return dy.masked_fill(plain, self.pad[0]), dx.masked_fill(plain, self.pad[1]), (flip > 0) & ~plain

    def _auto(self, pixels: Tensor, view: Int[Tensor, " B"]) -> Tensor:
        """Each image through the policy, its random numbers drawn from its view."""
        assert self._policy is not None
        out = []
        with _generator() as generator:
            for image, name in zip(pixels, view.tolist(), strict=True):
                if name >= 0:
                    generator.manual_seed(name)
                    image = self._policy(image)
                out.append(image)
        return torch.stack(out)


class Redirected(TorchFunctionMode):
    """Within the block and this thread, `torch.rand` and `torch.randint` draw from `generator`."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.rand or func is torch.randint:
            return func(*args, generator=self.generator, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _generator() -> Iterator[torch.Generator]:
    """The generator that torchvision's policies draw from within the block; they take none as an argument.

    In the main thread the default one, restored afterwards. Other threads must not seed it while the training draws
    from it, so their calls are redirected: the same bits, at a cost of about 0.1 ms per image.
    """
    if threading.current_thread() is threading.main_thread():
        with torch.random.fork_rng(devices=[]):
            yield torch.default_generator
    else:
        with Redirected() as mode:
            yield mode.generator


def _shifted(pixels: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, pad: Size, fill: int) -> Tensor:
    """Every image padded, cropped at its (dy, dx) and mirrored where `flip`: one gather for the batch."""
    b, c, h, w = pixels.shape
    padded, (pad_y, pad_x) = pixels, pad
    if pad_y or pad_x:
        value = fill if pixels.dtype == torch.uint8 else fill / 255
        padded = F.pad(pixels, (pad_x, pad_x, pad_y, pad_y), value=value)
    step_y, step_x = torch.arange(h, device=pixels.device), torch.arange(w, device=pixels.device)
    y = dy[:, None] + step_y
    x = dx[:, None] + torch.where(flip[:, None], w - 1 - step_x, step_x)
    place = (y[:, :, None] * padded.shape[3] + x[:, None, :]).view(b, 1, h * w)
    return padded.flatten(2).gather(2, place.expand(b, c, h * w)).view(b, c, h, w)


def _cut(pixels: Tensor, cy: Tensor, cx: Tensor, plain: Tensor) -> Tensor:
    """Cutout (DeVries and Taylor, arXiv 1708.04552): a black rectangle of half the sides around (cy, cx), clipped."""
    sides = []
    for centre, side in zip((cy, cx), pixels.shape[-2:], strict=True):
        at, length = torch.arange(side, device=pixels.device), side // 2
        low, high = length // 2, length - length // 2
        sides.append((at >= centre[:, None] - low) & (at < centre[:, None] + high) & ~plain[:, None])
    y, x = sides
    return pixels.masked_fill((y[:, :, None] & x[:, None, :])[:, None], 0)


def numbers(view: Int[Tensor, " B"]) -> list[list[float]]:
    """The random numbers of each view's `resized_crop`; an empty list for a view of -1."""
    draws = uniform(view, DRAWS).tolist()
    return [one if name >= 0 else [] for one, name in zip(draws, view.tolist(), strict=True)]


def resized_crop(image: Tensor, draws: list[float], size: Size) -> Tensor:
    """RandomResizedCrop of [3,H,W] to `size` and flip (Inception's: Szegedy et al., CVPR 2015), from DRAWS numbers.

    Without numbers the whole image, resized.
    """
    if not draws:
        return resized(image, *size)
    top, left, height, width = _crop(draws, image.shape[1], image.shape[2], size)
    out = resized(image[:, top : top + height, left : left + width], *size)
    return out.flip(-1) if _mirrored(draws) else out


def _mirrored(draws: list[float]) -> bool:
    return draws[-1] < 0.5


def _crop(draws: list[float], height: int, width: int, size: Size) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop: 8 to 100 % of the area, its aspect ratio 3/4 to 4/3 of the view's.

    Uniform in the area and in the logarithm of the ratio. Relative to the view's ratio, since the crop is stretched to
    the view: a view of any shape distorts as much as torchvision's square one.
    """
    aspect = size[1] / size[0]
    for n in range(0, 4 * TRIES, 4):
        area = height * width * (0.08 + 0.92 * draws[n])
        ratio = aspect * (4 / 3) ** (2 * draws[n + 1] - 1)
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(draws[n + 2] * (height - h + 1)), int(draws[n + 3] * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3 / aspect)), min(width, round(height * 4 / 3 * aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """[3,H,W] resized by an antialiased bilinear filter; the dtype is kept."""
    if image.shape[-2:] == (height, width):
        return image
    if image.dtype == torch.uint8 and image.device.type != "cpu":  # uint8 is interpolated only on the CPU
        return resized(image.float(), height, width).round_().clamp_(0, 255).byte()
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
