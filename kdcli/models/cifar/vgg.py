"""VGG for CIFAR: K. Simonyan and A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
ICLR 2015, with batch norm, in the form of CRD's benchmark: five blocks, max-pooling before the second, third and
fourth, global average pooling after the last, one linear layer. (At 64 pixels the benchmark pools once more, before
the fifth block; here the network does not depend on the size.)
"""

from collections import OrderedDict

from torch import nn

from kdcli.models.cifar.base import CifarNet, Stage, conv_bn, register

WIDTHS = (64, 128, 256, 512, 512)


def _block(cin: int, width: int, depth: int, *, pool: bool) -> nn.Sequential:
    """[max-pool,] then `depth` times 3x3 convolution (with bias), batch norm, ReLU."""
    layers: list[tuple[str, nn.Module]] = [("pool", nn.MaxPool2d(2))] if pool else []
    layers += [(f"layer{index}", conv_bn(width if index else cin, width, bias=True)) for index in range(depth)]
    return nn.Sequential(OrderedDict(layers))


class CifarVGG(CifarNet):
    """VGG of five blocks: the first is the stem, the others are the stages; the map shrinks 8 times in all.

    Args:
        depth: Convolutions per block.
        num_classes, in_chans, global_pool, drop_rate: As in timm.
    """

    classifier_std = 0.01
    public_names = (
        (r"^block0\.", "stem."),
        (r"^block(\d)\.", r"stage\1."),
        (r"^(stem|stage\d)\.0\.", r"\1.layer0.conv."),
        (r"^(stem|stage\d)\.1\.", r"\1.layer0.bn."),
        (r"^(stem|stage\d)\.3\.", r"\1.layer1.conv."),
        (r"^(stem|stage\d)\.4\.", r"\1.layer1.bn."),
        (r"^classifier\.", "fc."),
    )

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        stem = _block(in_chans, WIDTHS[0], depth, pool=False)
        stages = [
            Stage(_block(WIDTHS[number - 1], WIDTHS[number], depth, pool=number < 4), WIDTHS[number], min(2**number, 8))
            for number in range(1, 5)
        ]
        super().__init__(
            stem,
            stages,
            nn.Identity(),
            WIDTHS[-1],
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )


for _name, _depth, _parameters, _multiply_adds in (
    ("vgg8", 1, "3,965,028", "96.2"),
    ("vgg13", 2, "9,462,180", "284.9"),
):
    register(
        __name__,
        f"cifar_{_name}",
        CifarVGG,
        f"{_name.upper()} with batch norm (Simonyan and Zisserman 2015): {_parameters} parameters, "
        f"{_multiply_adds} M multiply-adds.",
        stages=4,
        first_conv="stem.layer0.conv",
        depth=_depth,
    )
