"""Folders of image files: listed, divided into what trains and what tests, and checked."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from kdcli.data.decode import Part, corrupt, why_broken
from kdcli.data.split import check_classes
from kdcli.errors import DataError

LAYOUT = (
    "Lay it out as {where}/train/<class>/*.jpg and {where}/val/<class>/*.jpg, "
    "for ImageNet with WordNet ids (n01440764) as classes"
)
Some = TypeVar("Some", bound=Part)


@dataclass
class Listing:
    """The image files of one part: names relative to the root, as the file system has them, by class and name."""

    root: Path
    classes: list[str]
    files: np.ndarray  # [N] bytes; compact, and not copied into workers object by object
    sizes: np.ndarray  # [N] int64 bytes
    labels: np.ndarray  # [N] int64

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int) -> np.ndarray:
        with open(self.where(row), "rb", buffering=0) as file:  # np.fromfile takes twice as long
            data = np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8)
            return data[: file.readinto(data.data)]

    def where(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self.files[row])))

    def keep(self, rows: np.ndarray) -> "Listing":
        return Listing(self.root, self.classes, self.files[rows], self.sizes[rows], self.labels[rows])


def folders(path: Path) -> list[str]:
    """Names of the folders in a folder, sorted, hidden ones left out. Raises DataError when it cannot be read."""
    return sorted(e.name for e in _scan(path) if e.is_dir() and not e.name.startswith("."))


def listing(root: Path, part: str, classes: list[str]) -> Listing:
    """All image files under root/part/<class>, at any depth, counted but not opened."""
    files: list[bytes] = []
    sizes: list[int] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_images(root / part / name, f"{part}/{name}" if part else name))
        files += [os.fsencode(path) for path, _ in found]
        sizes += [size for _, size in found]
        labels += [label] * len(found)
    return Listing(
        root, classes, np.array(files, dtype=np.bytes_), np.array(sizes, np.int64), np.array(labels, np.int64)
    )


def _images(folder: Path, name: str) -> Iterator[tuple[str, int]]:
    for entry in _scan(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images(folder / entry.name, f"{name}/{entry.name}")
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            yield f"{name}/{entry.name}", entry.stat().st_size


def _scan(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        hint = "Check the name." if isinstance(error, FileNotFoundError) else f"Make it readable: chmod -R u+rX {path}"
        raise DataError(f"{path}: cannot be read as a folder ({error.strerror})", hint=hint) from None


def fingerprint(parts: list[Listing]) -> str:
    """sha256 of class names and of every file's relative name and size; contents are not read, being many."""
    digest = hashlib.sha256("\0".join(parts[0].classes).encode())
    for part in parts:
        order = np.argsort(part.files, kind="stable")
        for name, size in zip(part.files[order].tolist(), part.sizes[order].tolist(), strict=True):
            digest.update(b"\n%s %d" % (name, size))
    return digest.hexdigest()


def divided(kind: str, path: Path, notes: list[tuple[str, object, str]]) -> tuple[Listing, Listing]:
    """Training and test files: of train/ and val/ (or test/), or of one folder split 80/20 by a hash of each name."""
    found = folders(path)
    second = next((name for name in ("val", "test") if name in found), None)
    if "train" in found and second:
        classes, seen = folders(path / "train"), folders(path / second)
        strange = sorted(set(seen) - set(classes))
        if strange:
            raise DataError(
                f"{path}: {len(strange)} classes of {second}/ are not in train/: {', '.join(strange[:5])}",
                hint="Both parts need the same class folders; remove or rename those.",
            )
        train = listing(path, "train", classes)
        test = listing(path, second, [c for c in classes if c in seen])
        if len(test):  # labels counted within the classes it has
            lookup = np.array([classes.index(c) for c in test.classes])
            test = Listing(path, classes, test.files, test.sizes, lookup[test.labels])
        if not len(train) or not len(test):
            raise DataError(
                f"{path}: no image files in {second if len(train) else 'train'}/", hint=f"{LAYOUT.format(where=path)}."
            )
        if second == "val" and "test" in found:
            notes.append(("data.name", str(path), "tested on val/; its test/ is not read"))
        return train, test
    if kind == "imagenet" or "train" in found:
        raise DataError(
            f"{path}: no {'val' if 'train' in found else 'train'}/; it holds {', '.join(found[:5]) or 'no folders'}",
            hint=f"{LAYOUT.format(where=path)}. Or say where it lies: --data {kind}:DIR, --data-root DIR, KDCLI_DATA.",
        )
    whole = listing(path, "", found)
    if not len(whole):
        raise DataError(
            f"{path}: no image files in class folders under it",
            hint=f"{LAYOUT.format(where=path)}; or one folder a class.",
        )
    check_classes(whole.labels, whole.classes, str(path))
    return _split_by_name(whole, notes)


def _split_by_name(whole: Listing, notes: list[tuple[str, object, str]]) -> tuple[Listing, Listing]:
    lots = np.array([hashlib.sha256(bytes(name)).digest()[:8] for name in whole.files], dtype="S8")
    lots = np.frombuffer(lots.tobytes(), dtype=">u8")
    test = []
    for label, name in enumerate(whole.classes):
        rows = np.flatnonzero(whole.labels == label)
        if len(rows) < 2:
            raise DataError(
                f"{whole.root}: class {name!r} has one image, which cannot both train and test",
                hint="Add images, or divide them yourself into train/ and val/.",
            )
        test.append(rows[np.argsort(lots[rows], kind="stable")[: max(1, round(0.2 * len(rows)))]])
    chosen = np.sort(np.concatenate(test))
    share = f"{len(chosen)} of {len(whole)} images (20 % of each class, by a hash of the file name)"
    notes.append(("data.name", str(whole.root), f"no train/ and val/: {share} are tested on"))
    return whole.keep(np.setdiff1d(np.arange(len(whole)), chosen)), whole.keep(chosen)


def sound(part: Some, skip: bool, threads: int, skipped: list[str]) -> Some:
    """The images that decode; the others are fatal, or left out and named in `skipped`."""
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        found = list(pool.map(lambda row: why_broken(part, row), range(len(part))))
    bad = [(row, why) for row, why in enumerate(found) if why is not None]
    if bad and not skip:
        raise corrupt([f"{part.where(row)} ({why})" for row, why in bad])
    skipped += [part.where(row) for row, _ in bad]
    return part.keep(np.setdiff1d(np.arange(len(part)), [row for row, _ in bad])) if bad else part
