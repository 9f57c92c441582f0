"""When memory runs out in a step: undo it, so that it can be tried again in smaller parts, or say what does not fit."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.errors import OutOfMemory
from kdcli.system import device as devices

FEWEST = 2  # images in a micro-batch, at least: batch norm needs two values a channel
Norm = nn.modules.batchnorm._NormBase


def ran_out(do: Callable[[], Any]) -> bool:
    """Whether `do` ran out of memory; other errors are raised."""
    try:
        do()
    except RuntimeError as error:
        if not devices.out_of_memory(error):
            raise
        return True  # and the error, which keeps the failed step's tensors, goes
    return False


def statistics(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Running statistics of all batch norms: a failed step has changed them."""
    layers = (layer for module in modules for layer in module.modules() if isinstance(layer, Norm))
    return [buffer for layer in layers for buffer in layer.buffers()]


def restore(values: list[Tensor], before: list[Tensor], device: torch.device) -> None:
    """Put the statistics back and give freed memory back to the device."""
    for value, old in zip(values, before, strict=True):
        value.copy_(old)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def refused(who: str, what: str, device: torch.device, hint: str) -> OutOfMemory:
    """The error that says what did not fit, and on which device."""
    total = ""
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        total = f" of {devices.describe(device)} ({gib:.0f} GiB)"
    return OutOfMemory(f"{who}: out of memory{total} {what}", hint=hint)
