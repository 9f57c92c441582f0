"""From a file's bytes to pixels: the one way there is, whoever reads (this process, a thread, another process).

JPEGs are decoded by torchvision's operator, which leaves other threads alone while it works and gives Pillow's bits;
all other formats, and JPEGs that it refuses, by Pillow. An image's plain reading is RGB, resized and centre-cropped to
a square (`fit`). Every preset starts from it but `imagenet`, which crops the image itself; so a small set is decoded
once and lives in memory, with the same pixels as when streamed.
"""

import contextlib
import io
from typing import Any, Protocol, Self

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from kdcli.data.views import Views, numbers, resized, resized_crop
from kdcli.errors import DataError

EVAL_RATIO = 256 / 224  # the imagenet preset's test images: short side resized to 256, centre 224 kept
JPEG = b"\xff\xd8\xff"
RGB = 3  # torchvision.io.ImageReadMode.RGB
# torchvision.io's own function warns that it will move to TorchCodec (no faster here, the same bits, one package more);
# on the day that its operator has gone, Pillow decodes everything
JPEG_OPERATOR: Any = getattr(getattr(torch.ops.image, "decode_jpeg", None), "default", None)


class Part(Protocol):
    """The images of one part of a data set, wherever their bytes lie."""

    classes: list[str]
    labels: np.ndarray  # [N] int64

    def __len__(self) -> int: ...

    def read(self, row: int) -> UInt8[np.ndarray, " n"]:
        """An image file's bytes. Raises OSError."""
        ...

    def where(self, row: int) -> str:
        """The image, for people."""
        ...

    def keep(self, rows: np.ndarray) -> Self:
        """These rows alone."""
        ...


def decode(data: UInt8[np.ndarray, " n"]) -> UInt8[Tensor, "3 H W"]:
    """An image file's bytes as RGB. Raises Pillow's errors for what is no image, or not whole."""
    if JPEG_OPERATOR is not None and data[:3].tobytes() == JPEG:
        with contextlib.suppress(RuntimeError):  # a kind it does not know, or a broken one: Pillow says which
            return JPEG_OPERATOR(torch.from_numpy(data), RGB, False)
    with Image.open(io.BytesIO(data.data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def why_broken(part: Part, row: int) -> str | None:
    """What keeps an image from being decoded to its end; None when nothing does."""
    try:
        with Image.open(io.BytesIO(part.read(row).data)) as image:
            image.draft(image.mode, (1, 1))  # a JPEG at an eighth of its size: read to its end, at less cost
            image.load()
    except Exception as error:
        return reason(error)
    return None


def reason(error: Exception) -> str:
    """Why an image cannot be read, in words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "not an image" if "cannot identify" in str(error) else f"{type(error).__name__}: {error}"


def corrupt(found: list[str]) -> DataError:
    """The refusal that names up to five images that do not decode and counts the rest."""
    more = f"\n  and {len(found) - 5} more" if len(found) > 5 else ""
    lines = "".join(f"\n  {text}" for text in found[:5])
    count = f"{len(found)} image file{'s do' if len(found) > 1 else ' does'} not decode"
    return DataError(
        f"{count}:{lines}{more}",
        hint="Replace or remove them, or leave them out: --skip-corrupt (data.skip_corrupt = true).",
    )


def fit(image: UInt8[Tensor, "3 H W"], size: int, ratio: float) -> UInt8[Tensor, "3 size size"]:
    """Short side resized to size * ratio, the centre square of `size` kept."""
    short = round(size * ratio)
    height, width = image.shape[-2:]
    high, wide = (short, short * width // height) if height <= width else (short * height // width, short)
    top, left = round((high - size) / 2), round((wide - size) / 2)
    return resized(image, high, wide)[:, top : top + size, left : left + size]


Answer = tuple[np.ndarray, list[str]]  # uint8 pixels [B,3,S,S], and the images that did not decode


class Decoder:
    """Draws views of the images of all parts, in whatever thread or process it is called."""

    def __init__(self, parts: tuple[Part, ...], views: Views) -> None:
        self.parts, self.views = parts, views

    def __call__(self, part: int, rows: list[int], views: list[int]) -> Answer:
        """The images named, resized crops drawn, other views left to `Views.apply`: theirs start from plain images."""
        files, size = self.parts[part], self.views.size
        out = torch.zeros((len(rows), 3, size, size), dtype=torch.uint8)
        errors = []
        for n, (row, draws) in enumerate(zip(rows, numbers(torch.tensor(views)), strict=True)):
            try:
                out[n] = self.draw(decode(files.read(row)), draws)
            except Exception as error:
                errors.append(f"{files.where(row)} ({reason(error)})")
        return out.numpy(), errors

    def draw(self, image: Tensor, draws: list[float]) -> Tensor:
        """One decoded image [3,H,W] as its view [3,S,S]."""
        if not self.views.preset.resized:
            return fit(image, self.views.size, 1.0)
        return resized_crop(image, draws, self.views.size) if draws else fit(image, self.views.size, EVAL_RATIO)
