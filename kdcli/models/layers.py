"""Small layers that methods and graduates share: maps brought to one size, connectors, a frozen classifier."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def fit(
    a: Float[Tensor, "B C H W"], b: Float[Tensor, "B D h w"]
) -> tuple[Float[Tensor, "B C s t"], Float[Tensor, "B D s t"]]:
    """Both maps average-pooled to the smaller of their heights and the smaller of their widths."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return pooled_to(a, size), pooled_to(b, size)


def pooled_to(x: Float[Tensor, "B C H W"], size: tuple[int, int]) -> Float[Tensor, "B C h w"]:
    """The map average-pooled to `size` (height, width); unchanged if it has that size."""
    return x if tuple(x.shape[2:]) == tuple(size) else F.adaptive_avg_pool2d(x, size)


def resized_to(x: Float[Tensor, "B C H W"], size: tuple[int, int]) -> Float[Tensor, "B C h w"]:
    """The map at `size` (height, width): average-pooled where it is larger, bilinearly interpolated where smaller."""
    down = pooled_to(x, (min(x.shape[2], size[0]), min(x.shape[3], size[1])))
    return down if tuple(down.shape[2:]) == tuple(size) else F.interpolate(down, size, mode="bilinear")


def conv_bn_relu(cin: int, cout: int, kernel: int = 1, *, bias: bool = False) -> nn.Sequential:
    """A convolution that keeps the map's size, batch norm and ReLU: the parts of most papers' connectors."""
    conv = nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU())


def head_logits(
    pooled: Float[Tensor, "B D"], weight: Float[Tensor, "K D"], bias: Float[Tensor, " K"] | None
) -> Float[Tensor, "B K"]:
    """Logits of a frozen classifier: the gradient flows into the vectors, not into the classifier."""
    return F.linear(pooled, weight.detach(), None if bias is None else bias.detach())
