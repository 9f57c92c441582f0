"""Which samples go where: balanced choices that depend on a seed and on the samples' numbers only.

Labels are class numbers [N], or 0/1 [N, K] where an image may have several classes or none.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int

from kdcli.data.views import hashed
from kdcli.errors import DataError, RecipeError

HOLDOUT, PER_CLASS = 11, 12  # purposes of a choice: the two draw differently at one seed
Labels = Int[np.ndarray, "N ..."]
Rows = Int[np.ndarray, " n"]


def counts_of(labels: Labels, classes: int) -> Int[np.ndarray, " K"]:
    """How many images each class has."""
    return np.bincount(labels, minlength=classes) if labels.ndim == 1 else labels.sum(0, dtype=np.int64)


def rows_of(labels: Labels, number: int) -> Rows:
    """The images of a class."""
    return np.flatnonzero(labels == number if labels.ndim == 1 else labels[:, number])


def choose(labels: Labels, take: Int[np.ndarray, " K"], order: np.ndarray, unlabelled: int = 0) -> Rows:
    """Of each class the `take` images that are first by `order` [N]; sorted.

    Where images have several classes these choices overlap, so that a class may get more than `take`, and a larger
    `take` keeps a smaller one's images. `unlabelled`: how many images without any class.
    """
    groups = [(rows_of(labels, number), n) for number, n in enumerate(take)]
    if labels.ndim == 2:
        groups.append((np.flatnonzero(~labels.any(1)), unlabelled))
    return np.unique(np.concatenate([rows[np.argsort(order[rows], kind="stable")[:n]] for rows, n in groups]))


def share_of_each(labels: Int[np.ndarray, "N K"], share: float, order: np.ndarray) -> Rows:
    """About `share` of the images of each class, and of those without one; every class keeps an image outside."""
    take = np.rint(labels.sum(0, dtype=np.int64) * share).astype(int)
    chosen = choose(labels, take, order, round(share * int((~labels.any(1)).sum())))
    for number in np.flatnonzero(~np.delete(labels, chosen, axis=0).any(0)):
        rows = rows_of(labels, int(number))
        if len(rows):
            chosen = np.setdiff1d(chosen, rows[np.argmax(order[rows])])
    return chosen


def stratified(labels: Labels, *, total: int, seed: int) -> Rows:
    """`total` rows, each class in proportion (largest remainders), chosen by a hash of (seed, row); sorted.

    Where images have several classes, each combination of classes in proportion.
    """
    groups = labels if labels.ndim == 1 else np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    exact = np.bincount(groups) * total / len(groups)
    share = np.floor(exact).astype(int)
    short = total - share.sum()
    share[np.argsort(share - exact, kind="stable")[:short]] += 1
    return choose(groups, share, _order(labels, seed, 0))


def held_out(labels: Labels, share: float, seed: int, classes: list[str]) -> Rows:
    """Rows to keep for choosing: `share` of every class, at least one; where images have several classes see
    `share_of_each`.

    Raises RecipeError when a class is left with nothing to train on.
    """
    order = _order(labels, seed, HOLDOUT)
    if labels.ndim == 2:
        return share_of_each(labels, share, order)
    counts = counts_of(labels, len(classes))
    take = np.maximum(np.rint(counts * share).astype(int), 1)
    if (take >= counts).any():
        worst = int(np.argmax(take - counts))
        raise RecipeError(
            f"data.holdout = {share} leaves class {classes[worst]!r} nothing to train on: it has {counts[worst]} "
            f"images, and {take[worst]} would be held out",
            hint=f"--set data.holdout={max(round(share / 2, 3), 0.01)}, or 0 to train on everything.",
        )
    return choose(labels, take, order)


def balanced(labels: Labels, per_class: int, seed: int, classes: list[str]) -> Rows:
    """`per_class` rows of every class; a larger number keeps a smaller one's.

    Where images have several classes: the first `per_class` images of each class by the same hash, so at least that
    many of each, and as many without a class where there are some. Raises RecipeError when a class has fewer.
    """
    counts = counts_of(labels, len(classes))
    if (counts < per_class).any():
        worst = int(np.argmin(counts))
        raise RecipeError(
            f"data.per_class = {per_class}: class {classes[worst]!r} has only {counts[worst]} training images",
            hint=f"--set data.per_class={counts[worst]} is the most that every class has.",
        )
    return choose(labels, np.full(len(classes), per_class), _order(labels, seed, PER_CLASS), per_class)


def check_classes(
    labels: Labels, classes: list[str], where: str, describe: Callable[[str], str] = lambda name: name
) -> None:
    """Raises DataError when there is nothing to tell apart, or a class has no training images (see `describe`)."""
    if len(classes) < (2 if labels.ndim == 1 else 1):
        raise DataError(
            f"{where}: one class only ({classes[0] if classes else 'none'}); there is nothing to tell apart",
            hint="Classification needs two classes or more: one folder, or one label, for each.",
        )
    empty = [classes[n] for n in np.flatnonzero(counts_of(labels, len(classes)) == 0)]
    if empty:
        names = ", ".join(map(describe, empty[:5])) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise DataError(
            f"{where}: {len(empty)} of {len(classes)} classes have no training images: {names}",
            hint="Add images to them or remove them (folders: delete the empty one; npz: number the labels from 0 "
            "without gaps).",
        )


def _order(labels: Labels, seed: int, purpose: int) -> Int[np.ndarray, " N"]:
    return hashed(seed, purpose, torch.arange(len(labels))).numpy()
