"""Small generated data, and the real CIFAR-10 subset as .npz."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def npz(tmp_path):
    """Writes an .npz of random images; keywords replace or add arrays."""

    def write(name="toy.npz", n=40, classes=4, size=32, **arrays) -> Path:
        rng = np.random.default_rng(0)
        whole = {
            "train_images": rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8),
            "train_labels": np.arange(n) % classes,
            "test_images": rng.integers(0, 256, (n // 2, size, size, 3), dtype=np.uint8),
            "test_labels": np.arange(n // 2) % classes,
        } | arrays
        path = tmp_path / name
        np.savez(path, **{k: v for k, v in whole.items() if v is not None})
        return path

    return write


@pytest.fixture
def folder(tmp_path):
    """Writes class folders of noise images under each part; returns the root."""

    def write(parts=("train", "val"), classes=("ant", "bee"), n=6, size=(40, 30), mode="RGB", root="pets") -> Path:
        rng = np.random.default_rng(1)
        for part in parts:
            for name in classes:
                where = tmp_path / root / part / name
                where.mkdir(parents=True)
                for i in range(n):
                    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
                    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(where / f"{name}{i}.png")
        return tmp_path / root

    return write


@pytest.fixture(scope="session")
def cifar_npz(shared, tmp_path_factory) -> Path:
    """5,000 + 5,000 real CIFAR-10 images."""
    out = tmp_path_factory.mktemp("cifar10")
    subprocess.run(
        [sys.executable, shared / "tools" / "prepare_data.py", "cifar10", out], check=True, capture_output=True
    )
    return out / "cifar10.npz"
