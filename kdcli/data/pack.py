"""`pack:FILE`: a folder's images in one memory-mapped file, as JPEGs with a short side of at most a given size.

The file is an uncompressed zip: `images` (the JPEGs one after another), `offsets.npy` [N+1] int64, `labels.npy` ([N]
int64, or [N, K] uint8 0/1), `names.npy` [N] bytes (the files' relative names) and `facts.json`; the first `train`
images are the training set, the others the test set. Writer and reader are in one file, since they share the format.
"""

import hashlib
import io
import json
import os
import shutil
import struct
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdcli.data import folder
from kdcli.data.decode import corrupt, reason
from kdcli.data.folder import Listing
from kdcli.data.parts import Listed, Part
from kdcli.data.sources import Notes, find, parse, row
from kdcli.data.split import check_classes
from kdcli.data.workers import cores
from kdcli.errors import DataError, RecipeError
from kdcli.recipe import DataConfig
from kdcli.system.files import write_atomic

FORMAT = "kdcli pack 2"
ENDING = ".pack"
SAMPLE = 64  # images that the size of a pack is estimated from
MARGIN = 1.05  # free disk space needed, relative to the estimate
CURE = "Pack it again: kdcli data pack --data folder:DIR."


# --- reading ----------------------------------------------------------------------------------------------------------


class Mapped:
    """The images' bytes of a pack, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size
        with zipfile.ZipFile(path) as file, path.open("rb") as raw:
            entry = file.getinfo("images")
            raw.seek(entry.header_offset + 26)  # the local header is 30 bytes, a name and extra fields; their lengths:
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", raw.read(4)))
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its images are compressed")
        # copy-on-write: nothing is written, but torch warns about read-only arrays
        self.bytes: np.ndarray = np.memmap(path, np.uint8, "c", start, (entry.file_size,))

    def __getitem__(self, where: slice) -> np.ndarray:
        if os.stat(self.path).st_size != self.size:  # reading past the end of a mapped file ends the process
            raise OSError(0, "the pack was truncated or overwritten after it was opened")
        return self.bytes[where]


@dataclass
class Packed:
    """The images of one part of a pack."""

    classes: list[str]
    labels: np.ndarray  # [N] int64 class numbers, or [N, K] uint8 0/1
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
    """A pack's description: format, kind, source, classes, hash, pixels, size, quality, train, test (counts), created.

    Raises DataError when it is not there, not a pack, or of another version.
    """
    try:
        with path.open("rb") as file:
            if file.read(9)[8:] == b"{":
                raise DataError(f"{path} is a pack of an older kdcli, which this one does not read", hint=CURE)
        with zipfile.ZipFile(path) as file:
            found = json.loads(file.read("facts.json"))
        if found["format"] != FORMAT:
            raise DataError(f"{path}: its format is {found['format']!r}, not {FORMAT!r}", hint=CURE)
        return found
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}", hint="pack:FILE is looked for here and in the data root."
        ) from None
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError):
        raise DataError(f"{path} is not a kdcli pack, or a truncated one", hint=CURE) from None


def load(path: Path) -> tuple[Packed, Packed, dict[str, Any]]:
    """A pack's training and test images, only its index in memory, and its facts.

    Raises DataError for a file that is not there, not a pack, or damaged.
    """
    about = facts(path)
    try:
        with zipfile.ZipFile(path) as file:
            offsets, labels, names = (
                np.load(io.BytesIO(file.read(f"{name}.npy")), allow_pickle=False)
                for name in ("offsets", "labels", "names")
            )
        mapped = Mapped(path)
        count, cut = about["train"] + about["test"], about["train"]
        if not len(names) == len(labels) == len(offsets) - 1 == count or not 0 < cut < count:
            raise ValueError(f"it describes {count} images and lists {len(labels)}")
        if (np.diff(offsets) <= 0).any() or offsets[0] != 0 or offsets[-1] > len(mapped.bytes):
            raise ValueError("its images overlap or lie outside the file")
        most = len(about["classes"]) - 1 if labels.ndim == 1 else 1
        if labels.min() < 0 or labels.max() > most or labels.shape[1:] not in ((), (len(about["classes"]),)):
            raise ValueError("a label is outside its classes")
    except (zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is a damaged pack: {error}", hint=CURE) from None
    whole = Packed(about["classes"], labels, names, offsets[:-1], offsets[1:], mapped)
    rows = np.arange(count)
    return whole.keep(rows[:cut]), whole.keep(rows[cut:]), about


def read(config: DataConfig, notes: Notes) -> Listed:
    """A pack's images. They were checked when packed, so they are decoded here only if some may be left out."""
    path = find(config.root, parse(config.name)[1])
    train, test, about = load(path)
    notes.append(("data.name", str(path), f"packed from {about['source']}, short side at most {about['size']} pixels"))
    notes.append(("data.hash", about["hash"][:12], "of the files it was packed from: mentors trained on those fit"))
    skipped: list[str] = []
    if config.skip_corrupt:
        train, test = (folder.sound(part, True, cores(), skipped) for part in (train, test))
    check_classes(train.labels, train.classes, str(path))
    return Listed(train, test, about["hash"], about["pixels"], skipped)


