"""A pack: a folder's images as one memory-mapped file of JPEGs, none with a short side above a given size.

The file is a safetensors file: `images` [bytes] uint8 (the JPEGs one after another), `offsets` [N+1] int64, `labels`
[N] int64, `names` (the files' relative names, NUL between them, uint8); the first `train` images train, the rest test.
"""

import hashlib
import io
import json
import os
import shutil
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from kdcli.data.decode import Part, corrupt, reason
from kdcli.data.folder import Listing
from kdcli.data.split import check_classes
from kdcli.errors import DataError, RecipeError
from kdcli.system.files import write_atomic

FORMAT = "kdcli pack 1"
ENDING = ".pack"
MOST_HEADER = 100 * 2**20  # what safetensors allows
SAMPLE = 64  # images the size of a pack is estimated from
MARGIN = 1.05  # of the estimate must be free
CURE = "Pack it again: kdcli data pack --data folder:DIR."


# --- reading ----------------------------------------------------------------------------------------------------------


class Mapped:
    """A pack's bytes, memory-mapped; to another process it travels as its path."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size
        with safe_open(path, framework="pt") as file:
            self.bytes: np.ndarray = file.get_tensor("images").numpy()

    def __reduce__(self) -> tuple[type["Mapped"], tuple[Path]]:
        return Mapped, (self.path,)

    def __getitem__(self, where: slice) -> np.ndarray:
        if os.stat(self.path).st_size != self.size:  # reading past the end of a mapped file ends the process
            raise OSError(0, "the pack was cut short or written over after it was opened")
        return self.bytes[where]


@dataclass
class Packed:
    """The images of one part of a pack."""

    classes: list[str]
    labels: np.ndarray  # [N] int64
    names: np.ndarray  # [N] bytes
    starts: np.ndarray  # [N] int64, where each image's bytes start
    ends: np.ndarray  # [N] int64
    file: Mapped

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, row: int) -> np.ndarray:
        return self.file[self.starts[row] : self.ends[row]]

    def where(self, row: int) -> str:
        return f"{self.file.path}: {os.fsdecode(bytes(self.names[row]))}"

    def keep(self, rows: np.ndarray) -> "Packed":
        labels, names, starts, ends = (x[rows] for x in (self.labels, self.names, self.starts, self.ends))
        return Packed(self.classes, labels, names, starts, ends, self.file)


def facts(path: Path) -> dict[str, Any]:
    """What a pack says of itself, from its first bytes: format, kind, source, classes, hash, pixels, size, train, ...

    Raises DataError when it is not there or no pack.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MOST_HEADER:
                raise ValueError("it does not begin as one")
            told = json.loads(file.read(length))["__metadata__"]
        if told["format"] != FORMAT:
            raise ValueError(f"its format is {told['format']!r}, not {FORMAT!r}")
        return {**told, "classes": json.loads(told["classes"]), "train": int(told["train"]), "test": int(told["test"])}
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}", hint="pack:FILE is looked for here and in the data root."
        ) from None
    except (struct.error, ValueError, KeyError, TypeError) as error:
        why = f": {error}" if type(error) is ValueError else ""
        raise DataError(f"{path} is no kdcli pack{why}", hint=CURE) from None


def read(path: Path) -> tuple[Packed, Packed, dict[str, Any]]:
    """A pack's training and test images, of which only the index is read, and its facts.

    Raises DataError for a file that is not there, is no pack, or is not whole.
    """
    told = facts(path)
    try:
        with safe_open(path, framework="np") as file:
            offsets, labels, names = (file.get_tensor(name) for name in ("offsets", "labels", "names"))
        file = Mapped(path)
        files = np.array(names.tobytes().split(b"\0"))
        count, cut = told["train"] + told["test"], told["train"]
        if not len(files) == len(labels) == len(offsets) - 1 == count or not 0 < cut < count:
            raise ValueError(f"it speaks of {count} images and lists {len(labels)}")
        if (np.diff(offsets) <= 0).any() or offsets[0] != 0 or offsets[-1] > len(file.bytes):
            raise ValueError("its images overlap or lie outside the file")
        if labels.min() < 0 or labels.max() >= len(told["classes"]):
            raise ValueError("a label is outside its classes")
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is a truncated or damaged pack: {error}", hint=CURE) from None
    whole = Packed(told["classes"], labels, files, offsets[:-1], offsets[1:], file)
    rows = np.arange(count)
    return whole.keep(rows[:cut]), whole.keep(rows[cut:]), told


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass
class Written:
    """What came of packing."""

    path: Path
    images: int
    copied: int  # JPEGs that were small enough, byte for byte
    before: int  # bytes of the files
    after: int  # bytes of the pack
    skipped: list[str]


@dataclass
class Encoded:
    """One image as it goes into the pack, or why it does not."""

    data: bytes
    before: int = 0  # bytes
    copied: bool = False
    broken: str = ""


