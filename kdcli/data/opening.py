"""From a recipe's [data] table to an open DataSet, with a note on every setting that was chosen for the user."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from timm.data.imagenet_info import ImageNetInfo

from kdcli.data import folder, pack
from kdcli.data.arrays import Arrays
from kdcli.data.batch import Device
from kdcli.data.dataset import DataSet, Pixels, Split, Store, moments, sized
from kdcli.data.parts import Listed, Part
from kdcli.data.sources import SOURCES, Notes, parse
from kdcli.data.split import balanced, check_classes, held_out
from kdcli.data.views import Views, preset
from kdcli.data.workers import Files, Readers, cores
from kdcli.errors import RecipeError
from kdcli.recipe import DataConfig
from kdcli.system.sizes import Size, pair
from kdcli.tasks import TASKS, MultiLabel

IMAGENET_MOMENTS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DEVICE_BYTES = 4 * 2**30  # a larger set stays in host memory
CACHE_BYTES, CACHE_SIZE = 2**30, 64  # a folder is decoded once when it takes so few bytes, in images of so few pixels
MOST_THREADS = 8  # by default
SAMPLE = 512  # images that a folder's mean and std are measured on


def open_data(config: DataConfig, task: str = "classify", *, device: Device = "cpu") -> DataSet:
    """The data set a recipe names, with targets for its task; a small one on `device` if its views are drawn there.

    Raises DataError for what is missing or broken, RecipeError for settings that do not fit the data or the task.
    """
    kind, _ = parse(config.name)
    if config.augment != "auto":
        preset(config.augment)  # a typing error is reported before anything is read
    notes: Notes = []
    augment = SOURCES[kind].augment if config.augment == "auto" else config.augment
    if config.augment == "auto":
        notes.append(("data.augment", augment, f"default of {kind}"))
    found = SOURCES[kind].load().read(config, notes)
    labels = found.labels["train"] if isinstance(found, Arrays) else found.train.labels
    _check_task(str(config.name), kind, labels, task)
    target = TASKS[task].target
    if isinstance(found, Arrays):
        return _open_arrays(config, found, target, augment, device, notes)
    return _open_files(config, found, target, augment, device, notes)


def _check_task(name: str, kind: str, labels: np.ndarray, task: str) -> None:
    """Raise RecipeError when the source's labels are not those of the task."""
    several = task == MultiLabel.name
    if labels.ndim == 2 and not several:
        raise RecipeError(
            f"{name} has several classes an image (a 0/1 matrix of {labels.shape[1]} classes), and task = {task!r} "
            "learns one class an image",
            hint="--set task=multilabel. If every image has exactly one class, store its number instead (npz: "
            "labels.argmax(1); folder: one folder a class, without labels.csv).",
        )
    if labels.ndim == 1 and several:
        ways = [
            f"{source.usage}: {source.several}" for key, source in SOURCES.items() if source.several and key == kind
        ]
        ways = ways or [f"{source.usage}: {source.several}" for source in SOURCES.values() if source.several]
        raise RecipeError(
            f"{name} has one class an image, and task = {task!r} learns several",
            hint=f"--set task=classify. Several classes an image are read from {'; '.join(ways)}.",
        )


def _size(config: DataConfig, default: int, why: str, notes: Notes) -> Size:
    if config.image_size is None:
        notes.append(("data.image_size", default, why))
    return pair(config.image_size or default)


def _in_memory(pixels: torch.Tensor, views: Views, device: Device) -> Pixels:
    """Pixels on `device` when they fit and their views are drawn there, else on the host."""
    on_host = views.preset.on_host or pixels.nbytes > DEVICE_BYTES
    return Pixels(pixels if on_host else pixels.to(device), views)


def _open_arrays(
    config: DataConfig, raw: Arrays, target: Callable[[np.ndarray], torch.Tensor], augment: str, device: Device,
    notes: Notes,
) -> DataSet:  # fmt: skip
    name = str(config.name)
    kind, _ = parse(name)
    check_classes(raw.labels["train"], raw.classes, name)
    default, why = SOURCES[kind].image_size, f"default of {kind}"
    if default is None:
        default = max(8, *raw.images["train"].shape[2:])
        why = "the longer side of the file's images, at least 8"
    size = _size(config, default, why, notes)
    views = Views(augment, size, config.views)
    if views.preset.auto and raw.images["train"].dtype != np.uint8:
        raise RecipeError(
            f"data.augment = {augment!r} needs 8-bit images; {name} holds floating-point ones",
            hint="--set data.augment=crop-flip",
        )
    parts = {
        part: Split(_in_memory(sized(torch.from_numpy(images), size), views, device), target(raw.labels[part]))
        for part, images in raw.images.items()
    }
    mean, std = raw.moments or moments(parts["train"])
    held = None
    test = parts["test"] if "test" in parts else parts["val"]
    if "test" not in parts:
        notes.append(("data.name", name, "the file has no test part: its val part is what is reported on"))
    elif "val" in parts and config.holdout > 0:
        held = parts["val"]
        notes.append(("data.holdout", len(held), "the file's val part is the held-out slice; all of train trains"))
    train, held = _divide(config, parts["train"], raw.labels["train"], held, raw.classes)
    return DataSet(
        name, raw.classes, None, raw.hash(), mean, std, size, augment, train, test, held, views.slots, notes
    )  # fmt: skip


