"""A multi-label set made from real images: 2 x 2 mosaics of scikit-learn's handwritten digits, labels = digits present.

    python tests/mosaics.py digit-mosaics.npz

Cells are empty with probability 0.25. Training mosaics are drawn from the digits' training images, test mosaics from
their test images (the split of `--data digits`), so no image is in both. The same file every time.
"""

import argparse
from pathlib import Path

import numpy as np

from kdcli.data.digits import read
from kdcli.recipe import DataConfig

TRAIN, TEST, EMPTY = 3000, 1000, 0.25


def mosaics(images: np.ndarray, labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` mosaics [N, 16, 16] uint8 of images [M, 1, 8, 8], and which of the ten digits each holds [N, 10]."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(images), (count, 4))
    shown = rng.random((count, 4)) >= EMPTY
    cells = images[chosen, 0] * shown[..., None, None]  # [N, 4, 8, 8]
    rows = [np.concatenate([cells[:, 2 * n], cells[:, 2 * n + 1]], axis=2) for n in range(2)]
    present = np.zeros((count, 10), dtype=np.uint8)
    for cell in range(4):
        present[np.arange(count)[shown[:, cell]], labels[chosen[shown[:, cell], cell]]] = 1
    return np.concatenate(rows, axis=1).astype(np.uint8), present


def write(path: Path, train: int = TRAIN, test: int = TEST) -> Path:
    """Write the .npz that `--data npz:FILE --set task=multilabel` reads."""
    raw = read(DataConfig(name="digits"), [])
    parts = {}
    for seed, (part, count) in enumerate({"train": train, "test": test}.items()):
        parts[f"{part}_images"], parts[f"{part}_labels"] = mosaics(raw.images[part], raw.labels[part], count, seed)
    np.savez_compressed(path, **parts, class_names=np.array(raw.classes))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the .npz to write")
    print(write(parser.parse_args().file))
