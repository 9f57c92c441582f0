"""From a recipe's [data] table to an open DataSet, every choice made for the user noted."""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.data.imagenet_info import ImageNetInfo

from kdcli.data import arrays, decode_cuda, folder, pack
from kdcli.data.batch import Device
from kdcli.data.dataset import DataSet, Pixels, Split, Store, moments, square
from kdcli.data.decode import Part
from kdcli.data.split import balanced, check_classes, held_out
from kdcli.data.views import Views, preset
from kdcli.data.workers import Files, Readers
from kdcli.errors import DataError, RecipeError, did_you_mean
from kdcli.recipe import DataConfig
from kdcli.system import distributed
from kdcli.system.paths import data_root
from kdcli.system.sizes import pair

SOURCES = ("digits", "cifar10", "cifar100", "imagenet", "imagenet:DIR", "folder:DIR", "pack:FILE", "npz:FILE")
IMAGENET_MOMENTS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DEFAULTS = {  # source -> (image size, augmentation)
    "digits": (16, "crop"),
    "cifar10": (32, "crop-flip"),
    "cifar100": (32, "crop-flip"),
    "imagenet": (224, "imagenet"),
    "folder": (224, "imagenet"),
    "pack": (224, "imagenet"),
    "npz": (None, "crop-flip"),
}
DEVICE_BYTES = 4 * 2**30  # a larger set stays in host memory
CACHE_BYTES, CACHE_SIZE = 2**30, 64  # a folder is decoded once when its images are this small, together and each
QUICK_CHECK = 5000  # files that are all decoded at open even when corrupt ones would be fatal anyway
SAMPLE = 512  # images a folder's mean and std are measured on
Notes = list[tuple[str, object, str]]


def open_data(config: DataConfig, *, task: str = "classify", device: Device = "cpu") -> DataSet:
    """The data set a recipe names, small ones on `device` (unless their views are drawn by the host).

    Raises DataError for what is missing or broken, RecipeError for what makes no sense to ask of it.
    """
    if not config.name:
        raise RecipeError("data.name is not set: nothing to learn from", hint=f"--data one of: {', '.join(SOURCES)}.")
    kind, _, where = config.name.partition(":")
    if kind not in DEFAULTS or (bool(where) and kind not in ("imagenet", "folder", "pack", "npz")):
        raise RecipeError(
            f"data.name = {config.name!r}: no such data set", hint=did_you_mean(config.name, SOURCES) or _known()
        )
    if not where and kind in ("folder", "pack", "npz"):
        raise RecipeError(f"data.name = {config.name!r} does not say where", hint=f"--data {kind}:PATH")
    if config.augment != "auto":
        preset(config.augment)  # a typing error is told before anything is read
    notes: Notes = []
    if config.augment == "auto":
        notes.append(("data.augment", DEFAULTS[kind][1], f"default of {kind}"))
    augment = DEFAULTS[kind][1] if config.augment == "auto" else config.augment
    if kind in ("imagenet", "folder"):
        return _open_files(config, kind, listed(config, notes), augment, device, notes)
    if kind == "pack":
        return _open_files(config, kind, _packed(config, where, notes), augment, device, notes)
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
        raw = arrays.npz(here_or(root, where))
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
    views = Views(augment, size, config.views)
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
        name, raw.classes, None, raw.hash(), mean, std, pair(size), augment, train, test, held, views.slots, notes
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


# --- sets that are files ----------------------------------------------------------------------------------------------


@dataclass
class Listed:
    """The images of a folder or a pack, before any is decoded for good."""

    train: Part
    test: Part
    hash: str
    pixels: str
    skipped: list[str]


def listed(config: DataConfig, notes: Notes) -> Listed:
    """The files of `imagenet` or `folder:DIR`.

    Raises DataError for a wrong layout and for images that do not decode.
    """
    kind, _, where = (config.name or "").partition(":")
    path = _locate(config, kind, where)
    train, test = folder.divided(kind, path, notes)
    check_classes(train.labels, train.classes, str(path / "train"))
    digest = folder.fingerprint([train, test])
    notes.append(("data.hash", digest[:12], "from the files' names and sizes, not their contents"))
    skipped: list[str] = []
    if config.skip_corrupt or len(train) + len(test) <= QUICK_CHECK:
        train, test = (folder.sound(part, config.skip_corrupt, cores(), skipped) for part in (train, test))
        check_classes(train.labels, train.classes, f"{path}, {len(skipped)} corrupt files left out")
    return Listed(train, test, digest, digest, skipped)


def packing(
    config: DataConfig, file: str | None, *, size: int, quality: int, track: Callable[[range], Iterable[int]]
) -> tuple[pack.Written, Notes]:
    """Pack the folder a config names (see `pack.write`) into `file`, by default beside it. Returns the notes too."""
    notes: Notes = []
    found = listed(config, notes)
    assert isinstance(found.train, folder.Listing)
    assert isinstance(found.test, folder.Listing)
    source = found.train.root.resolve()
    facts = {"kind": (config.name or "").partition(":")[0], "source": str(source), "hash": found.hash}
    path = Path(file).expanduser() if file else source.with_name(source.name + pack.ENDING)
    done = pack.write(
        path, found.train, found.test, facts=facts, size=size, quality=quality, skip=config.skip_corrupt,
        threads=cores(), track=track,
    )  # fmt: skip
    done.skipped[:0] = found.skipped
    return done, notes