def encoded(part: Part, row: int, size: int, quality: int) -> Encoded:
    """An image as a JPEG with a short side of at most `size`; a JPEG that has it already stays as it is."""
    try:
        data = part.read(row)
        with Image.open(io.BytesIO(data.data)) as image:
            short, jpeg = min(image.size), image.format in ("JPEG", "MPO")  # MPO: with more pictures behind the first
            if jpeg and short <= size:
                image.draft(image.mode, (1, 1))
                image.load()  # to its end: what is packed decodes
                return Encoded(data.tobytes(), len(data), copied=True)
            wide, high = (side * min(short, size) // short for side in image.size)
            image.draft(image.mode, (2 * wide, 2 * high))  # a large JPEG is decoded at a fraction of its size
            picture = image if image.mode == "L" else image.convert("RGB")
            out = io.BytesIO()
            picture.resize((wide, high), Image.Resampling.BICUBIC).save(out, "JPEG", quality=quality)
            return Encoded(out.getvalue(), len(data))
    except Exception as error:
        return Encoded(b"", broken=reason(error))


def write(
    path: Path,
    train: Listing,
    test: Listing,
    *,
    facts: dict[str, str],
    size: int,
    quality: int,
    skip: bool,
    threads: int,
    track: Callable[[range], Iterable[int]],
) -> Written:
    """Pack both parts into one file that appears whole or not at all. `track` is given the images' numbers to pass on.

    `facts` holds kind, source and hash: the folder's own, which the pack keeps, so that mentors trained on the folder
    are found for the pack; `pixels`, a hash of the packed bytes, is added.

    Raises RecipeError when the file exists, DataError when an image does not decode (unless `skip`), a class loses all
    its training images, or the disk has no room.
    """
    if path.exists():
        raise RecipeError(f"{path} exists", hint="Choose another --file, or remove it first.")
    for torn in path.parent.glob(f".{path.name}.*.tmp"):  # what a kill in the middle of writing left behind
        torn.unlink(missing_ok=True)
    done = Written(path, 0, 0, int(train.sizes.sum() + test.sizes.sum()), 0, [])
    count, cut = len(train) + len(test), len(train)

    def place(n: int) -> tuple[Listing, int]:
        return (train, n) if n < cut else (test, n - cut)

    def work(n: int) -> Encoded:
        return encoded(*place(n), size, quality)

    def fill(temporary: Path) -> None:
        told = {"format": FORMAT, **facts, "size": str(size), "quality": str(quality), "pixels": "0" * 64,
                "classes": json.dumps(train.classes), "train": str(cut), "test": str(count - cut),
                "created": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
        room = len(_header(told, 2**50, 2**50, 2**50))
        kept, ends, digest = [], [0], hashlib.sha256()
        with temporary.open("wb") as file, ThreadPoolExecutor(threads) as pool:
            _check_room(path, list(pool.map(work, range(0, count, -(-count // SAMPLE)))), count)
            file.write(b" " * room)
            for n, image in enumerate(_ahead(pool, work, track(range(count)), 4 * threads)):
                if image.broken:
                    part, row = place(n)
                    done.skipped.append(f"{part.where(row)} ({image.broken})")
                    if not skip:
                        raise corrupt(done.skipped)
                    continue
                kept.append(n)
                done.copied += image.copied
                ends.append(ends[-1] + len(image.data))
                digest.update(image.data)
                file.write(image.data)
            padding = -ends[-1] % 8  # the numbers that follow are read where they lie
            labels = np.concatenate([train.labels, test.labels])[kept]
            names = b"\0".join(np.concatenate([train.files, test.files])[kept].tolist())
            trains = sum(n < cut for n in kept)
            check_classes(labels[:trains], train.classes, f"{path}, {len(done.skipped)} corrupt files left out")
            for array in (labels, np.array(ends)):
                digest.update(array.astype("<i8").tobytes())
            file.write(b"\0" * padding + np.array(ends, "<i8").tobytes() + labels.astype("<i8").tobytes() + names)
            told |= {"pixels": digest.hexdigest(), "train": str(trains), "test": str(len(kept) - trains)}
            file.seek(0)
            file.write(_header(told, ends[-1] + padding, len(kept), len(names), room))
        done.images, done.after = len(kept), temporary.stat().st_size

    write_atomic(path, fill)
    return done


def _header(told: dict[str, str], data: int, count: int, names: int, room: int = 0) -> bytes:
    """A safetensors header in `room` bytes (0: as many as it takes): its length, then JSON on what lies where."""
    entries, at = {}, 0
    shapes = {"images": ("U8", data, 1), "offsets": ("I64", count + 1, 8), "labels": ("I64", count, 8)}
    for name, (dtype, length, width) in {**shapes, "names": ("U8", names, 1)}.items():
        entries[name] = {"dtype": dtype, "shape": [length], "data_offsets": [at, at + length * width]}
        at += length * width
    text = json.dumps({"__metadata__": told, **entries}).encode()
    text += b" " * (max(room - 8, len(text) + -len(text) % 8) - len(text))
    return struct.pack("<Q", len(text)) + text


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[int], Encoded], numbers: Iterable[int], most: int
) -> Iterator[Encoded]:
    """`pool.map` with at most so many at once: an ImageNet of pending images would fill the memory."""
    waiting: deque[Future[Encoded]] = deque()
    for number in numbers:
        waiting.append(pool.submit(work, number))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _check_room(path: Path, some: list[Encoded], count: int) -> None:
    """Raise DataError when a pack of `count` images like these would not fit on the disk."""
    need = MARGIN * count * sum(len(one.data) for one in some) / len(some)
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise DataError(
            f"{path} would take about {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free there",
            hint="Free some space, name another place with --file, or pack smaller: --size 224, --quality 80.",
        )
