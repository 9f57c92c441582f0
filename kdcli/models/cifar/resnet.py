"""Residual networks for images of 32 pixels.

K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. Three kinds: the paper's own CIFAR nets of
6n+2 layers in three stages, with projections (option B, the distillation benchmark's form) or with parameter-free
shortcuts (option A, the paper's form; names ending in `_a`); the ImageNet nets of four stages behind a 3x3 stem
without pooling; and the narrow ten-layer nets of DiSK (A. Kag et al., ICLR 2023, appendix).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.models.cifar.base import CifarNet, Stage, conv_bn, register

Shortcut = Callable[[int, int, int], nn.Module]


def projection(cin: int, cout: int, stride: int) -> nn.Module:
    """Option B: 1x1 convolution and batch norm where the shape changes, nothing elsewhere."""
    if stride == 1 and cin == cout:
        return nn.Identity()
    conv, bn = nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout)
    return nn.Sequential(OrderedDict(conv=conv, bn=bn))


class ZeroPad(nn.Module):
    """Option A: every `stride`-th pixel, and zero channels equally on both sides; no parameters."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (cout - cin) // 2
        self.after = cout - cin - self.before

    def forward(self, x: Tensor) -> Tensor:
        """[B, cin, H, W] -> [B, cout, ceil(H/stride), ceil(W/stride)]."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


def zero_pad(cin: int, cout: int, stride: int) -> nn.Module:
    """Option A where the shape changes, nothing elsewhere."""
    return nn.Identity() if stride == 1 and cin == cout else ZeroPad(cin, cout, stride)


class Basic(nn.Module):
    """Two 3x3 convolutions plus a shortcut (He et al., Fig. 5 left). The input of `act2` is the pre-activation."""

    expansion = 1

    def __init__(self, cin: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut(cin, width, stride)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, cin, H, W] -> [B, width, H/stride, W/stride]."""
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions plus a shortcut (He et al., Fig. 5 right), with the stride in the 3x3 one."""

    expansion = 4

    def __init__(self, cin: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        cout = width * self.expansion
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, cout, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(cout)
        self.shortcut = shortcut(cin, cout, stride)
        self.act3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, cin, H, W] -> [B, 4*width, H/stride, W/stride]."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        return self.act3(self.bn3(self.conv3(y)) + self.shortcut(x))


class CifarResNet(CifarNet):
    """A residual network with a 3x3 stem of stride 1 and no max-pool; every stage after the first halves the map.

    Args:
        blocks: Residual blocks per stage.
        widths: Their widths.
        stem_width: Channels of the stem; None: the first stage's width.
        block: The residual block.
        shortcut: Builds a block's shortcut.
        num_classes, in_chans, global_pool, drop_rate: As in timm.
    """

    public_names = (
        (r"^conv1\.", "stem.conv."),
        (r"^bn1\.", "stem.bn."),
        (r"^layer(\d)\.", r"stage\1."),
        (r"\.(downsample|shortcut)\.0\.", ".shortcut.conv."),
        (r"\.(downsample|shortcut)\.1\.", ".shortcut.bn."),
        (r"^linear\.", "fc."),
    )

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        stem_width: int | None = None,
        block: type[Basic] | type[Bottleneck] = Basic,
        shortcut: Shortcut = projection,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        channels = stem_width or widths[0]
        stem = conv_bn(in_chans, channels)
        stages = []
        for number, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            rows = []
            for index in range(count):
                rows.append(block(channels, width, 2 if number and not index else 1, shortcut))
                channels = width * block.expansion
            stages.append(Stage(nn.Sequential(*rows), channels, 2**number))
        super().__init__(
            stem, stages, nn.Identity(), channels, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate
        )


# The normalisation of the public option-A checkpoints.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _register() -> None:
    # (layers, parameters, millions of multiply-adds) for 100 classes and 32x32 pixels.
    for depth, parameters, multiply_adds in (
        (8, "83,892", "12.5"),
        (14, "181,108", "26.7"),
        (20, "278,324", "40.8"),
        (32, "472,756", "69.1"),
        (44, "667,188", "97.4"),
        (56, "861,620", "125.8"),
        (110, "1,736,564", "253.2"),
    ):
        shape = {"blocks": [(depth - 2) // 6] * 3, "widths": (16, 32, 64)}
        register(
            __name__,
            f"cifar_resnet{depth}",
            CifarResNet,
            f"ResNet-{depth} (He et al. 2016, option B): {parameters} parameters, {multiply_adds} M multiply-adds.",
            stages=3,
            **shape,
        )
        register(
            __name__,
            f"cifar_resnet{depth}_a",
            CifarResNet,
            f"ResNet-{depth} (He et al. 2016, option A): cifar_resnet{depth} without its 2,752 shortcut parameters.",
            stages=3,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            shortcut=zero_pad,
            **shape,
        )
    for depth, parameters, multiply_adds in ((8, "1,233,540", "177.1"), (32, "7,433,860", "1083.0")):
        register(
            __name__,
            f"cifar_resnet{depth}x4",
            CifarResNet,
            f"ResNet-{depth}, four times as wide behind a 32-channel stem (CRD's benchmark, Tian et al. 2020): "
            f"{parameters} parameters, {multiply_adds} M multiply-adds.",
            stages=3,
            blocks=[(depth - 2) // 6] * 3,
            widths=(64, 128, 256),
            stem_width=32,
        )
    for depth, blocks, block, parameters, multiply_adds in (
        (18, (2, 2, 2, 2), Basic, "11,220,132", "555.5"),
        (34, (3, 4, 6, 3), Basic, "21,328,292", "1159.4"),
        (50, (3, 4, 6, 3), Bottleneck, "23,705,252", "1298.0"),
    ):
        register(
            __name__,
            f"cifar_resnet{depth}",
            CifarResNet,
            f"ResNet-{depth} (He et al. 2016) for CIFAR: {parameters} parameters, {multiply_adds} M multiply-adds.",
            stages=4,
            blocks=blocks,
            widths=(64, 128, 256, 512),
            block=block,
        )
    for suffix, widths, parameters, multiply_adds in (
        ("", (64, 128, 256, 512), "4,949,412", "253.5"),
        ("_l", (32, 64, 128, 256), "1,252,100", "63.8"),
        ("_m", (16, 32, 64, 128), "320,436", "16.2"),
        ("_s", (8, 16, 32, 64), "83,852", "4.2"),
        ("_xs", (8, 16, 16, 32), "27,884", "2.9"),
        ("_xxs", (8, 8, 16, 16), "13,020", "2.0"),
    ):
        register(
            __name__,
            f"cifar_resnet10{suffix}",
            CifarResNet,
            f"DiSK's ResNet10{suffix.replace('_', '-')} (Kag et al. 2023): {parameters} parameters, "
            f"{multiply_adds} M multiply-adds.",
            stages=4,
            blocks=(1, 1, 1, 1),
            widths=widths,
        )


_register()