def _packed(config: DataConfig, where: str, notes: Notes) -> Listed:
    """A pack's images: known to decode when they were packed, so looked at again only where some may be left out."""
    path = here_or(data_root(config.root), where)
    train, test, facts = pack.read(path)
    notes.append(("data.name", str(path), f"packed from {facts['source']}, short side at most {facts['size']} pixels"))
    notes.append(("data.hash", facts["hash"][:12], "of the files it was packed from: mentors trained on those fit"))
    skipped: list[str] = []
    if config.skip_corrupt:
        train, test = (folder.sound(part, True, cores(), skipped) for part in (train, test))
    check_classes(train.labels, train.classes, str(path))
    return Listed(train, test, facts["hash"], facts["pixels"], skipped)


def _locate(config: DataConfig, kind: str, where: str) -> Path:
    root = data_root(config.root)
    if where:
        path = here_or(root, where)
    else:  # bare "imagenet": under the data root, or the root itself
        path = root if (root / "train").is_dir() and not (root / "imagenet").is_dir() else root / "imagenet"
    if not path.is_dir():
        layout = folder.LAYOUT.format(where=path)
        hint = layout if kind == "imagenet" else f"{layout}; or one folder a class"
        raise DataError(
            f"{config.name}: no folder {path}",
            hint=f"{hint}. Say where it lies with --data {kind}:DIR, --data-root DIR or KDCLI_DATA.",
        )
    return path


def here_or(root: Path, where: str) -> Path:
    """A path as given when it exists (or is absolute), else under the data root."""
    given = Path(where).expanduser()
    return root / given if not given.exists() and (root / given).exists() else given


def cores() -> int:
    """Cores this process may use, shared with the other ranks on this machine."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(here // distributed.local_ranks(), 1)


def _open_files(
    config: DataConfig, kind: str, files: Listed, augment: str, device: Device, notes: Notes
) -> DataSet:  # fmt: skip
    name = config.name or kind
    size = config.image_size or 224
    if config.image_size is None:
        notes.append(("data.image_size", size, f"default of {kind}"))
    views = Views(augment, size, config.views)
    train, test, skipped = files.train, files.test, files.skipped
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        notes.append(("data.skip_corrupt", f"{len(skipped)} left out: {', '.join(skipped[:5])}{more}", "unreadable"))
    readers = _readers(config, (train, test), views)
    stores: list[Store] = []
    lacking = decode_cuda.unable(device) if config.decode == "cuda" else ""
    if lacking:
        notes.append(("data.decode", "cpu", f"not on the GPU: {lacking}"))
    on_gpu = config.decode == "cuda" and not lacking
    for part in (0, 1):
        store: Store = decode_cuda.GpuFiles(readers, part, device) if on_gpu else Files(readers, part)
        small = size <= CACHE_SIZE and (len(train) + len(test)) * 3 * size**2 <= CACHE_BYTES
        if small and not views.preset.resized:  # with the same pixels as when streamed: only the speed differs
            store = _kept(readers.decoded(part, cores()), views, device)
        stores.append(store)
    if any(isinstance(store, Files) for store in stores):
        if config.readers == "auto":
            why = "AutoAugment is drawn there" if readers.kind == "processes" else "they decode faster than processes"
            notes.append(("data.readers", readers.kind, why))
        if config.workers is None:
            notes.append(("data.workers", readers.workers, f"{readers.kind} decoding files, on {cores()} cores"))
    whole = Split(stores[0], torch.from_numpy(train.labels))
    wnids = train.classes if all(re.fullmatch(r"n\d{8}", c) for c in train.classes) else None
    mean, std = IMAGENET_MOMENTS if wnids else moments(whole, SAMPLE)
    classes = _described(wnids) if wnids else train.classes
    rest, held = _divide(config, whole, None, classes)
    tested = Split(stores[1], torch.from_numpy(test.labels))
    return DataSet(
        name, classes, wnids, files.hash, mean, std, pair(size), augment, rest, tested, held, views.slots, notes, skipped,
        f"{files.pixels}{' on cuda' if on_gpu else ''}",
    )  # fmt: skip


def _readers(config: DataConfig, parts: tuple[Part, ...], views: Views) -> Readers:
    """Threads, unless AutoAugment, whose generator threads would share, is to be drawn outside this process."""
    kind = ("processes" if views.preset.auto else "threads") if config.readers == "auto" else config.readers
    return Readers(parts, views, kind, min(cores(), 8) if config.workers is None else config.workers)


def _described(wnids: list[str]) -> list[str]:
    """Words for WordNet ids, the first lemma where it is enough to tell them apart."""
    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    full = [info.label_name_to_description(wnid) if wnid in known else wnid for wnid in wnids]
    short = [text.split(",")[0] for text in full]
    words = [a if short.count(a) == 1 else b for a, b in zip(short, full, strict=True)]
    return [w if words.count(w) == 1 else f"{w} ({wnid})" for w, wnid in zip(words, wnids, strict=True)]
