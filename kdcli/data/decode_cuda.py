"""JPEGs decoded and cropped by a CUDA device (data.decode = "cuda"): the processors only read the files.

A GPU's pixels differ a little from a CPU's, so it is asked for, never chosen, and part of the recipe's hash.
"""

import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdcli.data.batch import Device, moved
from kdcli.data.dataset import as_float
from kdcli.data.decode import JPEG, RGB, corrupt, decode, reason
from kdcli.data.views import numbers
from kdcli.data.workers import Files, Readers

OPERATOR: Any = getattr(getattr(torch.ops.image, "decode_jpegs_cuda", None), "default", None)
AHEAD = 2  # batches read before they are needed


def unable(device: Device) -> str:
    """Why JPEGs cannot be decoded there; nothing when they can."""
    if torch.device(device).type != "cuda":
        return "no CUDA device is in use"
    if OPERATOR is None:
        return "this torchvision has no decoder for it"
    one = io.BytesIO()
    Image.new("RGB", (16, 16)).save(one, "JPEG")
    try:
        OPERATOR([torch.frombuffer(bytearray(one.getvalue()), dtype=torch.uint8)], RGB, torch.device(device))
    except RuntimeError as error:
        return (str(error).splitlines() or ["it fails"])[0]
    return ""


class GpuFiles(Files):
    """A store: one part's images, read by threads and decoded by the device; asked for on another, as `Files` does."""

    def __init__(self, readers: Readers, part: int, device: Device) -> None:
        super().__init__(readers, part)
        self.device = torch.device(device)
        self._threads = ThreadPoolExecutor(max(readers.workers, 1), "read")

    def batches(self, index: Tensor, view: Tensor, size: int, device: Device) -> Iterator[Tensor]:
        """As `Readers.batches`."""
        if torch.device(device).type != self.device.type:
            yield from super().batches(index, view, size, device)
            return
        read, waiting = self.readers.decoder.parts[self.part].read, deque[tuple[Tensor, Tensor, list[Future]]]()
        for rows, views in zip(index.cpu().split(size), view.cpu().split(size), strict=True):
            waiting.append((rows, views, [self._threads.submit(read, row) for row in rows.tolist()]))
            if len(waiting) > AHEAD:
                yield self._drawn(*waiting.popleft())
        while waiting:
            yield self._drawn(*waiting.popleft())

    def _drawn(self, rows: Tensor, view: Tensor, asked: list[Future]) -> Tensor:
        where, wrong, images = self.readers.decoder.parts[self.part].where, [], []
        found = [_result(future) for future in asked]
        quick = iter(_decoded([one for one in found if _jpeg(one)], self.device))
        for row, one in zip(rows.tolist(), found, strict=True):
            image = next(quick) if _jpeg(one) else None
            try:
                if isinstance(one, Exception):
                    raise one
                images.append(decode(one).to(self.device) if image is None else image)
            except Exception as error:
                wrong.append(f"{where(row)} ({reason(error)})")
        if wrong:
            raise corrupt(wrong)
        draw = self.readers.decoder.draw
        pixels = torch.stack([draw(image, draws) for image, draws in zip(images, numbers(view), strict=True)])
        return as_float(pixels if self.views.preset.resized else self.views.apply(pixels, moved(view, self.device)))


def _result(future: Future) -> np.ndarray | Exception:
    try:
        return future.result()
    except OSError as error:
        return error


def _jpeg(one: np.ndarray | Exception) -> bool:
    return not isinstance(one, Exception) and one[:3].tobytes() == JPEG


def _decoded(data: list[Any], device: torch.device) -> list[Tensor | None]:
    """Each JPEG on the device, None where it refuses: what becomes of an image must not depend on its neighbours."""
    tensors = [torch.from_numpy(one) for one in data]
    try:
        return list(OPERATOR(tensors, RGB, device)) if tensors else []
    except RuntimeError:
        return [None] if len(tensors) == 1 else [image for one in data for image in _decoded([one], device)]
