"""Sums over an epoch."""

from typing import Any

import torch
from torch import Tensor


class EpochMeter:
    """Sums over the batches of an epoch, kept on the device so that no step waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.batches = 0

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double() if value.device.type != "mps" else value.detach()
            if name in self.sums:
                self.sums[name] += value  # in place: a captured step adds where it added before
            else:
                self.sums[name] = value.clone()

    def clear(self) -> None:
        """Begin an epoch."""
        for value in self.sums.values():
            value.zero_()
        self.batches = 0

    def totals(self, prefix: str) -> dict[str, Any]:
        """The sums whose name begins with `prefix`, without it, as numbers and lists; reads from the device."""
        return {name.removeprefix(prefix): x.tolist() for name, x in self.sums.items() if name.startswith(prefix)}

    def means(self, prefix: str) -> dict[str, Any]:
        """As `totals`, divided by the number of batches."""
        found = {name: x for name, x in self.sums.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): (x / max(self.batches, 1)).tolist() for name, x in found.items()}

    def state(self) -> dict[str, Any]:
        return {"sums": {name: value.clone() for name, value in self.sums.items()}, "batches": self.batches}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {name: value.to(device, copy=True) for name, value in state["sums"].items()}
        self.batches = state["batches"]
