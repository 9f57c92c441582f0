"""Image files of a data set before any is decoded, wherever their bytes are stored."""

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from jaxtyping import UInt8


class Part(Protocol):
    """The images of one part of a data set, wherever their bytes are stored."""

    classes: list[str]
    labels: np.ndarray  # [N] int64 class numbers, or [N, K] uint8 0/1

    def __len__(self) -> int: ...

    def read(self, row: int) -> UInt8[np.ndarray, " n"]:
        """An image file's bytes. Raises OSError."""
        ...

    def where(self, row: int) -> str:
        """The image's name for messages."""
        ...

    def keep(self, rows: np.ndarray) -> Self:
        """These rows only."""
        ...


@dataclass
class Listed:
    """The images of a folder or a pack."""

    train: Part
    test: Part
    hash: str  # of the files that were listed or packed
    pixels: str  # of the bytes that are decoded
    skipped: list[str]  # corrupt files left out
