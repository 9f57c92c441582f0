"""The parts of every CIFAR network of the zoo, and its registration with timm.

A network is a stem, three or four stages (`stage1` ...), a tail and a linear classifier `fc`. `feature_info` lists the
stages, so that methods find intermediate maps under the same names in every network.
"""

import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, overload

from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def conv_bn(cin: int, cout: int, kernel: int = 3, stride: int = 1, *, groups: int = 1, bias: bool = False, act=True):
    """Convolution (padded to keep the size at stride 1), batch norm and, unless `act` is false, ReLU.

    The ReLU is not in place, so that a hook on `bn` reads the values before the activation.
    """
    layers: list[tuple[str, nn.Module]] = [
        ("conv", nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=bias)),
        ("bn", nn.BatchNorm2d(cout)),
    ]
    if act:
        layers.append(("act", nn.ReLU()))
    return nn.Sequential(OrderedDict(layers))


class Stage(NamedTuple):
    """One stage: its module, its output channels, and the factor between the image's size and its output's."""

    module: nn.Module
    channels: int
    reduction: int


class CifarNet(nn.Module):
    """Stem, stages, tail, classifier, with timm's interface.

    Pixels [B, in_chans, H, W], normalised, 8 <= H, W; features [B, num_features, H', W']; logits [B, num_classes].
    `feature_info` lists the stages' outputs: `num_chs`, `reduction` and `module`.

    Args:
        stem: The layers before the first stage.
        stages: The stages in order.
        tail: The layers after the last stage and before pooling.
        num_features: Output channels of the tail.
        num_classes: Classes; 0 for no classifier: the output is then the pooled features.
        global_pool: timm's name of a pooling: "avg", "max", "avgmax", "catavgmax".
        drop_rate: Dropout probability before the classifier, in [0, 1).
    """

    public_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(pattern, replacement), applied in order, that turn tensor names of public checkpoints into this class's."""
    classifier_std: ClassVar[float | None] = None
    """Standard deviation of the classifier's initial weights (bias 0); None leaves PyTorch's default."""

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        tail: nn.Module,
        num_features: int,
        *,
        num_classes: int = 100,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.num_features = self.head_hidden_size = num_features
        self.stem = stem
        self.feature_info: list[dict[str, Any]] = []
        for number, stage in enumerate(stages, 1):
            self.add_module(f"stage{number}", stage.module)
            self.feature_info.append(
                {"num_chs": stage.channels, "reduction": stage.reduction, "module": f"stage{number}"}
            )
        self.tail = tail
        self.head_drop = nn.Dropout(drop_rate)
        self._set_classifier(global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Kaiming-normal convolutions (fan-out), as in the CIFAR benchmark's code; residual norms start at one."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def _set_classifier(self, global_pool: str) -> None:
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        width = self.num_features * self.global_pool.feat_mult()
        self.fc: nn.Module = nn.Linear(width, self.num_classes) if self.num_classes else nn.Identity()
        if self.classifier_std is not None and isinstance(self.fc, nn.Linear):
            nn.init.normal_(self.fc.weight, std=self.classifier_std)
            nn.init.zeros_(self.fc.bias)

    def get_classifier(self) -> nn.Module:
        """The linear classifier, or an identity when there are no classes."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Set a fresh classifier for `num_classes` (0: none), and another pooling if one is named."""
        self.num_classes = num_classes
        before = next(self.stem.parameters())
        self._set_classifier(self.global_pool.pool_type if global_pool is None else global_pool)
        self.fc.to(device=before.device, dtype=before.dtype)

    def _stages(self) -> list[nn.Module]:
        return [getattr(self, info["module"]) for info in self.feature_info]

    def forward_features(self, x: Tensor) -> Tensor:
        """Pixels [B, C, H, W] -> features before pooling [B, num_features, H', W']."""
        x = self.stem(x)
        for stage in self._stages():
            x = stage(x)
        return self.tail(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, num_features, H', W'] -> logits [B, num_classes], or pooled [B, num_features]."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels [B, C, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    @overload
    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", *, intermediates_only: Literal[True],
    ) -> list[Tensor]: ...  # fmt: skip
    @overload
    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: Literal[False] = False,
    ) -> tuple[Tensor, list[Tensor]]: ...  # fmt: skip
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stages' outputs, as in timm's networks: (features, [map, ...]), or the maps only.

        `indices` chooses stages (a number: that many last ones); `norm` has no effect; `stop_early` skips the stages
        after the last chosen one, and the features are then that stage's output.
        Raises AssertionError for a stage that does not exist or a format other than NCHW, as timm does.
        """
        assert output_fmt == "NCHW", "Output format must be NCHW."
        stages = self._stages()
        wanted, last = feature_take_indices(len(stages), None if indices is None else _plain(indices))
        maps = {}
        x = self.stem(x)
        for index, stage in enumerate(stages[: last + 1] if stop_early or intermediates_only else stages):
            maps[index] = x = stage(x)
        chosen = [maps[index] for index in wanted]
        if intermediates_only:
            return chosen
        return (x if stop_early and last + 1 < len(stages) else self.tail(x)), chosen


def _plain(indices: int | Sequence[int]) -> int | list[int]:
    return indices if isinstance(indices, int) else list(indices)


def register(
    module: str,
    name: str,
    net: type[CifarNet],
    doc: str,
    *,
    stages: int,
    first_conv: str = "stem.conv",
    mean: tuple[float, ...] = CIFAR100_MEAN,
    std: tuple[float, ...] = CIFAR100_STD,
    **shape: Any,
) -> None:
    """Register `name` with timm: `timm.create_model(name)` then builds `net(**shape)`.

    Args:
        module: `__name__` of the calling module, where the entry function is added.
        name: The network's name, with the zoo's prefix `cifar_`.
        net: Its class.
        doc: The entry function's docstring: the paper, and the row of the parameter table.
        stages: How many stages `features_only=True` returns.
        first_conv: Path of the first convolution.
        mean, std: The normalisation that the network expects, for three channels of pixels in [0, 1].
        **shape: The arguments of `net` for this network.
    """

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        features = {"out_indices": tuple(range(stages)), "feature_cls": "getter"}
        return build_model_with_cfg(net, name, pretrained, feature_cfg=features, **{**shape, **kwargs})

    entry.__name__ = entry.__qualname__ = name
    entry.__module__, entry.__doc__ = module, doc
    cfg = {
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "min_input_size": (3, 8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": mean,
        "std": std,
        "first_conv": first_conv,
        "classifier": "fc",
    }
    namespace = vars(sys.modules[module])
    # timm looks for the configuration in the entry function's module, under this name.
    namespace.setdefault("default_cfgs", {}).update(generate_default_cfgs({name: cfg}))
    namespace[name] = register_model(entry)
