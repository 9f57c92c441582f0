"""Small networks of every family, for tests of models and methods."""

from typing import Any

import timm
import torch
from torch import nn
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.vision_transformer import VisionTransformer

import kdcli.models.cifar  # noqa: F401  registers the zoo's names
from kdcli.models.member import Member
from kdcli.models.net import ModelName
from kdcli.system.sizes import Size

K, SIZE = 10, 32
SWIN: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (1, 1, 1),
    "num_heads": (2, 2, 4),
}
REGNET = BlockParams([1] * 4, [8, 16, 24, 48], [8] * 4, [1.0] * 4, [2] * 4)
VIT: dict[str, Any] = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}

NETS = {
    "zoo": lambda: timm.create_model("cifar_resnet8", num_classes=K),
    "wide": lambda: timm.create_model("cifar_resnet8", num_classes=K, widths=(16, 24, 40)),
    "wrn": lambda: timm.create_model("cifar_wrn_16_1", num_classes=K),
    "mobile": lambda: timm.create_model("cifar_mobilenetv2", num_classes=K),
    "timm": lambda: timm.create_model("resnet10t", num_classes=K, channels=(8, 16, 24, 40), output_stride=8),
    "conv_head": lambda: timm.create_model("mobilenetv3_small_050", num_classes=K),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=K, **VIT),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=K, **SWIN),
    "torchvision": lambda: RegNet(REGNET, num_classes=K),
    "torchvision_vit": lambda: VisionTransformer(SIZE, 8, 4, 2, 24, 48, num_classes=K),
}


def member(kind: str, seed: int = 0, size: Size = (SIZE, SIZE)) -> Member:
    """A network with random norms and, in transformers, random small weights: at rest, faults would not show."""
    torch.manual_seed(seed)
    net = NETS[kind]()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.normal_(std=0.2)
            layer.running_var.uniform_(0.5, 1.5)
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    name = ModelName("zoo", f"{kind}net", None, kind)
    three = (0.5, 0.5, 0.5)
    return Member(net, name, mean=three, std=three, input_size=size, interpolation="bilinear", num_classes=K)
