"""When memory runs out in a step: what is undone before smaller parts are tried, and the error when nothing helps."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kdcli.errors import OutOfMemory
from kdcli.system import device as devices

FEWEST = 2  # images in a micro-batch, at least: batch norm needs two values a channel
Norm = nn.modules.batchnorm._NormBase


class Snapshot:
    """The running statistics of all batch norms of some modules, which a failed step has changed.

    Taken only until a step of its size has fit, so that other steps need not copy them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        layers = (layer for module in modules for layer in module.modules() if isinstance(layer, Norm))
        self.values: list[Tensor] = [buffer for layer in layers for buffer in layer.buffers()]
        self.before = [value.clone() for value in self.values]

    def restore(self) -> None:
        for value, old in zip(self.values, self.before, strict=True):
            value.copy_(old)


def out_of_memory(who: str, what: str, device: torch.device, hint: str) -> OutOfMemory:
    """The error that says what did not fit, and on which device."""
    total = ""
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        total = f" of {devices.describe(device)} ({gib:.0f} GiB)"
    return OutOfMemory(f"{who}: out of memory{total} {what}", hint=hint)
