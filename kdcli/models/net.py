"""A model's name once it is resolved, and the network that it names."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcli.system.sizes import Size

if TYPE_CHECKING:
    from torch import nn

RGB = tuple[float, float, float]
"""One number for each colour channel, on the scale of pixels in [0, 1]."""
IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelName:
    """A resolved name: the source, the architecture, and the weights asked for."""

    source: str  # zoo | timm | torchvision
    arch: str  # as its source spells it; a timm tag (`resnet18.a1_in1k`) is kept
    weights: str | None  # the text after `@`; None: left out
    typed: str  # as the user typed it

    @property
    def full(self) -> str:
        """`torchvision:mobilenet_v3_small`."""
        return f"{self.source}:{self.arch}"

    @property
    def guessed(self) -> bool:
        """Whether the name differs from what was typed, so that the command should print it."""
        return self.typed.partition("@")[0].strip() not in (self.arch, self.full)


@dataclass
class Net:
    """A network and the input it expects."""

    module: "nn.Module"  # normalised pixels [B,3,H,W] -> outputs [B,num_classes]
    mean: RGB
    std: RGB
    input_size: Size
    interpolation: str  # bilinear | bicubic | nearest | ...
    fixed_size: bool  # the architecture takes no other input size (ViT, Swin)
    num_classes: int
    classes: list[str] | None = None  # the library's names of the outputs; None for another class count
    wnids: list[str] | None = None  # their WordNet ids, same order
    fresh_head: bool = False  # pretrained weights below a head for another class count
