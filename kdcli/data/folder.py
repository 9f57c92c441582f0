"""`imagenet[:DIR]` and `folder:DIR`: image files listed, labelled, divided into training and test sets, and checked.

The labels are the names of the class folders, one class per image; or those of a `labels.csv`, several per image. The
file is long because both kinds of labels share the listing, the split and the errors.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from kdcli.data import labels as tables
from kdcli.data.decode import corrupt, why_broken
from kdcli.data.parts import Listed, Part
from kdcli.data.sources import SOURCES, Notes, find, parse, row
from kdcli.data.split import check_classes, choose, counts_of, share_of_each
from kdcli.data.workers import cores
from kdcli.errors import DataError
from kdcli.recipe import DataConfig
from kdcli.system.paths import data_root

QUICK_CHECK = 5000  # up to this many files are decoded when opened; more only if corrupt files may be skipped
TESTED = 0.2  # share of test images in a folder without train/ and val/
Some = TypeVar("Some", bound=Part)


@dataclass
class Listing:
    """The image files of one part: names relative to the root, as the file system has them, by class and name."""

    root: Path
    classes: list[str]
    files: np.ndarray  # [N] bytes, compact
    sizes: np.ndarray  # [N] int64 bytes
    labels: np.ndarray  # [N] int64 class numbers, or [N, K] uint8 0/1

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


def read(config: DataConfig, notes: Notes) -> Listed:
    """The image files. Raises DataError for a wrong layout and for images that do not decode."""
    kind = parse(config.name)[0]
    path = _locate(config)
    if kind == "folder" and tables.present(path):
        train, test = _by_table(path, notes)
    else:
        train, test = _by_class_folders(kind, path, notes)
        check_classes(train.labels, train.classes, str(path / "train"))
    digest = fingerprint([train, test])
    notes.append(("data.hash", digest[:12], "from the files' names and sizes, not their contents"))
    skipped: list[str] = []
    if config.skip_corrupt or len(train) + len(test) <= QUICK_CHECK:
        train, test = (sound(part, config.skip_corrupt, cores(), skipped) for part in (train, test))
        check_classes(train.labels, train.classes, f"{path}, {len(skipped)} corrupt files left out")
    return Listed(train, test, digest, digest, skipped)


def rows(kind: str, root: Path) -> list[dict[str, Any]]:
    """ImageNet, present or not; for `folder`, every folder in the root with a train/ or a labels.csv."""
    if kind == "imagenet":
        return [_row(kind, _imagenet(root))]
    found = sorted(root.iterdir()) if root.is_dir() else []
    with_images = [path for path in found if path.is_dir() and path != _imagenet(root)]
    return [
        _row(f"folder:{path.name}", path)
        for path in with_images
        if (path / "train").is_dir() or (path / tables.NAME).is_file()
    ]


def _row(name: str, path: Path) -> dict[str, Any]:
    if tables.present(path):
        try:
            listed = tables.read(path / tables.NAME)
        except DataError:
            return row(name, path, None, None, False)
        return row(name, path, len(listed), len({label for one in listed.values() for label in one.labels}))
    train = path / "train"
    if not train.is_dir():
        return row(name, path, None, None, False)
    classes = sum(entry.is_dir() for entry in os.scandir(train))
    parts = [path / part for part in ("train", "val", "test") if (path / part).is_dir()]
    images = sum(file.lower().endswith(IMG_EXTENSIONS) for p in parts for _, _, files in os.walk(p) for file in files)
    return row(name, path, images, classes)


def _imagenet(root: Path) -> Path:
    """Where `imagenet` without a path is: in the data root, or the root itself."""
    return root if (root / "train").is_dir() and not (root / "imagenet").is_dir() else root / "imagenet"


def _locate(config: DataConfig) -> Path:
    kind, where = parse(config.name)
    path = find(config.root, where) if where else _imagenet(data_root(config.root))
    if not path.is_dir():
        raise DataError(
            f"{config.name}: no folder {path}",
            hint=f"{_layout(kind, path)}. Say where it lies with --data {kind}:DIR, --data-root DIR or KDCLI_DATA.",
        )
    return path


def _layout(kind: str, where: Path) -> str:
    return SOURCES[kind].layout.format(where=where)


def folders(path: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones. Raises DataError when it cannot be read."""
    return sorted(e.name for e in _scan(path) if e.is_dir() and not e.name.startswith("."))


