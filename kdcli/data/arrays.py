"""Data sets that fit in memory: digits, CIFAR, and .npz files in MedMNIST's layout (or distilled ones, in float)."""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdcli.errors import DataError

CIFAR_MOMENTS = {  # mean and std of the training pixels, as published; CIFAR-100's are ClassroomKD's own
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
LAYOUT = (
    "An .npz holds train_images [N,H,W] or [N,H,W,3] (uint8, or float for distilled sets), train_labels [N] or [N,1], "
    "the same for test_ (or val_), and optionally class_names."
)


@dataclass
class Arrays:
    """Images [N,C,H,W] (C 1 or 3, uint8 or float32) and labels [N] int64 of each part that exists."""

    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    classes: list[str]

    def hash(self) -> str:
        """sha256 of every part's name, shape, pixels and labels, and of the class names."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for part in sorted(self.images):
            images, labels = self.images[part], self.labels[part]
            digest.update(f"\n{part} {images.shape} {images.dtype.str}".encode())
            digest.update(np.ascontiguousarray(images).data)
            digest.update(np.ascontiguousarray(labels.astype("<i8")).data)
        return digest.hexdigest()


def digits() -> Arrays:
    """scikit-learn's handwritten digits, 8x8 grey: 1,437 to train on, 360 to test, the same ones always."""
    from sklearn.datasets import load_digits

    from kdcli.data.split import stratified

    grey, labels = (np.asarray(x) for x in load_digits(return_X_y=True))
    images = np.rint(grey.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int64)
    test = stratified(labels, total=360, seed=0)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return Arrays(
        {"train": images[train], "test": images[test]},
        {"train": labels[train], "test": labels[test]},
        [str(n) for n in range(10)],
    )


def cifar(name: str, root: Path) -> Arrays:
    """CIFAR through torchvision's own loader, downloaded to `root` when not there; DataError when it cannot be had."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        try:
            parts = {part: kind(root, train=part == "train") for part in ("train", "test")}
        except RuntimeError:  # not there, or broken
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
    )


def npz(path: Path) -> Arrays:
    """An .npz in MedMNIST's layout. Raises DataError that says which array is wrong and how."""
    raw = _read(path)
    images: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for part in ("train", "val", "test"):
        if f"{part}_images" not in raw:
            continue
        if f"{part}_labels" not in raw:
            raise DataError(f"{path}: {part}_images has no {part}_labels beside it", hint=LAYOUT)
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
    count = len(raw["class_names"]) if "class_names" in raw else int(labels["train"].max()) + 1
    names = [str(c) for c in raw["class_names"]] if "class_names" in raw else [str(n) for n in range(count)]
    for part, some in labels.items():
        wrong = some[(some < 0) | (some >= count)]
        if len(wrong):
            known = f"{count} class_names" if "class_names" in raw else f"{count} classes in train_labels"
            raise DataError(
                f"{path}: {part}_labels holds {int(wrong[0])}, outside 0..{count - 1} ({known}); "
                f"{len(wrong)} labels are outside",
                hint="Labels count from 0; give every class a name in class_names and images in train_images.",
            )
    return Arrays(images, labels, names)


def _read(path: Path) -> dict[str, np.ndarray]:
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
    except (ValueError, AttributeError) as error:  # objects instead of numbers, or no zip at all
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
            raise DataError(
                f"{where} holds values that are no numbers (NaN or infinity)", hint="Write it again without them."
            )
        return np.ascontiguousarray(raw, dtype=np.float32)
    if np.issubdtype(raw.dtype, np.integer) and (raw.size == 0 or (raw.min() >= 0 and raw.max() <= 255)):
        return np.ascontiguousarray(raw, dtype=np.uint8)
    raise DataError(f"{where} has type {raw.dtype} with values beyond 0..255", hint="Store uint8 (0..255) or float.")


def _labels(raw: np.ndarray, where: str) -> np.ndarray:
    if raw.ndim == 2 and raw.shape[1] == 1:
        raw = raw[:, 0]
    whole = raw.dtype.kind in "iub" or (raw.dtype.kind == "f" and bool((raw == np.rint(raw)).all()))
    if raw.ndim != 1 or not whole:
        raise DataError(
            f"{where} has shape {raw.shape} and type {raw.dtype}; allowed: one class number an image, [N] or [N,1]",
            hint="kdcli learns one class an image; of soft or one-hot labels keep the largest: labels.argmax(1).",
        )
    return raw.astype(np.int64)
