"""Tensor names in public checkpoints of the CIFAR networks -> tensor names of the zoo's networks."""

import re
from collections.abc import Mapping

import timm
import torch
from torch import Tensor

from kdcli.models.cifar.base import CifarNet


def translate(arch: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `state_dict` under the tensor names of `arch`.

    Known names are those of the public option-A ResNets (`conv1`, `layer1.0.bn1`, `linear`), of CRD's benchmark and
    the repositories that copied its files (`downsample`, `block1.layer`, `convShortcut`, `blocks.0.0.conv`,
    `classifier`), and of DiSK. Tensors are neither copied nor changed, and their shapes are not checked.

    Args:
        arch: A name registered with timm, such as `cifar_resnet20_a`; for others only the prefix is removed.
        state_dict: Names and tensors; `module.`, the prefix of data-parallel training, is removed.

    Returns:
        The renamed entries if their names are exactly those of `arch`, else the entries with their names unchanged.
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
    """The names without the batch counters, which old checkpoints lack."""
    return {name for name in state_dict if not name.endswith("num_batches_tracked")}
