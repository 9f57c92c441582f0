"""CIFAR-10 and CIFAR-100 through torchvision's loader, downloaded to the data root where they are missing."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.data.arrays import Arrays, Moments
from kdcli.data.sources import Notes, parse, row
from kdcli.errors import DataError
from kdcli.recipe import DataConfig
from kdcli.system.paths import data_root

MOMENTS: dict[str, Moments] = {  # of the training pixels, as published; CIFAR-100's are those of ClassroomKD's code
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
FOLDERS = {"cifar10": ("cifar-10-batches-py", 10), "cifar100": ("cifar-100-python", 100)}  # and number of classes


def read(config: DataConfig, notes: Notes) -> Arrays:
    """Raises DataError where it is neither there nor can be downloaded."""
    from torchvision.datasets import CIFAR10, CIFAR100

    name, root = parse(config.name)[0], data_root(config.root)
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        try:
            parts = {part: kind(root, train=part == "train") for part in ("train", "test")}
        except RuntimeError:  # missing or broken
            root.mkdir(parents=True, exist_ok=True)
            parts = {part: kind(root, train=part == "train", download=True) for part in ("train", "test")}
    except (OSError, RuntimeError, EOFError, zlib.error) as error:  # URLError is an OSError
        raise DataError(
            f"{name}: not found at {root / kind.base_folder}, and downloading {kind.url} failed ({error})",
            hint=f"Put {kind.filename} (or the folder {kind.base_folder} it unpacks to) into {root}, or name another "
            "folder: --data-root DIR or KDCLI_DATA.",
        ) from None
    return Arrays(
        {part: np.ascontiguousarray(np.asarray(p.data).transpose(0, 3, 1, 2)) for part, p in parts.items()},
        {part: np.asarray(p.targets, dtype=np.int64) for part, p in parts.items()},
        [str(c) for c in parts["train"].classes],
        MOMENTS[name],
    )


def rows(kind: str, root: Path) -> list[dict[str, Any]]:
    folder, classes = FOLDERS[kind]
    return [row(kind, root / folder, 60000, classes, (root / folder).is_dir())]
