"""Public checkpoints name the same layers differently; this turns their names into ours."""

import re
from collections.abc import Mapping

import timm
import torch
from torch import Tensor

from kdcli.models.cifar.base import CifarNet


def translate(arch: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `state_dict` under the names that `arch` uses.

    Known are the layouts of the public option-A ResNets (`conv1`, `layer1.0.bn1`, `linear`), of CRD's benchmark and
    of those that kept its files (`downsample`, `block1.layer`, `convShortcut`, `blocks.0.0.conv`, `classifier`), and
    of DiSK's. Tensors are neither copied nor changed; whether they fit is for `load_state_dict` to say.

    Args:
        arch: A name registered with timm, such as `cifar_resnet20_a`; others get nothing but the prefix removed.
        state_dict: Names and tensors; `module.`, which data-parallel training leaves before each name, is removed.

    Returns:
        The renamed entries when they are exactly those of `arch`, otherwise the entries under their own names.
    """
    wrapped = bool(state_dict) and all(name.startswith("module.") for name in state_dict)
    plain = {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in state_dict.items()}
    if not (arch.startswith("cifar_") and timm.is_model(arch)):
        return plain
    with torch.device("meta"):
        net = timm.create_model(arch)
    if not isinstance(net, CifarNet):
        return plain
    renamed = {_rename(name, net.public_names): tensor for name, tensor in plain.items()}
    fits = len(renamed) == len(plain) and _weights(renamed) == _weights(net.state_dict())
    return renamed if fits else plain


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _weights(state_dict: Mapping[str, Tensor]) -> set[str]:
    """The names but for the batch counters, which old checkpoints lack."""
    return {name for name in state_dict if not name.endswith("num_batches_tracked")}
