"""What a network must know of the data set it is built for."""

from typing import Protocol

from kdcli.models.net import RGB
from kdcli.system.sizes import Size


class Data(Protocol):
    """A data set, as far as names, weights and inputs depend on it."""

    name: str
    classes: list[str]
    wnids: list[str] | None  # WordNet ids of the classes; None: it has none
    hash: str  # of its content: weights are found by it
    mean: RGB
    std: RGB
    image_size: Size
