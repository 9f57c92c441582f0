"""A network with the input it expects: images of any size in, outputs for the data's classes out."""

import threading
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import WeightsError
from kdcli.models import cost
from kdcli.models.net import RGB, ModelName
from kdcli.models.outputs import Maps, Output
from kdcli.models.taps import Taps
from kdcli.system.sizes import Size

NOTHING: frozenset[str] = frozenset()
FEATURES = frozenset({"pooled", "maps", "pre"})
"""What a forward pass can return besides `out`: those of a method's needs that are read of a network."""


class Member(nn.Module):
    """A network and the input it expects.

    `mean` and `std` are for pixels in [0, 1]; images are resized to `input_size` (height, width) with `interpolation`.
    `class_index` [K] holds the columns of the network's output that are the data's classes; None where all are.

    `pooled` vectors, `head`, `width`, `classify` and `check_head` are those of a network that ends in one linear
    classifier over pooled features: networks with another kind of head have none, and methods that need them refuse
    such networks by name.
    """

    mean_: Tensor
    std_: Tensor
    class_index: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        name: ModelName,
        *,
        mean: RGB,
        std: RGB,
        input_size: Size,
        interpolation: str,
        num_classes: int,
        class_index: Tensor | None = None,
        origin: str = "",
        digest: str = "",
    ) -> None:
        super().__init__()
        self.net = net
        self.architecture = name
        self.name = name.arch  # unique within a classroom
        self.mean, self.std = mean, std
        self.input_size, self.interpolation = input_size, interpolation
        self.num_classes = num_classes  # of the data: the length of its output
        self.origin, self.digest = origin, digest
        self.register_buffer("mean_", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std_", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("class_index", class_index, persistent=False)
        self._pooled: dict[int, Tensor | None] = {}  # by thread, for threads may share one mentor
        self._head: list[nn.Module] = []  # in a list, so that its parameters are not registered twice
        self._taps: dict[bool, Taps] = {}  # by whether they include the maps before activations

    def read(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 h w"]:
        """Images in [0, 1], resized to this network's input size and normalised with its mean and std."""
        if tuple(images.shape[-2:]) != self.input_size:
            mode = self.interpolation if self.interpolation in ("bilinear", "bicubic") else "bicubic"
            images = F.interpolate(images, size=self.input_size, mode=mode, antialias=True)
        return (images - self.mean_) / self.std_

    def forward(self, images: Float[Tensor, "B 3 H W"], needs: frozenset[str] = NOTHING) -> Any:
        """The output [B, K]; with `needs` the tuple (out, maps or None, pooled or None)."""
        x = self.read(images).to(next(self.net.parameters()).dtype)
        if not needs:
            return self._of_data(self.net(x))
        if "pooled" not in needs:
            return *self._with_maps(x, needs), None
        thread = threading.get_ident()
        self.prepare(needs)
        self._pooled[thread] = None
        try:
            out, maps = self._with_maps(x, needs)
        finally:
            pooled = self._pooled.pop(thread)
        assert pooled is not None
        if pooled.ndim > 2:
            pooled = pooled.mean((2, 3)) if isinstance(self._head[0], nn.Conv2d) else pooled.flatten(1, -2).mean(1)
        return out, maps, pooled

    def _with_maps(self, x: Float[Tensor, "B 3 h w"], needs: frozenset[str]) -> tuple[Tensor, Maps | None]:
        if not needs & {"maps", "pre"}:
            return self._of_data(self.net(x)), None
        self.prepare(needs)
        out, maps = self._taps["pre" in needs](x)
        return self._of_data(out), maps

    def _of_data(self, out: Float[Tensor, "B C"]) -> Float[Tensor, "B K"]:
        return out if self.class_index is None else out.index_select(-1, self.class_index)

    def see(self, images: Float[Tensor, "B 3 H W"], needs: frozenset[str] = NOTHING) -> Output:
        """The network's Output to images [B, 3, H, W] in [0, 1], with those of FEATURES that `needs` names.

        pooled: penultimate vectors [B, D], the input of the last linear layer, averaged over positions or tokens.
        maps: by tap (`models/taps.py`); pre: those before each stage's last activation too.
        Raises WeightsError for a network without a last linear layer, or whose maps cannot be read.
        """
        needs &= FEATURES
        if not needs:
            return Output(self(images))
        out, maps, pooled = self(images, needs)
        return Output(out, pooled, maps)

    def prepare(self, needs: frozenset[str]) -> None:
        """Find the modules that `see` reads; afterwards several threads may call it at once."""
        if "pooled" in needs and not self._head:
            self._head.append(last_linear(self.net, self.architecture.full))
            self._head[0].register_forward_pre_hook(self._keep_pooled)
        if needs & {"maps", "pre"} and ("pre" in needs) not in self._taps:
            taps = Taps(self.net, self.input_size, self.architecture.full, pre="pre" in needs)
            self._taps["pre" in needs] = taps

    def forget(self) -> None:
        """Undo `prepare`; needed after modules of the network were replaced."""
        self._taps.clear()
        self._head.clear()

    @property
    def head(self) -> nn.Linear | nn.Conv2d:
        """The linear classifier, from pooled vectors to logits. Raises WeightsError for a network without one."""
        return last_linear(self.net, self.architecture.full)  # pyright: ignore[reportReturnType]

    @property
    def width(self) -> int:
        """Length D of the pooled vectors."""
        head = self.head
        return head.in_features if isinstance(head, nn.Linear) else head.in_channels

    def classify(self, pooled: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Logits of pooled vectors through this network's linear classifier, without gradient to the classifier."""
        head = self.head
        bias = None if head.bias is None else head.bias.detach().float()
        return self._of_data(F.linear(pooled.float(), head.weight.detach().float().flatten(1), bias))

    @torch.no_grad()
    def check_head(self) -> None:
        """Raise WeightsError unless `classify` of the pooled vectors equals the output (SqueezeNet ends in a ReLU)."""
        training = self.training
        output = self.eval().see(torch.rand(2, 3, *self.input_size).to(self.mean_), frozenset({"pooled"}))
        self.train(training)
        out, again = output.out.float(), self.classify(output.vectors)
        if not torch.allclose(again, out, rtol=1e-2, atol=1e-2 * float(out.abs().max())):
            raise WeightsError(
                f"{self.architecture.full} has layers after its last linear layer, so its classifier cannot be reused",
                hint="Choose another network as teacher, or a method that does not reuse the teacher's classifier.",
            )

    @torch.no_grad()
    def taps(self) -> dict[str, tuple[int, ...]]:
        """Everything that a method can read of this network, by name, with its shape for one image."""
        needs, training = frozenset({"maps", "pooled"}), self.training
        images = torch.zeros(2, 3, *self.input_size, device=self.mean_.device)
        output = self.eval().see(images, needs)
        self.train(training)
        readable = {**output.stages, "pooled": output.vectors, "logits": output.out}
        return {name: tuple(x.shape[1:]) for name, x in readable.items()}

    def _keep_pooled(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if (thread := threading.get_ident()) in self._pooled:
            self._pooled[thread] = inputs[0]

    def with_net(self, net: nn.Module) -> "Member":
        """A frozen Member around another network, with this one's input, classes and name."""
        other = Member(
            net, self.architecture, mean=self.mean, std=self.std, input_size=self.input_size,
            interpolation=self.interpolation, num_classes=self.num_classes, class_index=self.class_index,
            origin=self.origin, digest=self.digest,
        )  # fmt: skip
        other.name = self.name
        return other.to(self.mean_.device).requires_grad_(False).eval()

    def count(self) -> tuple[int, int]:
        """Parameters, and multiply-adds of one image at this network's input size."""
        return cost.count(self.net, self.input_size)


def last_linear(net: nn.Module, name: str) -> nn.Module:
    """The layer a network ends in: its classifier by timm's interface, else its last nn.Linear or nn.Conv2d.

    Raises WeightsError when there is none, or several classifiers in parallel.
    """
    named = net.get_classifier() if hasattr(net, "get_classifier") else None  # pyright: ignore[reportCallIssue]
    inside = named if isinstance(named, nn.Module) else net
    layers = [layer for layer in inside.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not layers or isinstance(named, tuple | list):
        raise WeightsError(
            f"{name} does not end in one linear layer, so it has no penultimate vectors",
            hint="Choose another mentor, or leave out what needs pooled features (classroom.bank_pooled).",
        )
    return layers[-1]
