"""`npz:FILE`: arrays in MedMNIST's layout, 8-bit or float (distilled sets), one or several classes an image."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from kdcli.data.arrays import Arrays
from kdcli.data.sources import SOURCES, Notes, find, parse, row
from kdcli.errors import DataError
from kdcli.recipe import DataConfig

LAYOUT = SOURCES["npz"].layout


def read(config: DataConfig, notes: Notes) -> Arrays:
    """Raises DataError that says which array is wrong and how."""
    path = find(config.root, parse(config.name)[1])
    raw = _arrays(path)
    images: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for part in ("train", "val", "test"):
        if f"{part}_images" not in raw:
            continue
        if f"{part}_labels" not in raw:
            raise DataError(f"{path}: {part}_images without {part}_labels", hint=LAYOUT)
        images[part] = _pixels(raw[f"{part}_images"], f"{path}: {part}_images")
        labels[part] = _labels(raw[f"{part}_labels"], f"{path}: {part}_labels")
        if len(images[part]) != len(labels[part]):
            raise DataError(
                f"{path}: {len(images[part])} {part}_images but {len(labels[part])} {part}_labels", hint=LAYOUT
            )
        if not len(labels[part]):
            raise DataError(f"{path}: {part}_images is empty", hint=LAYOUT)
    if "train" not in images or len(images) == 1:
        wanted = "train_images" if "train" not in images else "test_images (or val_images)"
        raise DataError(f"{path}: no {wanted}; it holds {', '.join(sorted(raw)) or 'nothing'}", hint=LAYOUT)
    named = [str(c) for c in raw["class_names"]] if "class_names" in raw else None
    if labels["train"].ndim == 2:
        return Arrays(images, labels, _check_columns(path, labels, named))
    count = len(named) if named is not None else int(labels["train"].max()) + 1
    for part, some in labels.items():
        if some.ndim == 2:
            raise DataError(
                f"{path}: {part}_labels is a 0/1 matrix and train_labels are class numbers",
                hint="Store all in one way.",
            )
        wrong = some[(some < 0) | (some >= count)]
        if len(wrong):
            known = f"{count} class_names" if named else f"{count} classes in train_labels"
            raise DataError(
                f"{path}: {part}_labels holds {int(wrong[0])}, outside 0..{count - 1} ({known}); "
                f"{len(wrong)} labels are outside",
                hint="Labels count from 0; give every class a name in class_names and images in train_images.",
            )
    return Arrays(images, labels, named or [str(n) for n in range(count)])


def _check_columns(path: Path, labels: dict[str, np.ndarray], named: list[str] | None) -> list[str]:
    """The classes of 0/1 matrices. Raises DataError when parts, or class_names, differ in their number."""
    width = labels["train"].shape[1]
    for part, some in labels.items():
        if some.ndim != 2 or some.shape[1] != width:
            raise DataError(
                f"{path}: train_labels is a 0/1 matrix of {width} classes and {part}_labels has shape {some.shape}",
                hint=LAYOUT,
            )
    if named is not None and len(named) != width:
        raise DataError(f"{path}: {len(named)} class_names for the {width} columns of train_labels", hint=LAYOUT)
    return named or [str(n) for n in range(width)]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file", hint="npz:FILE is looked for here and in the data root (--data-root, KDCLI_DATA)."
        )
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: a single array, not an .npz", hint=LAYOUT)
        with file:
            wanted = [k for k in file.files if k == "class_names" or k.endswith(("_images", "_labels"))]
            return {k: file[k] for k in wanted}
    except PermissionError:
        raise DataError(f"{path}: may not be read", hint=f"chmod u+r {path}") from None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated, or not an .npz ({error})", hint="Fetch or write it again.") from None
    except (ValueError, AttributeError) as error:  # objects instead of numbers, or not a zip file
        raise DataError(f"{path}: cannot be read as arrays of numbers ({error})", hint=LAYOUT) from None


def _pixels(raw: np.ndarray, where: str) -> np.ndarray:
    """[N,C,H,W] with C 1 or 3, uint8 or float32, from any of the layouts in use."""
    shape = raw.shape
    if raw.ndim == 3:
        raw = raw[:, None]
    elif raw.ndim == 4 and shape[3] in (1, 3):
        raw = raw.transpose(0, 3, 1, 2)
    elif not (raw.ndim == 4 and shape[1] in (1, 3)):
        raise DataError(f"{where} has shape {shape}; allowed: [N,H,W], [N,H,W,1 or 3], [N,1 or 3,H,W]", hint=LAYOUT)
    if raw.dtype == np.bool_:
        return raw.astype(np.uint8) * 255
    if np.issubdtype(raw.dtype, np.floating):
        if not np.isfinite(raw).all():
            raise DataError(f"{where} holds NaN or infinity", hint="Write it again without them.")
        return np.ascontiguousarray(raw, dtype=np.float32)
    if np.issubdtype(raw.dtype, np.integer) and (raw.size == 0 or (raw.min() >= 0 and raw.max() <= 255)):
        return np.ascontiguousarray(raw, dtype=np.uint8)
    raise DataError(f"{where} has type {raw.dtype} with values beyond 0..255", hint="Store uint8 (0..255) or float.")


def _labels(raw: np.ndarray, where: str) -> np.ndarray:
    """[N] int64 class numbers, or [N,K] uint8 0/1."""
    if raw.ndim == 2 and raw.shape[1] == 1:
        raw = raw[:, 0]
    if raw.ndim == 2 and raw.dtype.kind in "iubf" and bool(((raw == 0) | (raw == 1)).all()):
        return raw.astype(np.uint8)
    whole = raw.dtype.kind in "iub" or (raw.dtype.kind == "f" and bool((raw == np.rint(raw)).all()))
    if raw.ndim != 1 or not whole:
        raise DataError(
            f"{where} has shape {raw.shape} and type {raw.dtype}; allowed: class numbers [N] or [N,1], or a 0/1 matrix "
            "[N,K]",
            hint="Of soft labels keep the largest: labels.argmax(1); of several classes an image store 0 and 1.",
        )
    return raw.astype(np.int64)


def rows(kind: str, root: Path) -> list[dict[str, Any]]:
    """Counts from the arrays' headers and the training labels; an unreadable file is listed without them."""
    return [_row(path) for path in sorted(root.glob("*.npz")) if path.is_file()]


def _row(path: Path) -> dict[str, Any]:
    try:
        images = 0
        with zipfile.ZipFile(path) as file:
            for part in ("train", "val", "test"):
                if f"{part}_images.npy" in file.namelist():
                    with file.open(f"{part}_images.npy") as stream:
                        version = np.lib.format.read_magic(stream)
                        header = "read_array_header_1_0" if version == (1, 0) else "read_array_header_2_0"
                        images += getattr(np.lib.format, header)(stream)[0][0]
        with np.load(path, allow_pickle=False) as arrays:
            labels = arrays["train_labels"]
            several = labels.ndim == 2 and labels.shape[1] > 1
            classes = len(arrays["class_names"]) if "class_names" in arrays else None
            classes = classes or (labels.shape[1] if several else len(np.unique(labels)))
    except Exception:
        return row(f"npz:{path.name}", path, None, None, False)
    return row(f"npz:{path.name}", path, images, classes)
