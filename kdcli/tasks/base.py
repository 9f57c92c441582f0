"""What depends on the thing that is predicted: the task protocol and scores."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor, nn

Move = Callable[[Tensor], Tensor]
"""What a crop or flip does to points [B, N, 2] (x, y in pixels): `Views.move` of the batch's views."""


@dataclass(frozen=True)
class Metric:
    """A figure that a score holds: its key in files and JSON, its name and unit for people."""

    name: str
    label: str
    unit: str = "%"
    higher: bool = True  # whether more is better

    @property
    def title(self) -> str:
        """`top-1 %`: what stands above a column."""
        return f"{self.label} {self.unit}".strip()


class Score(dict[str, float]):
    """{metric: value} of a model on a split. `primary` is the metric that runs are compared by."""

    def __init__(self, values: Mapping[str, float], primary: Metric, images: int) -> None:
        super().__init__(values)
        self.primary, self.images = primary, images

    @property
    def value(self) -> float:
        """The primary metric's value."""
        return self[self.primary.name]


class Task(Protocol):
    """Everything that depends on what is predicted; K is the number of classes, B the batch."""

    name: ClassVar[str]
    """The recipe's word: `classify`, `multilabel`."""
    metrics: ClassVar[tuple[Metric, ...]]
    """The figures of a score, the primary one first."""
    output_name: ClassVar[str]
    """Name of the output in exported files."""
    per_class: ClassVar[Metric]
    """What `details` measures of each class."""
    mixable: ClassVar[bool]
    """Whether targets can be mixed by mixup and cutmix, and labels smoothed."""

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None: ...

    num_classes: int

    @staticmethod
    def target(raw: np.ndarray) -> Tensor:
        """Labels as a data source gives them, as the tensor that the losses take; dimension 0 is the image."""
        ...

    def head(self, in_features: int) -> nn.Module:
        """A fresh layer from pooled vectors [B, in_features] to this task's output."""
        ...

    def moved(self, target: Tensor, move: Move) -> Tensor:
        """The target after a crop or flip of the image."""
        ...

    def hard(self, out: Tensor, target: Tensor) -> Float[Tensor, " B"]:
        """The loss with the labels, of every image."""
        ...

    def soft(self, out: Tensor, mentor_out: Tensor, tau: float | Tensor) -> Float[Tensor, "*M B"]:
        """The distillation loss against mentors [*M, B, ...] at temperature tau, of every image."""
        ...

    def log_mark(self, out: Tensor, target: Tensor) -> Float[Tensor, "*M B"]:
        """log of how well each image is answered, in (-inf, 0]."""
        ...

    def sums(self, out: Tensor, target: Tensor) -> dict[str, Float[Tensor, ""]]:
        """What `score` needs of some images: scalars that add up over batches, left on the device."""
        ...

    def score(self, sums: Mapping[str, float]) -> Score:
        """The metrics that sums come to."""
        ...

    def same(self, a: Tensor, b: Tensor, tie: float = 0.0) -> Bool[Tensor, " B"]:
        """Whether two models give an image the same answer; values of `a` within `tie` of each other count as equal."""
        ...

    def decode(self, out: Tensor) -> Tensor:
        """What a device would show."""
        ...

    def details(self, out: Tensor, target: Tensor) -> tuple[dict[str, float], Float[Tensor, " K"]]:
        """Further figures by name, and each class's own figure (not a number where the data has none)."""
        ...

    @property
    def chance(self) -> float:
        """The primary metric of guessing."""
        ...


def plain(values: Mapping[str, Any]) -> dict[str, float]:
    """Sums read from the device as numbers."""
    return {name: float(value) for name, value in values.items()}
