"""What all formats of exported files have in common: how one is written, what is known of it, how it is run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the command line reads the formats' names, and --help must not import torch
    import numpy as np
    from jaxtyping import Bool, Float
    from torch import Tensor

Same = Callable[["Tensor", "Tensor", float], "Bool[Tensor, ' B']"]
"""same(a, b, tie): the images on which two models agree; outputs of `a` within `tie` of each other count as equal."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked."""

    path: Path
    size: int  # bytes
    opset: int
    dynamic: bool  # takes any batch size
    max_difference: float  # largest |file - torch| over the largest |torch output|
    agreement: float  # percent of the real images with the same answer, ties counted as the same
    checked_on: int  # images, real and random


class Runtime(Protocol):
    """An exported file as a model."""

    path: Path
    size: int
    """Bytes of the file."""
    provider: str
    """What runs it: onnxruntime's execution provider."""
    input_size: tuple[int, int]
    """(height, width) in pixels."""
    batch: int | None
    """The batch size that the file is fixed to; None for any."""
    num_classes: int
    metadata: dict[str, str]
    """What the exporter wrote about the file: `task`, `classes` (JSON), `image_size`, `run`, ..."""

    def run(self, images: "np.ndarray") -> "np.ndarray":
        """The runtime alone, nothing checked: float32 [B, 3, H, W], B the file's batch where it has one -> [B, K]."""
        ...

    def __call__(self, images: "Float[Tensor, 'B 3 H W']") -> "Float[Tensor, 'B K']":
        """Outputs, float32, on the images' device, for any B. Raises DataError for images of another size."""
        ...


@dataclass(frozen=True)
class Format:
    """One kind of exported file. Its functions import their libraries when they are called."""

    name: str
    """The word of `kdcli export --format`."""
    write: Callable[..., Exported]
    """Writes a network to a path and checks the file; arguments as `onnx.export_onnx`."""
    open: Callable[..., Runtime]
    """open(path, threads=None) reads a file; raises WeightsError for one that is missing or broken."""
