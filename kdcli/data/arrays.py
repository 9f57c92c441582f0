"""Data sets that fit in memory, as a source's module reads them."""

import hashlib
from dataclasses import dataclass

import numpy as np

Moments = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of each channel, of pixels in [0, 1]."""


@dataclass
class Arrays:
    """Images [N,C,H,W] (C 1 or 3, uint8 or float32) and labels ([N] int64, or [N,K] uint8 0/1) by part.

    The parts are train, and val or test or both.
    """

    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    classes: list[str]
    moments: Moments | None = None  # published ones; None: to be measured

    def hash(self) -> str:
        """sha256 of every part's name, shape, pixels and labels, and of the class names."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for part in sorted(self.images):
            images, labels = self.images[part], self.labels[part]
            several = f" {labels.shape}" if labels.ndim > 1 else ""
            digest.update(f"\n{part} {images.shape} {images.dtype.str}{several}".encode())
            digest.update(np.ascontiguousarray(images).data)
            digest.update(np.ascontiguousarray(labels.astype("<i8")).data)
        return digest.hexdigest()
