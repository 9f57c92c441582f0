"""One model's answer to one batch."""

from dataclasses import dataclass, fields

from torch import Tensor
from torch.utils._pytree import register_dataclass

Maps = dict[str, Tensor]
"""One model's intermediate maps [B, C, H, W] by tap: `stage1`, `stage2` and so on, and with `pre` also `stage1.pre` and
so on; a transformer's tokens are arranged as a grid, without the class token."""


@dataclass
class Output:
    """One model's answer to one batch; the batch is dimension 0 of every tensor.

    out: the input of the task's losses, logits [B, K] for classes.
    pooled: penultimate vectors [B, D]; None unless a method needs them.
    maps: intermediate maps by tap; None unless a method needs them.
    strong: the same model's answer to the batch's strongly augmented view; None unless a method needs two views.

    A pytree: `torch.utils._pytree.tree_map` slices, moves and casts an Output, or a list of them, as one.
    """

    out: Tensor
    pooled: Tensor | None = None
    maps: Maps | None = None
    strong: "Output | None" = None

    @property
    def vectors(self) -> Tensor:
        """The penultimate vectors [B, D] in float32; only for methods with the need `pooled`."""
        assert self.pooled is not None
        return self.pooled.float()

    @property
    def stages(self) -> Maps:
        """The maps in float32 by tap, in order; only for methods with the need `maps` or `pre`."""
        assert self.maps is not None
        return {name: x.float() for name, x in self.maps.items()}


register_dataclass(Output, field_names=[field.name for field in fields(Output)], drop_field_names=[])