def listing(root: Path, part: str, classes: list[str]) -> Listing:
    """All image files under root/part/<class>, at any depth, counted but not opened."""
    files: list[tuple[str, int]] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_images(root / part / name, f"{part}/{name}" if part else name))
        files += found
        labels += [label] * len(found)
    return _listing(root, classes, files, np.array(labels, np.int64))


def _listing(root: Path, classes: list[str], files: list[tuple[str, int]], labels: np.ndarray) -> Listing:
    names = np.array([os.fsencode(path) for path, _ in files], dtype=np.bytes_)
    return Listing(root, classes, names, np.array([size for _, size in files], np.int64), labels)


def _images(folder: Path, name: str) -> Iterator[tuple[str, int]]:
    """(name, size in bytes) of each image under a folder; names begin with `name`."""
    for entry in _scan(folder):
        if entry.name.startswith("."):
            continue
        path = f"{name}/{entry.name}" if name else entry.name
        if entry.is_dir():
            yield from _images(folder / entry.name, path)
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            yield path, entry.stat().st_size


def _scan(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        hint = "Check the name." if isinstance(error, FileNotFoundError) else f"Make it readable: chmod -R u+rX {path}"
        raise DataError(f"{path}: cannot be read as a folder ({error.strerror})", hint=hint) from None


def fingerprint(parts: list[Listing]) -> str:
    """sha256 of class names and of every file's relative name, size and (from a table) labels.

    Contents are not read, since there may be many files.
    """
    digest = hashlib.sha256("\0".join(parts[0].classes).encode())
    for part in parts:
        order = np.argsort(part.files, kind="stable")
        for name, size in zip(part.files[order].tolist(), part.sizes[order].tolist(), strict=True):
            digest.update(b"\n%s %d" % (name, size))
        if part.labels.ndim == 2:
            digest.update(np.ascontiguousarray(part.labels[order]).data)
    return digest.hexdigest()


# --- one class per image ----------------------------------------------------------------------------------------------


def _by_class_folders(kind: str, path: Path, notes: Notes) -> tuple[Listing, Listing]:
    """Training and test files: from train/ and val/ (or test/), or one folder split 80/20 by a hash of each name."""
    found = folders(path)
    second = _second(found)
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
        if len(test):  # its labels are numbered within its own classes
            lookup = np.array([classes.index(c) for c in test.classes])
            test = Listing(path, classes, test.files, test.sizes, lookup[test.labels])
        if not len(train) or not len(test):
            raise DataError(
                f"{path}: no image files in class folders of {second if len(train) else 'train'}/",
                hint=f"{_layout(kind, path)}.",
            )
        _note_parts(path, found, second, notes)
        return train, test
    if kind == "imagenet" or "train" in found:
        _refuse_parts(kind, path, found)
    whole = listing(path, "", found)
    if not len(whole):
        raise DataError(f"{path}: no image files in class folders under it", hint=f"{_layout(kind, path)}.")
    check_classes(whole.labels, whole.classes, str(path))
    return _split_by_name(whole, notes)


def _second(found: list[str]) -> str | None:
    return next((name for name in ("val", "test") if name in found), None)


def _note_parts(path: Path, found: list[str], second: str, notes: Notes) -> None:
    if second == "val" and "test" in found:
        notes.append(("data.name", str(path), "tested on val/; its test/ is not read"))


def _refuse_parts(kind: str, path: Path, found: list[str]) -> None:
    raise DataError(
        f"{path}: no {'val' if 'train' in found else 'train'}/; it holds {', '.join(found[:5]) or 'no folders'}",
        hint=f"{_layout(kind, path)}. Or say where it lies: --data {kind}:DIR, --data-root DIR, KDCLI_DATA.",
    )


def _split_by_name(whole: Listing, notes: Notes) -> tuple[Listing, Listing]:
    """About 20 % of every class to test on, the rest to train on."""
    lots = np.array([hashlib.sha256(bytes(name)).digest()[:8] for name in whole.files], dtype="S8")
    lots = np.frombuffer(lots.tobytes(), dtype=">u8")
    if whole.labels.ndim == 2:
        chosen = share_of_each(whole.labels, TESTED, lots)
    else:
        counts = counts_of(whole.labels, len(whole.classes))
        if (counts < 2).any():
            raise DataError(
                f"{whole.root}: class {whole.classes[int(np.argmin(counts))]!r} has one image, which cannot both train "
                "and test",
                hint="Add images, or divide them yourself into train/ and val/.",
            )
        take = [max(1, round(TESTED * count)) for count in counts.tolist()]
        chosen = choose(whole.labels, np.array(take), lots)
    share = f"{len(chosen)} of {len(whole)} images (20 % of each class, by a hash of the file name)"
    notes.append(("data.name", str(whole.root), f"no train/ and val/: {share} are tested on"))
    return whole.keep(np.setdiff1d(np.arange(len(whole)), chosen)), whole.keep(chosen)


# --- several classes per image ----------------------------------------------------------------------------------------


def _by_table(path: Path, notes: Notes) -> tuple[Listing, Listing]:
    """Training and test files with the labels of labels.csv: from train/ and val/ (or test/), or split by name.

    Images without a line are left out. Raises DataError with line numbers for missing files and for classes
    that occur in the test part only.
    """
    table, where = tables.read(path / tables.NAME), str(path / tables.NAME)
    found, there = folders(path), dict(_images(path, ""))
    if missing := [f"{name} (line {one.line})" for name, one in table.items() if name not in there]:
        raise DataError(
            f"{where}: {len(missing)} of {len(table)} listed images are not there: {_some(missing)}",
            hint=f"Paths count from {path} (such as train/a.jpg); remove these lines, or add the images.",
        )
    second, parts = _second(found), [sorted(table)]
    if "train" in found and second:
        parts = [[name for name in parts[0] if name.startswith(f"{part}/")] for part in ("train", second)]
        for part, names in zip(("train", second), parts, strict=True):
            if not names:
                raise DataError(f"{where}: no line names an image in {part}/", hint=tables.LAYOUT)
        if outside := sorted(set(table) - set(parts[0]) - set(parts[1])):
            notes.append(("data.name", where, f"lines outside train/ and {second}/ are not read: {_some(outside)}"))
    elif "train" in found or second:
        _refuse_parts("folder", path, found)
    if left := sorted(set(there) - set(table)):
        notes.append(("data.name", where, f"{len(left)} images without a line are left out: {_some(left)}"))
    first: dict[str, int] = {}  # line of each class
    for name in sorted((name for names in parts for name in names), key=lambda name: table[name].line):
        for label in table[name].labels:
            first.setdefault(label, table[name].line)
    if not first:
        raise DataError(f"{where}: no image has a label", hint=tables.LAYOUT)
    classes = sorted(first)
    listings = []
    for names in parts:
        matrix = np.array([[label in table[name].labels for label in classes] for name in names], np.uint8)
        listings.append(_listing(path, classes, [(name, there[name]) for name in names], matrix))
    train, test = listings if len(listings) == 2 else _split_by_name(listings[0], notes)
    check_classes(train.labels, classes, where, lambda label: f"{label} (line {first[label]})")
    if not len(test):
        raise DataError(f"{where}: {len(train)} images are too few to test on some of them", hint="Add images.")
    return train, test


def _some(names: list[str]) -> str:
    """Up to five names, and the number of further ones."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def sound(part: Some, skip: bool, threads: int, skipped: list[str]) -> Some:
    """The images that decode; the others are an error, or with `skip` left out and named in `skipped`."""
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        found = list(pool.map(lambda row: why_broken(part, row), range(len(part))))
    bad = [(row, why) for row, why in enumerate(found) if why is not None]
    if bad and not skip:
        raise corrupt([f"{part.where(row)} ({why})" for row, why in bad])
    skipped += [part.where(row) for row, _ in bad]
    return part.keep(np.setdiff1d(np.arange(len(part)), [row for row, _ in bad])) if bad else part
