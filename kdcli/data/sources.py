"""From a recipe's [data] table to an open DataSet, every choice made for the user noted."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import torch
from timm.data.imagenet_info import ImageNetInfo

from kdcli import dist
from kdcli.data import arrays, folder
from kdcli.data.base import DataSet, Device, Pixels, Split, Store, moments, square
from kdcli.data.split import balanced, check_classes, held_out
from kdcli.data.views import Views, preset
from kdcli.errors import DataError, RecipeError, did_you_mean
from kdcli.home import data_root
from kdcli.recipe import DataConfig

SOURCES = ("digits", "cifar10", "cifar100", "imagenet", "imagenet:DIR", "folder:DIR", "npz:FILE")
IMAGENET_MOMENTS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DEFAULTS = {  # source -> (image size, augmentation)
    "digits": (16, "crop"),
    "cifar10": (32, "crop-flip"),
    "cifar100": (32, "crop-flip"),
    "imagenet": (224, "imagenet"),
    "folder": (224, "imagenet"),
    "npz": (None, "crop-flip"),
}
DEVICE_BYTES = 4 * 2**30  # a larger set stays in host memory
CACHE_BYTES, CACHE_SIZE = 2**30, 64  # a folder is decoded once when its images are this small, together and each
QUICK_CHECK = 5000  # files that are all decoded at open even when corrupt ones would be fatal anyway
SAMPLE = 512  # images a folder's mean and std are measured on
LAYOUT = (
    "Lay it out as {where}/train/<class>/*.jpg and {where}/val/<class>/*.jpg, "
    "for ImageNet with WordNet ids (n01440764) as classes"
)
Notes = list[tuple[str, object, str]]


def open_data(config: DataConfig, *, device: Device = "cpu") -> DataSet:
    """The data set a recipe names, small ones on `device` (unless their views are drawn by the host).

    Raises DataError for what is missing or broken, RecipeError for what makes no sense to ask of it.
    """
    if not config.name:
        raise RecipeError("data.name is not set: nothing to learn from", hint=f"--data one of: {', '.join(SOURCES)}.")
    kind, _, where = config.name.partition(":")
    if kind not in DEFAULTS or (bool(where) and kind not in ("imagenet", "folder", "npz")):
        raise RecipeError(
            f"data.name = {config.name!r}: no such data set", hint=did_you_mean(config.name, SOURCES) or _known()
        )
    if not where and kind in ("folder", "npz"):
        raise RecipeError(f"data.name = {config.name!r} does not say where", hint=f"--data {kind}:PATH")
    if config.augment != "auto":
        preset(config.augment)  # a typing error is told before anything is read
    notes: Notes = []
    if config.augment == "auto":
        notes.append(("data.augment", DEFAULTS[kind][1], f"default of {kind}"))
    augment = DEFAULTS[kind][1] if config.augment == "auto" else config.augment
    if kind in ("imagenet", "folder"):
        return _open_folder(config, kind, _locate(config, kind, where), augment, device, notes)
    return _open_arrays(config, kind, where, augment, device, notes)


def _kept(pixels: torch.Tensor, views: Views, device: Device) -> Pixels:
    """Pixels in memory: on `device` when they fit and their views are drawn there, else on the host."""
    here = views.preset.on_host or pixels.nbytes > DEVICE_BYTES
    return Pixels(pixels if here else pixels.to(device), views)


def _known() -> str:
    return f"Allowed: {', '.join(SOURCES)}."


# --- sets that are arrays ---------------------------------------------------------------------------------------------


def _open_arrays(config: DataConfig, kind: str, where: str, augment: str, device: Device, notes: Notes) -> DataSet:
    root = data_root(config.root)
    if kind == "digits":
        raw = arrays.digits()
    elif kind == "npz":
        raw = arrays.npz(_here_or(root, where))
    else:
        raw = arrays.cifar(kind, root)
    name = config.name or kind
    check_classes(raw.labels["train"], raw.classes, name)
    size = config.image_size or DEFAULTS[kind][0]
    if size is None:
        size = max(8, *raw.images["train"].shape[2:])
        notes.append(("data.image_size", size, "the longer side of the file's images, at least 8"))
    elif config.image_size is None:
        notes.append(("data.image_size", size, f"default of {kind}"))
    views = Views(augment, size)
    if views.preset.auto and raw.images["train"].dtype != np.uint8:
        raise RecipeError(
            f"data.augment = {augment!r} needs 8-bit images; {name} holds floating-point ones",
            hint="--set data.augment=crop-flip",
        )
    parts = {}
    for part, images in raw.images.items():
        pixels = square(torch.from_numpy(images), size)
        parts[part] = Split(_kept(pixels, views, device), torch.from_numpy(raw.labels[part]))
    mean, std = arrays.CIFAR_MOMENTS.get(kind) or moments(parts["train"])
    train, held = parts["train"], None
    test = parts["test"] if "test" in parts else parts["val"]
    if "test" not in parts:
        notes.append(("data.name", name, "the file has no test part: its val part is what is reported on"))
    elif "val" in parts and config.holdout > 0:
        held = parts["val"]
        notes.append(("data.holdout", len(held), "the file's own val part is the held-out slice; all of train trains"))
    train, held = _divide(config, train, held, raw.classes)
    return DataSet(
        name, raw.classes, None, raw.hash(), mean, std, size, augment, train, test, held, views.count, notes
    )  # fmt: skip


def _divide(config: DataConfig, train: Split, held: Split | None, classes: list[str]) -> tuple[Split, Split | None]:
    """The training set less its held-out slice (unless the source brought one) and cut to per_class."""
    if config.holdout > 0 and held is None:
        out = held_out(train.targets.numpy(), config.holdout, config.seed, classes)
        rest = np.setdiff1d(np.arange(len(train)), out)
        held, train = train.subset(torch.from_numpy(out)), train.subset(torch.from_numpy(rest))
    if config.per_class is not None:
        train = train.subset(torch.from_numpy(balanced(train.targets.numpy(), config.per_class, config.seed, classes)))
    return train, held


# --- sets that are folders --------------------------------------------------------------------------------------------


def _locate(config: DataConfig, kind: str, where: str) -> Path:
    root = data_root(config.root)
    if where:
        path = _here_or(root, where)
    else:  # bare "imagenet": under the data root, or the root itself
        path = root if (root / "train").is_dir() and not (root / "imagenet").is_dir() else root / "imagenet"
    if not path.is_dir():
        hint = (
            LAYOUT.format(where=path) if kind == "imagenet" else f"{LAYOUT.format(where=path)}; or one folder a class"
        )
        raise DataError(
            f"{config.name}: no folder {path}",
            hint=f"{hint}. Say where it lies with --data {kind}:DIR, --data-root DIR or KDCLI_DATA.",
        )
    return path


def _here_or(root: Path, where: str) -> Path:
    """A path as given when it exists (or is absolute), else under the data root."""
    given = Path(where).expanduser()
    return root / given if not given.exists() and (root / given).exists() else given


def _open_folder(config: DataConfig, kind: str, path: Path, augment: str, device: Device, notes: Notes) -> DataSet:
    name = config.name or kind
    size = config.image_size or 224
    if config.image_size is None:
        notes.append(("data.image_size", size, f"default of {kind}"))
    views = Views(augment, size)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(cores // dist.neighbours(), 1)
    workers = min(cores, 8) if config.workers is None else config.workers
    train, test = _parts(config, kind, path, notes)
    check_classes(train.labels, train.classes, str(path / "train"))
    digest = folder.fingerprint([train, test])
    notes.append(("data.hash", digest[:12], "from the files' names and sizes, not their contents"))
    skipped: list[str] = []
    if config.skip_corrupt or len(train) + len(test) <= QUICK_CHECK:
        train, test = (_checked(part, config.skip_corrupt, cores, skipped) for part in (train, test))
        check_classes(train.labels, train.classes, f"{path}, {len(skipped)} corrupt files left out")
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        notes.append(("data.skip_corrupt", f"{len(skipped)} left out: {', '.join(skipped[:5])}{more}", "unreadable"))
    pool = folder.Pool((train, test), views, workers)
    stores: list[Store] = []
    for part in (0, 1):
        store: Store = folder.Files(pool, part)
        small = size <= CACHE_SIZE and (len(train) + len(test)) * 3 * size**2 <= CACHE_BYTES
        if small and not views.preset.resized:  # with the same pixels as when streamed: only the speed differs
            store = _kept(pool.decoded(part, cores), views, device)
        stores.append(store)
    streamed = any(isinstance(store, folder.Files) for store in stores)
    if config.workers is None and streamed:
        notes.append(("data.workers", workers, f"processes decoding files, on {cores} cores"))
    whole = Split(stores[0], torch.from_numpy(train.labels))
    wnids = train.classes if all(re.fullmatch(r"n\d{8}", c) for c in train.classes) else None
    mean, std = IMAGENET_MOMENTS if wnids else moments(whole, SAMPLE)
    classes = _described(wnids) if wnids else train.classes
    rest, held = _divide(config, whole, None, classes)
    tested = Split(stores[1], torch.from_numpy(test.labels))
    return DataSet(
        name, classes, wnids, digest, mean, std, size, augment, rest, tested, held, views.count, notes, skipped
    )  # fmt: skip


def _parts(config: DataConfig, kind: str, path: Path, notes: Notes) -> tuple[folder.Listing, folder.Listing]:
    """Training and test files: of train/ and val/ (or test/), or of one folder split 80/20 by a hash of each name."""
    found = folder.folders(path)
    second = next((name for name in ("val", "test") if name in found), None)
    if "train" in found and second:
        classes, seen = folder.folders(path / "train"), folder.folders(path / second)
        strange = sorted(set(seen) - set(classes))
        if strange:
            raise DataError(
                f"{path}: {len(strange)} classes of {second}/ are not in train/: {', '.join(strange[:5])}",
                hint="Both parts need the same class folders; remove or rename those.",
            )
        train = folder.listing(path, "train", classes)
        test = folder.listing(path, second, [c for c in classes if c in seen])
        if len(test):  # labels counted within the classes it has
            lookup = np.array([classes.index(c) for c in test.classes])
            test = folder.Listing(path, classes, test.files, test.sizes, lookup[test.labels])
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
    whole = folder.listing(path, "", found)
    if not len(whole):
        raise DataError(
            f"{path}: no image files in class folders under it",
            hint=f"{LAYOUT.format(where=path)}; or one folder a class.",
        )
    check_classes(whole.labels, whole.classes, str(path))
    return _split_by_name(whole, notes)


def _split_by_name(whole: folder.Listing, notes: Notes) -> tuple[folder.Listing, folder.Listing]:
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


def _checked(files: folder.Listing, skip: bool, threads: int, skipped: list[str]) -> folder.Listing:
    """The files that decode; the others are fatal, or left out and named in `skipped`."""
    bad = folder.broken(files, threads)
    if bad and not skip:
        raise folder.corrupt([f"{files.path(row)} ({why})" for row, why in bad])
    skipped += [str(files.path(row)) for row, _ in bad]
    return files.keep(np.setdiff1d(np.arange(len(files)), [row for row, _ in bad])) if bad else files


def _described(wnids: list[str]) -> list[str]:
    """Words for WordNet ids, the first lemma where it is enough to tell them apart."""
    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    full = [info.label_name_to_description(wnid) if wnid in known else wnid for wnid in wnids]
    short = [text.split(",")[0] for text in full]
    words = [a if short.count(a) == 1 else b for a, b in zip(short, full, strict=True)]
    return [w if words.count(w) == 1 else f"{w} ({wnid})" for w, wnid in zip(words, wnids, strict=True)]
