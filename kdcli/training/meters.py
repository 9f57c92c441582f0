"""Running sums of an epoch."""

from typing import Any

import torch
from torch import Tensor


class Tally:
    """Sums over the batches of an epoch, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.images = self.batches = 0

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double() if value.device.type != "mps" else value.detach()
            if name in self.sums:
                self.sums[name] += value  # in place: a recorded step adds where it added before
            else:
                self.sums[name] = value.clone()

    def clear(self) -> None:
        """Begin an epoch."""
        for value in self.sums.values():
            value.zero_()
        self.images = self.batches = 0

    def means(self) -> dict[str, Any]:
        """Per-batch means as plain numbers and lists; reads from the device."""
        return {name: (value / max(self.batches, 1)).tolist() for name, value in self.sums.items()}

    def state(self) -> dict[str, Any]:
        return {
            "sums": {name: value.clone() for name, value in self.sums.items()},
            "images": self.images,
            "batches": self.batches,
        }

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {name: value.to(device, copy=True) for name, value in state["sums"].items()}
        self.images, self.batches = state["images"], state["batches"]
