"""What lies in the data root, without opening any of it: for `kdcli data ls`."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.data import pack
from kdcli.data.folder import IMG_EXTENSIONS
from kdcli.errors import DataError
from kdcli.system.paths import data_root


def available(root: str | None = None) -> list[dict[str, Any]]:
    """The data sets that can be named: the built-in ones, and folders, packs and .npz files in the data root.

    One dict each: `name` (as --data takes it), `where`, `images`, `classes` (counts; None when unknown), `present`.
    """
    base = data_root(root)
    found = [_row("digits", "inside scikit-learn", 1797, 10, True)]
    for name, classes, unpacked in (("cifar10", 10, "cifar-10-batches-py"), ("cifar100", 100, "cifar-100-python")):
        found.append(_row(name, str(base / unpacked), 60000, classes, (base / unpacked).is_dir()))
    imagenet = base if (base / "train").is_dir() and not (base / "imagenet").is_dir() else base / "imagenet"
    found.append(_folder("imagenet", imagenet))
    for path in sorted(base.iterdir()) if base.is_dir() else []:
        if path.suffix == ".npz" and path.is_file():
            found.append(_npz(path))
        elif path.suffix == pack.ENDING and path.is_file():
            found.append(_pack(path))
        elif path.is_dir() and path != imagenet and (path / "train").is_dir():
            found.append(_folder(f"folder:{path.name}", path))
    return found


def _row(name: str, where: str, images: int | None, classes: int | None, present: bool) -> dict[str, Any]:
    return {"name": name, "where": where, "images": images, "classes": classes, "present": present}


def _folder(name: str, path: Path) -> dict[str, Any]:
    train = path / "train"
    if not train.is_dir():
        return _row(name, str(path), None, None, False)
    classes = sum(entry.is_dir() for entry in os.scandir(train))
    parts = [path / part for part in ("train", "val", "test") if (path / part).is_dir()]
    images = sum(file.lower().endswith(IMG_EXTENSIONS) for p in parts for _, _, files in os.walk(p) for file in files)
    return _row(name, str(path), images, classes, True)


def _pack(path: Path) -> dict[str, Any]:
    """Counts from the pack's first bytes; a file that is none is listed without them."""
    try:
        facts = pack.facts(path)
    except DataError:
        return _row(f"pack:{path.name}", str(path), None, None, False)
    return _row(f"pack:{path.name}", str(path), facts["train"] + facts["test"], len(facts["classes"]), True)


def _npz(path: Path) -> dict[str, Any]:
    """Counts from the arrays' headers and the training labels; an unreadable file is listed without them."""
    try:
        images = 0
        with zipfile.ZipFile(path) as file:
            for part in ("train", "val", "test"):
                if f"{part}_images.npy" in file.namelist():
                    with file.open(f"{part}_images.npy") as stream:
                        read = np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(stream) == (1, 0) else (
                            np.lib.format.read_array_header_2_0)  # fmt: skip
                        images += read(stream)[0][0]
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays["class_names"] if "class_names" in arrays else np.unique(arrays["train_labels"])
    except Exception:
        return _row(f"npz:{path.name}", str(path), None, None, False)
    return _row(f"npz:{path.name}", str(path), images, len(names), True)
