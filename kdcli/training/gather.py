"""Several ranks: this rank's outputs joined with all others', so that every rank computes the whole batch's loss."""

from typing import TypeVar

from torch.utils._pytree import tree_flatten, tree_unflatten

from kdcli.system.shards import Gather, Layout

Tree = TypeVar("Tree")


def all_rows(tree: Tree, layout: Layout) -> Tree:
    """Outputs (any pytree of tensors, None among them) of the global (micro-)batch from those of this rank's rows.

    All tensors go through one exchange: what a loss leaves out then has a gradient of zero, and no rank waits for a
    gradient that never comes.
    """
    leaves, spec = tree_flatten(tree)
    tensors = [leaf for leaf in leaves if leaf is not None]
    joined = iter(Gather.apply(layout, *tensors))  # pyright: ignore
    return tree_unflatten([None if leaf is None else next(joined) for leaf in leaves], spec)
