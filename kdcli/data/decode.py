"""From a file's bytes to pixels: one implementation for every caller.

JPEGs are decoded by torchvision's operator, which releases Python's global lock and gives Pillow's bits; all other
formats, and JPEGs that it refuses, by Pillow. An image's plain reading is RGB, resized and centre-cropped to the view's
size (`fit`). Every preset starts from it except `imagenet`, which crops the image itself; so a small set is decoded
once and kept in memory, with the same pixels as when streamed.
"""

import contextlib
import io
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from kdcli.data.parts import Part
from kdcli.data.views import Views, numbers, resized, resized_crop
from kdcli.errors import DataError
from kdcli.system.sizes import Size

EVAL_RATIO = 256 / 224  # the imagenet preset's test images: short side resized to 256, centre 224 kept
JPEG = b"\xff\xd8\xff"
RGB = 3  # torchvision.io.ImageReadMode.RGB
# torchvision.io's function warns that it will move to TorchCodec (no faster here, the same bits, one package more);
# where the operator has been removed, Pillow decodes everything
JPEG_OPERATOR: Any = getattr(getattr(torch.ops.image, "decode_jpeg", None), "default", None)


def decode(data: UInt8[np.ndarray, " n"]) -> UInt8[Tensor, "3 H W"]:
    """An image file's bytes as RGB. Raises Pillow's errors for bytes that are not an image, or a truncated one."""
    if JPEG_OPERATOR is not None and data[:3].tobytes() == JPEG:
        with contextlib.suppress(RuntimeError):  # an unknown kind or a broken file: Pillow's error says which
            return JPEG_OPERATOR(torch.from_numpy(data), RGB, False)
    with Image.open(io.BytesIO(data.data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def why_broken(part: Part, row: int) -> str | None:
    """Why an image cannot be decoded to its end; None where it can."""
    try:
        with Image.open(io.BytesIO(part.read(row).data)) as image:
            image.draft(image.mode, (1, 1))  # a JPEG at an eighth of its size: read to its end, at lower cost
            image.load()
    except Exception as error:
        return reason(error)
    return None


def reason(error: Exception) -> str:
    """Why an image cannot be read, as text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "not an image" if "cannot identify" in str(error) else f"{type(error).__name__}: {error}"


def corrupt(found: list[str]) -> DataError:
    """The error that names up to five images that do not decode and counts the rest."""
    more = f"\n  and {len(found) - 5} more" if len(found) > 5 else ""
    lines = "".join(f"\n  {text}" for text in found[:5])
    count = f"{len(found)} image file{'s do' if len(found) > 1 else ' does'} not decode"
    return DataError(
        f"{count}:{lines}{more}",
        hint="Replace or remove them, or leave them out: --skip-corrupt (data.skip_corrupt = true).",
    )


def fit(image: UInt8[Tensor, "3 H W"], size: Size, ratio: float) -> UInt8[Tensor, "3 h w"]:
    """The image resized to just cover size * ratio, its centre of `size` (height, width) kept."""
    rows, columns = (round(side * ratio) for side in size)
    height, width = image.shape[-2:]
    # the side that is relatively shorter decides; the other one, rounded down, is still long enough
    if height * columns <= width * rows:
        high, wide = rows, rows * width // height
    else:
        high, wide = columns * height // width, columns
    top, left = round((high - size[0]) / 2), round((wide - size[1]) / 2)
    return resized(image, high, wide)[:, top : top + size[0], left : left + size[1]]


class Decoder:
    """Draws views of the images of all parts, in the thread that calls it."""

    def __init__(self, parts: tuple[Part, ...], views: Views) -> None:
        self.parts, self.views = parts, views

    def __call__(self, part: int, rows: list[int], view: Tensor) -> tuple[UInt8[Tensor, "B 3 H W"], list[str]]:
        """The images' views, and the names of images that did not decode.

        Views that a device draws just as well (`Preset.on_host` false) are left to it: these images are plain.
        """
        files = self.parts[part]
        out = torch.zeros((len(rows), 3, *self.views.size), dtype=torch.uint8)
        errors = []
        for n, (row, draws) in enumerate(zip(rows, numbers(view), strict=True)):
            try:
                out[n] = self._draw(decode(files.read(row)), draws)
            except Exception as error:
                errors.append(f"{files.where(row)} ({reason(error)})")
        return self.views.finish(out, view) if self.views.preset.on_host else out, errors

    def _draw(self, image: Tensor, draws: list[float]) -> Tensor:
        """One decoded image [3,H,W] as a crop or as the plain image, [3,h,w] of the views' size."""
        if not self.views.preset.resized:
            return fit(image, self.views.size, 1.0)
        return resized_crop(image, draws, self.views.size) if draws else fit(image, self.views.size, EVAL_RATIO)