def _divide(
    config: DataConfig, whole: Split, labels: np.ndarray, held: Split | None, classes: list[str]
) -> tuple[Split, Split | None]:
    """The training set without its held-out slice (unless the source brought one), reduced to per_class."""
    rows = np.arange(len(whole))
    if config.holdout > 0 and held is None:
        out = held_out(labels, config.holdout, config.seed, classes)
        held, rows = whole.subset(torch.from_numpy(out)), np.setdiff1d(rows, out)
    if config.per_class is not None:
        rows = rows[balanced(labels[rows], config.per_class, config.seed, classes)]
    return whole if len(rows) == len(whole) else whole.subset(torch.from_numpy(rows)), held


def _open_files(
    config: DataConfig, files: Listed, target: Callable[[np.ndarray], torch.Tensor], augment: str, device: Device,
    notes: Notes,
) -> DataSet:  # fmt: skip
    name = str(config.name)
    kind, _ = parse(name)
    size = _size(config, SOURCES[kind].image_size or 224, f"default of {kind}", notes)
    views = Views(augment, size, config.views)
    train, test, skipped = files.train, files.test, files.skipped
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        notes.append(("data.skip_corrupt", f"{len(skipped)} left out: {', '.join(skipped[:5])}{more}", "unreadable"))
    readers = Readers((train, test), views, min(cores(), MOST_THREADS) if config.workers is None else config.workers)
    stores = [_store(readers, part, (train, test), device) for part in (0, 1)]
    if config.workers is None and any(isinstance(store, Files) for store in stores):
        notes.append(("data.workers", readers.workers, f"threads that decode files, on {cores()} cores"))
    wnids = train.classes if all(re.fullmatch(r"n\d{8}", c) for c in train.classes) else None
    whole = Split(stores[0], target(train.labels))
    mean, std = IMAGENET_MOMENTS if wnids else moments(whole, SAMPLE)
    classes = _described(wnids) if wnids else train.classes
    rest, held = _divide(config, whole, train.labels, None, classes)
    tested = Split(stores[1], target(test.labels))
    return DataSet(
        name, classes, wnids, files.hash, mean, std, size, augment, rest, tested, held, views.slots, notes, skipped,
        files.pixels,
    )  # fmt: skip


def _store(readers: Readers, part: int, parts: tuple[Part, Part], device: Device) -> Store:
    """Small images decoded once into memory, with the same pixels as when streamed; else the files."""
    height, width = readers.views.size
    total = sum(len(some) for some in parts) * 3 * height * width
    if max(height, width) <= CACHE_SIZE and total <= CACHE_BYTES and not readers.views.preset.resized:
        return _in_memory(readers.decoded(part, cores()), readers.views, device)
    return Files(readers, part)


def _described(wnids: list[str]) -> list[str]:
    """Words for WordNet ids: the first lemma where it is unique, else all of them."""
    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    full = [info.label_name_to_description(wnid) if wnid in known else wnid for wnid in wnids]
    short = [text.split(",")[0] for text in full]
    words = [a if short.count(a) == 1 else b for a, b in zip(short, full, strict=True)]
    return [w if words.count(w) == 1 else f"{w} ({wnid})" for w, wnid in zip(words, wnids, strict=True)]


def packing(
    config: DataConfig, file: str | None, *, size: int, quality: int, track: Callable[[range], Iterable[int]]
) -> tuple[pack.Written, Notes]:
    """Pack the folder that a config names (see `pack.write`) into `file`, by default next to it. Returns notes too."""
    notes: Notes = []
    found = folder.read(config, notes)
    assert isinstance(found.train, folder.Listing)
    assert isinstance(found.test, folder.Listing)
    source = found.train.root.resolve()
    facts = {"kind": parse(config.name)[0], "source": str(source), "hash": found.hash}
    path = Path(file).expanduser() if file else source.with_name(source.name + pack.ENDING)
    done = pack.write(
        path, found.train, found.test, facts=facts, size=size, quality=quality, skip=config.skip_corrupt,
        threads=cores(), track=track,
    )  # fmt: skip
    done.skipped[:0] = found.skipped
    return done, notes