def rows(kind: str, root: Path) -> list[dict[str, Any]]:
    """Counts from the packs' facts; a file that is not a pack is listed without them."""
    return [_row(path) for path in sorted(root.glob(f"*{ENDING}")) if path.is_file()]


def _row(path: Path) -> dict[str, Any]:
    try:
        about = facts(path)
    except DataError:
        return row(f"pack:{path.name}", path, None, None, False)
    return row(f"pack:{path.name}", path, about["train"] + about["test"], len(about["classes"]))


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass
class Written:
    """The result of packing."""

    path: Path
    images: int
    copied: int  # JPEGs that were small enough, byte for byte
    before: int  # bytes of the files
    after: int  # bytes of the pack
    skipped: list[str]


@dataclass
class Encoded:
    """One image as it is packed, or why it cannot be."""

    data: bytes
    before: int = 0  # bytes
    copied: bool = False
    broken: str = ""


def encoded(part: Part, row: int, size: int, quality: int) -> Encoded:
    """An image as a JPEG with a short side of at most `size`; a JPEG that is no larger is copied."""
    try:
        data = part.read(row)
        with Image.open(io.BytesIO(data.data)) as image:
            short, jpeg = min(image.size), image.format in ("JPEG", "MPO")  # MPO: a JPEG with further images after it
            if jpeg and short <= size:
                image.draft(image.mode, (1, 1))
                image.load()  # to its end: packed images are known to decode
                return Encoded(data.tobytes(), len(data), copied=True)
            wide, high = (side * min(short, size) // short for side in image.size)
            image.draft(image.mode, (2 * wide, 2 * high))  # a large JPEG is decoded at a fraction of its size
            plain = image if image.mode == "L" else image.convert("RGB")
            out = io.BytesIO()
            plain.resize((wide, high), Image.Resampling.BICUBIC).save(out, "JPEG", quality=quality)
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
    """Pack both parts into one file, complete or not at all. `track` wraps the images' numbers, for a progress bar.

    `facts` holds the folder's kind, source and hash, which the pack keeps, so that mentors trained on the folder are
    found for the pack; `pixels`, a hash of the packed bytes, is added.

    Raises RecipeError when the file exists, DataError when an image does not decode (unless `skip`), a class loses all
    its training images, or the disk has too little space.
    """
    if path.exists():
        raise RecipeError(f"{path} exists", hint="Choose another --file, or remove it first.")
    for torn in path.parent.glob(f".{path.name}.*.tmp"):  # left by a process that was killed while writing
        torn.unlink(missing_ok=True)
    done = Written(path, 0, 0, int(train.sizes.sum() + test.sizes.sum()), 0, [])
    count, cut = len(train) + len(test), len(train)

    def place(n: int) -> tuple[Listing, int]:
        return (train, n) if n < cut else (test, n - cut)

    def work(n: int) -> Encoded:
        return encoded(*place(n), size, quality)

    def fill(temporary: Path) -> None:
        kept, ends, digest = [], [0], hashlib.sha256()
        with zipfile.ZipFile(temporary, "w") as file, ThreadPoolExecutor(threads) as pool:
            _check_space(path, list(pool.map(work, range(0, count, -(-count // SAMPLE)))), count)
            with file.open("images", "w", force_zip64=True) as images:
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
                    images.write(image.data)
            labels = np.concatenate([train.labels, test.labels])[kept]
            trains = sum(n < cut for n in kept)
            check_classes(labels[:trains], train.classes, f"{path}, {len(done.skipped)} corrupt files left out")
            offsets = np.array(ends, np.int64)
            for array in (labels, offsets):
                digest.update(array.astype("<i8").tobytes())
            names = np.concatenate([train.files, test.files])[kept]
            for name, array in (("offsets", offsets), ("labels", labels), ("names", names)):
                with file.open(f"{name}.npy", "w") as out:
                    np.lib.format.write_array(out, array, allow_pickle=False)
            about = {
                "format": FORMAT, **facts, "size": size, "quality": quality, "pixels": digest.hexdigest(),
                "classes": train.classes, "train": trains, "test": len(kept) - trains,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }  # fmt: skip
            file.writestr("facts.json", json.dumps(about))
        done.images, done.after = len(kept), temporary.stat().st_size

    write_atomic(path, fill)
    return done


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[int], Encoded], numbers: Iterable[int], most: int
) -> Iterator[Encoded]:
    """`pool.map` with at most `most` images pending: all of ImageNet's would not fit in memory."""
    waiting: deque[Future[Encoded]] = deque()
    for number in numbers:
        waiting.append(pool.submit(work, number))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _check_space(path: Path, some: list[Encoded], count: int) -> None:
    """Raise DataError when a pack of `count` images like these would not fit on the disk."""
    need = MARGIN * count * sum(len(one.data) for one in some) / len(some)
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise DataError(
            f"{path} would take about {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free there",
            hint="Free some space, name another place with --file, or pack smaller: --size 224, --quality 80.",
        )
