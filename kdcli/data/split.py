"""Which samples go where: balanced choices that depend on a seed and on the samples' numbers, and on nothing else."""

import numpy as np
import torch
from jaxtyping import Int

from kdcli.data.views import hashed
from kdcli.errors import DataError, RecipeError

HOLDOUT, PER_CLASS = 11, 12  # what a choice is for: the two draw differently at one seed


def stratified(labels: Int[np.ndarray, " N"], *, total: int, seed: int) -> Int[np.ndarray, " n"]:
    """`total` rows, each class in proportion (largest remainders), chosen by a hash of (seed, row); sorted."""
    counts = np.bincount(labels)
    exact = counts * total / len(labels)
    share = np.floor(exact).astype(int)
    short = total - share.sum()
    share[np.argsort(share - exact, kind="stable")[:short]] += 1
    return _choose(labels, share, seed, 0)


def held_out(labels: Int[np.ndarray, " N"], share: float, seed: int, classes: list[str]) -> Int[np.ndarray, " n"]:
    """Rows to keep for choosing: `share` of every class, at least one.

    Raises RecipeError when that leaves a class nothing to train on.
    """
    counts = np.bincount(labels, minlength=len(classes))
    take = np.maximum(np.rint(counts * share).astype(int), 1)
    if (take >= counts).any():
        worst = int(np.argmax(take - counts))
        raise RecipeError(
            f"data.holdout = {share} leaves class {classes[worst]!r} nothing to train on: it has {counts[worst]} "
            f"images, and {take[worst]} would be held out",
            hint=f"--set data.holdout={max(round(share / 2, 3), 0.01)}, or 0 to train on everything.",
        )
    return _choose(labels, take, seed, HOLDOUT)


def balanced(labels: Int[np.ndarray, " N"], per_class: int, seed: int, classes: list[str]) -> Int[np.ndarray, " n"]:
    """`per_class` rows of every class; a larger number keeps a smaller one's.

    Raises RecipeError when a class has fewer.
    """
    counts = np.bincount(labels, minlength=len(classes))
    if (counts < per_class).any():
        worst = int(np.argmin(counts))
        raise RecipeError(
            f"data.per_class = {per_class}: class {classes[worst]!r} has only {counts[worst]} training images",
            hint=f"--set data.per_class={counts[worst]} is the most that keeps the classes balanced.",
        )
    return _choose(labels, np.full(len(classes), per_class), seed, PER_CLASS)


def _choose(labels: np.ndarray, take: np.ndarray, seed: int, what: int) -> np.ndarray:
    draw = hashed(seed, what, torch.arange(len(labels))).numpy()
    chosen = []
    for label, n in enumerate(take):
        rows = np.flatnonzero(labels == label)
        chosen.append(rows[np.argsort(draw[rows], kind="stable")[:n]])
    return np.sort(np.concatenate(chosen))


def check_classes(labels: Int[np.ndarray, " N"], classes: list[str], where: str) -> None:
    """Raises DataError when there is one class only, or a class without training images."""
    if len(classes) < 2:
        raise DataError(
            f"{where}: one class only ({classes[0] if classes else 'none'}); there is nothing to tell apart",
            hint="Classification needs two classes or more: one folder, or one label, for each.",
        )
    empty = [classes[n] for n in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)]
    if empty:
        names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise DataError(
            f"{where}: {len(empty)} of {len(classes)} classes have no training images: {names}",
            hint="Add images to them or remove them (folders: delete the empty one; npz: number the labels from 0 "
            "without gaps).",
        )
