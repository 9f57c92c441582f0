"""Several ranks: this rank's outputs joined with all others', so that every rank computes the whole batch's loss."""

from typing import TypeVar

from torch.utils._pytree import tree_flatten, tree_unflatten

from kdcli.system.shards import Gather, Layout

Tree = TypeVar("Tree")


def all_rows(tree: Tree, layout: Layout) -> Tree:
    """The outputs of the global (micro-)batch, gathered from this rank's; `tree` is any pytree of tensors and None.

    All tensors go through one autograd function: those that a loss does not use get a zero gradient, so that no rank
    waits for a gradient that never comes.
    """
    leaves, spec = tree_flatten(tree)
    tensors = [leaf for leaf in leaves if leaf is not None]
    joined = iter(Gather.apply(layout, *tensors))  # pyright: ignore
    return tree_unflatten([None if leaf is None else next(joined) for leaf in leaves], spec)
