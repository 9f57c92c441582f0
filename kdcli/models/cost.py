"""What a network costs: parameters, and multiply-adds of one image."""

import contextlib
from typing import TYPE_CHECKING, Any

from kdcli.models.net import ModelName
from kdcli.models.registry import create_on_meta, pretrained_classes
from kdcli.system.sizes import Size, pair, plain

if TYPE_CHECKING:
    from torch import nn


def facts(name: ModelName, num_classes: int | None = None, image_size: int | Size | None = None) -> dict[str, Any]:
    """params, macs (multiply-adds of one image), input_size, num_classes, pretrained; nothing is downloaded.

    macs is None where the network cannot take images of that size.
    image_size: count at this size, one number or (height, width) in pixels; an architecture with a fixed input size is
    counted at that size, as `input_size` says.
    """
    net = create_on_meta(name, num_classes)
    size = net.input_size if image_size is None or net.fixed_size else pair(image_size)
    macs: int | None = None
    with contextlib.suppress(RuntimeError, NotImplementedError):  # the images are too small for the architecture
        _, macs = count(net.module, size)
    return {
        "params": sum(p.numel() for p in net.module.parameters()),
        "macs": macs,
        "input_size": plain(size),
        "num_classes": net.num_classes,
        "pretrained": pretrained_classes(name) is not None,
    }


def count(module: "nn.Module", input_size: Size) -> tuple[int, int]:
    """All parameters, and the multiply-adds of one image [1,3,H,W] in eval mode.

    Convolutions, matrix products and attention as torch.utils.flop_counter counts them, two operations to a
    multiply-add. `module` is not touched: a copy on the meta device, without memory, is counted.
    """
    import copy

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    params = sum(p.numel() for p in module.parameters())
    memo: dict[int, Any] = {}
    for p in module.parameters():
        memo[id(p)] = torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")

    def flops(net: "nn.Module", device: Any) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net.eval()(torch.zeros(1, 3, *input_size, device=device))
        return counter.get_total_flops() // 2

    try:
        return params, flops(copy.deepcopy(module, memo), "meta")
    except (RuntimeError, NotImplementedError):  # a forward pass that reads values, which meta tensors lack
        return params, flops(copy.deepcopy(module).cpu().float(), "cpu")
