"""Wide residual networks: S. Zagoruyko and N. Komodakis, "Wide Residual Networks", BMVC 2016.

Pre-activation blocks (batch norm and ReLU before each convolution), 6n+4 layers, widths 16k, 32k, 64k.
"""

from collections import OrderedDict

from torch import Tensor, nn

from kdcli.models.cifar.base import CifarNet, Stage, register


class PreActivation(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3, plus the input; where the width changes, plus a 1x1 convolution of the activated
    input (the form of the authors' code and of the benchmark)."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.shortcut = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)
        self.projects = cin != cout

    def forward(self, x: Tensor) -> Tensor:
        """[B, cin, H, W] -> [B, cout, H/stride, W/stride]."""
        active = self.act1(self.bn1(x))
        y = self.conv2(self.act2(self.bn2(self.conv1(active))))
        return y + self.shortcut(active if self.projects else x)


class CifarWideResNet(CifarNet):
    """WRN-depth-widen in three stages; the tail is the last batch norm and ReLU.

    Args:
        depth: 6n+4 layers.
        widen: The factor k.
        num_classes, in_chans, global_pool, drop_rate: As in timm.
    """

    public_names = (
        (r"^conv1\.", "stem.conv."),
        (r"^block(\d)\.layer\.", r"stage\1."),
        (r"\.convShortcut\.", ".shortcut."),
        (r"^bn1\.", "tail.bn."),
    )

    def __init__(
        self,
        depth: int,
        widen: int,
        *,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        channels = 16
        stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(in_chans, channels, 3, 1, 1, bias=False)))
        stages = []
        for number, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
            rows = []
            for index in range((depth - 4) // 6):
                rows.append(PreActivation(channels, width, 2 if number and not index else 1))
                channels = width
            stages.append(Stage(nn.Sequential(*rows), channels, 2**number))
        tail = nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(channels), act=nn.ReLU()))
        super().__init__(
            stem, stages, tail, channels, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate
        )

    def _set_classifier(self, global_pool: str) -> None:
        super()._set_classifier(global_pool)
        if isinstance(self.fc, nn.Linear):  # the benchmark starts this network's classifier without a bias
            nn.init.zeros_(self.fc.bias)


for _depth, _widen, _parameters, _multiply_adds in (
    (16, 1, "180,916", "26.7"),
    (16, 2, "703,284", "101.1"),
    (40, 1, "569,780", "83.3"),
    (40, 2, "2,255,156", "327.6"),
):
    register(
        __name__,
        f"cifar_wrn_{_depth}_{_widen}",
        CifarWideResNet,
        f"WRN-{_depth}-{_widen} (Zagoruyko and Komodakis 2016): {_parameters} parameters, "
        f"{_multiply_adds} M multiply-adds.",
        stages=3,
        depth=_depth,
        widen=_widen,
    )
