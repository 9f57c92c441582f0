"""MobileNetV2 for CIFAR: M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
in the form of CRD's benchmark: stem of stride 2, ReLU, the first group of blocks with stride 1, and an expansion
convolution in the first block too. The last convolution keeps 1280 channels when the network is narrowed.
"""

from torch import Tensor, nn

from kdcli.models.cifar.base import CifarNet, Stage, conv_bn, register

# Table 2 of the paper: (expansion, channels, blocks, stride), grouped into stages by the map's size.
STAGES = (
    ((1, 16, 1, 1), (6, 24, 2, 1)),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)
FEATURES = 1280


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1; the input is added where the shape stays (Sandler et al., Fig. 4d)."""

    def __init__(self, cin: int, cout: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = cin * expansion
        self.expand = conv_bn(cin, inner, 1)
        self.depthwise = conv_bn(inner, inner, 3, stride, groups=inner)
        self.project = conv_bn(inner, cout, 1, act=False)
        self.adds = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        """[B, cin, H, W] -> [B, cout, H/stride, W/stride]."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class CifarMobileNetV2(CifarNet):
    """MobileNetV2 in four stages; the tail is the last 1x1 convolution.

    Args:
        width: Factor on all channels but the last convolution's.
        num_classes, in_chans, global_pool, drop_rate: As in timm.
    """

    classifier_std = 0.01
    public_names = (
        (r"^conv1\.0\.", "stem.conv."),
        (r"^conv1\.1\.", "stem.bn."),
        (r"^blocks\.([01])\.", r"stage1.\1."),
        (r"^blocks\.2\.", "stage2.0."),
        (r"^blocks\.3\.", "stage3.0."),
        (r"^blocks\.4\.", "stage3.1."),
        (r"^blocks\.5\.", "stage4.0."),
        (r"^blocks\.6\.", "stage4.1."),
        (r"\.conv\.0\.", ".expand.conv."),
        (r"\.conv\.1\.", ".expand.bn."),
        (r"\.conv\.3\.", ".depthwise.conv."),
        (r"\.conv\.4\.", ".depthwise.bn."),
        (r"\.conv\.6\.", ".project.conv."),
        (r"\.conv\.7\.", ".project.bn."),
        (r"^conv2\.0\.", "tail.conv."),
        (r"^conv2\.1\.", "tail.bn."),
        (r"^classifier\.(0\.)?", "fc."),
    )

    def __init__(
        self,
        width: float,
        *,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        channels = int(32 * width)
        stem = conv_bn(in_chans, channels, 3, 2)
        stages, reduction = [], 2
        for groups in STAGES:
            rows = []
            for expansion, wide, count, stride in groups:
                blocks = []
                for index in range(count):
                    blocks.append(InvertedResidual(channels, int(wide * width), 1 if index else stride, expansion))
                    channels = int(wide * width)
                rows.append(nn.Sequential(*blocks))
                reduction *= stride
            stages.append(Stage(nn.Sequential(*rows), channels, reduction))
        tail = conv_bn(channels, FEATURES, 1)
        super().__init__(
            stem, stages, tail, FEATURES, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate
        )


for _name, _width, _parameters, _multiply_adds in (
    ("mobilenetv2", 0.5, "812,836", "6.5"),
    ("mobilenetv2_x2", 1.0, "2,353,060", "22.4"),
):
    register(
        __name__,
        f"cifar_{_name}",
        CifarMobileNetV2,
        f"MobileNetV2 at width {_width} (Sandler et al. 2018): {_parameters} parameters, "
        f"{_multiply_adds} M multiply-adds.",
        stages=4,
        width=_width,
    )
