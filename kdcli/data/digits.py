"""scikit-learn's handwritten digits, 8x8 grey: 1,437 to train on and 360 to test on, always the same ones."""

from pathlib import Path
from typing import Any

import numpy as np

from kdcli.data.arrays import Arrays
from kdcli.data.sources import Notes, row
from kdcli.data.split import stratified
from kdcli.recipe import DataConfig


def read(config: DataConfig, notes: Notes) -> Arrays:
    from sklearn.datasets import load_digits

    grey, labels = (np.asarray(x) for x in load_digits(return_X_y=True))
    images = np.rint(grey.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int64)
    test = stratified(labels, total=360, seed=0)
    train = np.setdiff1d(np.arange(len(labels)), test)
    parts = {"train": train, "test": test}
    return Arrays(
        {part: images[rows] for part, rows in parts.items()},
        {part: labels[rows] for part, rows in parts.items()},
        [str(n) for n in range(10)],
    )


def rows(kind: str, root: Path) -> list[dict[str, Any]]:
    return [row("digits", "inside scikit-learn", 1797, 10)]
