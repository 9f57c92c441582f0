"""What lets one network's maps meet another's: which stages go together, sizes, channels.

Every adapter is made from maps of one real lesson, so any two networks that have maps can be paired, convolutional
ones and transformers alike (a transformer's tokens come as a grid).
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import RecipeError, did_you_mean
from kdcli.methods.base import View
from kdcli.models.taps import is_pre


def pair(student: dict[str, Tensor], mentor: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Which stages go together, (the student's, the mentor's): counted from the last backwards, for that is where both
    know most; the deeper network's first stages stay alone."""
    ours, theirs = ([tap for tap in maps if not is_pre(tap)] for maps in (student, mentor))
    n = min(len(ours), len(theirs))
    return list(zip(ours[len(ours) - n :], theirs[len(theirs) - n :], strict=True))


def stages(view: View) -> dict[str, Tensor]:
    """One model's stages in order, without what came before their activations (`pre`)."""
    return {name: x for name, x in view.stages.items() if not is_pre(name)}


def last(view: View) -> Float[Tensor, "B C H W"]:
    """One model's last stage."""
    return list(stages(view).values())[-1]


def tap(maps: dict[str, Tensor], name: str, who: str, option: str) -> str:
    """The tap that an option names: `last`, or one of `maps`. Raises RecipeError that lists them with their shapes."""
    if name == "last":
        return [one for one in maps if not is_pre(one)][-1]
    if name not in maps:
        shapes = ", ".join(f"{one} {'x'.join(map(str, x.shape[1:]))}" for one, x in maps.items())
        raise RecipeError(
            f"method.{option}: {who} has no tap {name!r}", hint=f"{did_you_mean(name, maps)} It has {shapes}.".strip()
        )
    return name


def fit(
    a: Float[Tensor, "B C H W"], b: Float[Tensor, "B D h w"]
) -> tuple[Float[Tensor, "B C s t"], Float[Tensor, "B D s t"]]:
    """The larger of two maps average-pooled to the size of the smaller, each side for itself."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return pooled_to(a, size), pooled_to(b, size)


def pooled_to(x: Float[Tensor, "B C H W"], size: tuple[int, int]) -> Float[Tensor, "B C h w"]:
    """Average-pooled to `size`, where it is not that already."""
    return x if tuple(x.shape[2:]) == tuple(size) else F.adaptive_avg_pool2d(x, size)


def resized_to(x: Float[Tensor, "B C H W"], size: tuple[int, int]) -> Float[Tensor, "B C h w"]:
    """`size` by average pooling where the map is larger, by bilinear interpolation where it is smaller."""
    down = pooled_to(x, (min(x.shape[2], size[0]), min(x.shape[3], size[1])))
    return down if tuple(down.shape[2:]) == tuple(size) else F.interpolate(down, size, mode="bilinear")


def conv_bn_relu(cin: int, cout: int, kernel: int = 1, *, bias: bool = False) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, ReLU: what most papers' connectors are made of."""
    conv = nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU())
