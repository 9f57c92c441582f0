"""Graduates that have layers around the student's architecture: what their card holds, and how one is built from it.

A graduate has timm's interface (`forward_intermediates`, `forward_head`, `get_classifier`), so that maps, pooled
vectors, export and everything else treat it as any other network.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from kdcli.errors import WeightsError
from kdcli.models.layers import conv_bn_relu, head_logits, pooled_to
from kdcli.models.taps import Taps
from kdcli.system.sizes import Size


class Spec(BaseModel):
    """The card's `graduate` table: what is around the student's architecture."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["simkd"] = "simkd"
    width: int = Field(ge=1)  # channels of the teacher's last map, the input of its classifier
    classes: int = Field(ge=1)
    bias: bool = True  # whether the classifier has one
    size: list[int] = Field(min_length=2, max_length=2)  # (height, width) of the teacher's last map
    factor: float = Field(default=2.0, gt=0)  # width / the projector's inner width


class Borrowed(nn.Linear):
    """The teacher's classifier in the student: never trained, but gradient passes through it."""

    def forward(self, input: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        return head_logits(input, self.weight, self.bias)


class Graduate(nn.Module):
    """A student's network up to its last map, a projector to the teacher's width, pooling, the teacher's classifier.

    SimKD, Chen et al. 2022 (arXiv 2203.14001). Its last map is the projected one; a student's map that is larger than
    the teacher's (`spec.size`) is pooled to that size first.

    net: the student's network; its layers after the last map are replaced by identities. image_size: (height, width)
    of its input in pixels. name: for messages.
    """

    def __init__(self, net: nn.Module, spec: Spec, image_size: Size, name: str) -> None:
        super().__init__()
        self.spec = spec
        self.net, self.taps = trimmed(net, image_size, name)
        self.num_classes = spec.classes
        with torch.no_grad():
            *_, last = self.taps(_blank(self.net, image_size))[1].values()
        self.projector = projector(last.shape[1], spec.width, spec.factor).to(last.device)
        self.classifier = Borrowed(spec.width, spec.classes, bias=spec.bias).to(last.device)

    def forward_intermediates(
        self, x: Float[Tensor, "B 3 H W"], indices: list[int] | None = None
    ) -> tuple[Float[Tensor, "B D h w"], list[Tensor]]:
        """(the projected map, the chosen maps): the student's stages, with the projected map in place of the last."""
        *stages, last = self.taps(x)[1].values()
        size = min(last.shape[2], self.spec.size[0]), min(last.shape[3], self.spec.size[1])
        features = self.projector(pooled_to(last, size))
        maps = [*stages, features]
        return features, maps if indices is None else [maps[i] for i in indices]

    def forward_head(self, x: Float[Tensor, "B D h w"], pre_logits: bool = False) -> Tensor:
        """Logits [B, K] of a projected map, or with `pre_logits` its pooled vectors [B, D]."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.classifier(pooled)

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        return self.forward_head(self.forward_intermediates(x)[0])


def projector(cin: int, cout: int, factor: float = 2.0) -> nn.Sequential:
    """SimKD's: 1x1 to `cout` / `factor` channels, 3x3, 1x1 to `cout`, each with batch norm and ReLU, no biases."""
    inner = max(int(cout / factor), 1)
    return nn.Sequential(conv_bn_relu(cin, inner), conv_bn_relu(inner, inner, 3), conv_bn_relu(inner, cout))


def build(net: nn.Module, spec: dict[str, Any], *, image_size: Size, name: str) -> Graduate:
    """The graduate that a card's `graduate` table describes around a student's `net`, without its weights yet.

    Raises WeightsError (exit 3) for a table that this version cannot read.
    """
    try:
        return Graduate(net, Spec.model_validate(spec), image_size, name)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise WeightsError(
            f"{name}: its card's graduate.{where}: {first['msg']}",
            hint="The card may be from another version of kdcli: use that version, or distil again.",
        ) from None


def graduate_spec(net: nn.Module) -> dict[str, Any] | None:
    """The Spec to store in the model card; None for a plain network."""
    return net.spec.model_dump() if isinstance(net, Graduate) else None


def trimmed(net: nn.Module, image_size: Size, name: str) -> tuple[nn.Module, Taps]:
    """The network with every layer after its last map replaced by an identity, and the taps that read it.

    Layers after the map get no gradient from it. Where identities do not fit (an attention that pools), the layers
    stay: unused weights, the same maps.
    """
    taps = Taps(net, image_size, name)
    idle = _idle(net, taps, image_size)
    for path in idle:
        net.set_submodule(path, nn.Identity())
    try:
        return net, Taps(net, image_size, name)
    except Exception:
        for path, layer in idle.items():
            net.set_submodule(path, layer)
        return net, taps


def _idle(net: nn.Module, taps: Taps, image_size: Size) -> dict[str, nn.Module]:
    """The layers with parameters that the last map does not depend on, by path."""
    training, named = net.training, dict(net.named_parameters())
    learns = {path: p.requires_grad for path, p in named.items()}
    net.eval().requires_grad_(True)
    with torch.enable_grad():
        *_, last = taps(_blank(net, image_size))[1].values()
        grads = torch.autograd.grad(last.sum(), list(named.values()), allow_unused=True)
    for path, p in named.items():
        p.requires_grad_(learns[path])
    net.train(training)
    used = {id(p) for p, grad in zip(named.values(), grads, strict=True) if grad is not None}
    return {
        path: layer
        for path, layer in net.named_modules()
        if path and (held := list(layer.parameters(recurse=False))) and not any(id(p) in used for p in held)
    }


def _blank(net: nn.Module, image_size: Size) -> Float[Tensor, "2 3 H W"]:
    """Two inputs of zeros, of the network's device and type."""
    like = next(net.parameters())
    return torch.zeros(2, 3, *image_size, device=like.device, dtype=like.dtype)
