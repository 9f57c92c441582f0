"""ShuffleNets for CIFAR, in the form of CRD's benchmark: a 1x1 stem of stride 1 and no max-pool, three stages.

X. Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", CVPR 2018
(three groups; here with a ReLU after the depthwise convolution, unlike the paper), and N. Ma et al.,
"ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018 (size 1x).
"""

import torch
from torch import Tensor, nn

from kdcli.models.cifar.base import CifarNet, Stage, conv_bn, register

STEM = 24


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleaves the channels of `groups` groups: [B, C, H, W] -> [B, C, H, W] (Zhang et al., section 3.1)."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class GroupedUnit(nn.Module):
    """1x1 grouped, shuffle, 3x3 depthwise, 1x1 grouped, plus the input; at stride 2 concatenated with the pooled input
    (Zhang et al., Fig. 2b, 2c). `cout` counts all output channels."""

    def __init__(self, cin: int, cout: int, stride: int, groups: int) -> None:
        super().__init__()
        fresh = cout - cin if stride == 2 else cout
        inner = fresh // 4
        # The stem has too few channels to be worth grouping.
        self.groups = 1 if cin == STEM else groups
        self.reduce = conv_bn(cin, inner, 1, groups=self.groups)
        self.depthwise = conv_bn(inner, inner, 3, stride, groups=inner)
        self.expand = conv_bn(inner, fresh, 1, groups=groups, act=False)
        self.shortcut = nn.AvgPool2d(3, 2, 1) if stride == 2 else nn.Identity()
        self.act = nn.ReLU()
        self.joins = stride == 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, cin, H, W] -> [B, cout, H/stride, W/stride]."""
        y = self.expand(self.depthwise(shuffle(self.reduce(x), self.groups)))
        rest = self.shortcut(x)
        return self.act(torch.cat([y, rest], 1) if self.joins else y + rest)


class SplitUnit(nn.Module):
    """Half of the channels stay, the other half pass 1x1, 3x3 depthwise, 1x1; then shuffled (Ma et al., Fig. 3c)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1), conv_bn(half, half, 3, groups=half, act=False), conv_bn(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        kept, changed = x.chunk(2, 1)
        return shuffle(torch.cat([kept, self.branch(changed)], 1), 2)


class DownUnit(nn.Module):
    """Two branches over the whole input, both halving the map (Ma et al., Fig. 3d)."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        half = cout // 2
        self.left = nn.Sequential(conv_bn(cin, cin, 3, 2, groups=cin, act=False), conv_bn(cin, half, 1))
        self.right = nn.Sequential(
            conv_bn(cin, half, 1), conv_bn(half, half, 3, 2, groups=half, act=False), conv_bn(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, cin, H, W] -> [B, cout, H/2, W/2]."""
        return shuffle(torch.cat([self.left(x), self.right(x)], 1), 2)


class _ShuffleNet(CifarNet):
    """Both versions."""

    def init_weights(self) -> None:
        """PyTorch's default initialisation, which the benchmark's code keeps for these two networks."""


class CifarShuffleNetV1(_ShuffleNet):
    """ShuffleNet V1 with three groups and 240, 480, 960 channels in 4, 8, 4 units.

    Args:
        num_classes, in_chans, global_pool, drop_rate: As in timm.
    """

    public_names = (
        (r"^conv1\.", "stem.conv."),
        (r"^bn1\.", "stem.bn."),
        (r"^layer(\d)\.", r"stage\1."),
        (r"\.(conv|bn)1\.", r".reduce.\1."),
        (r"\.(conv|bn)2\.", r".depthwise.\1."),
        (r"\.(conv|bn)3\.", r".expand.\1."),
        (r"^linear\.", "fc."),
    )

    def __init__(
        self, *, num_classes: int = 100, in_chans: int = 3, global_pool: str = "avg", drop_rate: float = 0.0
    ) -> None:
        channels, stages = STEM, []
        for number, (width, count) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
            units = []
            for index in range(count):
                units.append(GroupedUnit(channels, width, 1 if index else 2, 3))
                channels = width
            stages.append(Stage(nn.Sequential(*units), channels, 2**number))
        super().__init__(
            conv_bn(in_chans, STEM, 1),
            stages,
            nn.Identity(),
            channels,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )


class CifarShuffleNetV2(_ShuffleNet):
    """ShuffleNet V2 1x: 116, 232, 464 channels in 4, 8, 4 units, and a 1x1 convolution to 1024 as the tail.

    Args:
        num_classes, in_chans, global_pool, drop_rate: As in timm.
    """

    public_names = (
        (r"^conv1\.", "stem.conv."),
        (r"^bn1\.", "stem.bn."),
        (r"^conv2\.", "tail.conv."),
        (r"^bn2\.", "tail.bn."),
        (r"^layer(\d)\.0\.(conv|bn)1\.", r"stage\1.0.left.0.\2."),
        (r"^layer(\d)\.0\.(conv|bn)2\.", r"stage\1.0.left.1.\2."),
        (r"^layer(\d)\.0\.(conv|bn)3\.", r"stage\1.0.right.0.\2."),
        (r"^layer(\d)\.0\.(conv|bn)4\.", r"stage\1.0.right.1.\2."),
        (r"^layer(\d)\.0\.(conv|bn)5\.", r"stage\1.0.right.2.\2."),
        (r"^layer(\d)\.(\d+)\.(conv|bn)1\.", r"stage\1.\2.branch.0.\3."),
        (r"^layer(\d)\.(\d+)\.(conv|bn)2\.", r"stage\1.\2.branch.1.\3."),
        (r"^layer(\d)\.(\d+)\.(conv|bn)3\.", r"stage\1.\2.branch.2.\3."),
        (r"^linear\.", "fc."),
    )

    def __init__(
        self, *, num_classes: int = 100, in_chans: int = 3, global_pool: str = "avg", drop_rate: float = 0.0
    ) -> None:
        channels, stages = STEM, []
        for number, (width, count) in enumerate(((116, 3), (232, 7), (464, 3)), 1):
            units = [DownUnit(channels, width), *(SplitUnit(width) for _ in range(count))]
            channels = width
            stages.append(Stage(nn.Sequential(*units), channels, 2**number))
        super().__init__(
            conv_bn(in_chans, STEM, 1),
            stages,
            conv_bn(channels, 1024, 1),
            1024,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )


register(
    __name__,
    "cifar_shufflenetv1",
    CifarShuffleNetV1,
    "ShuffleNet V1, three groups (Zhang et al. 2018): 949,258 parameters, 38.7 M multiply-adds.",
    stages=3,
)
register(
    __name__,
    "cifar_shufflenetv2",
    CifarShuffleNetV2,
    "ShuffleNet V2 1x (Ma et al. 2018): 1,355,528 parameters, 44.5 M multiply-adds.",
    stages=3,
)
