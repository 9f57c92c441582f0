"""Folders of image files: listed, checked, decoded by worker processes; which process draws a view changes nothing.

A file's plain image is RGB, resized and centre-cropped to a square (`fit`). Every preset starts from it but `imagenet`,
which crops the file itself; so a small set is decoded once and lives in memory, with the same pixels as when streamed.
"""

import hashlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as tvf

from kdcli.data.base import Device, as_float, moved
from kdcli.data.views import PLAIN, Views, resized_crop
from kdcli.errors import DataError

EVAL_RATIO = 256 / 224  # the imagenet preset's test images: short side resized to 256, centre 224 kept


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

    def path(self, row: int) -> Path:
        return self.root / os.fsdecode(bytes(self.files[row]))

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


def broken(files: Listing, threads: int) -> list[tuple[int, str]]:
    """(row, why) of every file that does not decode to its end."""

    def why(row: int) -> str | None:
        try:
            with Image.open(files.path(row)) as image:
                image.draft(image.mode, (1, 1))  # a JPEG at an eighth of its size: read to its end, at less cost
                image.load()
        except Exception as error:
            return _reason(error)
        return None

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        return [(row, text) for row, text in enumerate(pool.map(why, range(len(files)))) if text is not None]


def _reason(error: Exception) -> str:
    return "not an image" if "cannot identify" in str(error) else f"{type(error).__name__}: {error}"


def corrupt(found: list[str]) -> DataError:
    """The refusal that names up to five files that do not decode and counts the rest."""
    more = f"\n  and {len(found) - 5} more" if len(found) > 5 else ""
    lines = "".join(f"\n  {text}" for text in found[:5])
    count = f"{len(found)} image file{'s do' if len(found) > 1 else ' does'} not decode"
    return DataError(
        f"{count}:{lines}{more}",
        hint="Replace or remove them, or leave them out: --skip-corrupt (data.skip_corrupt = true).",
    )


def fit(image: Image.Image, size: int, ratio: float) -> Image.Image:
    """Short side resized to size * ratio, the centre square of `size` kept."""
    short = round(size * ratio)
    return tvf.center_crop(tvf.resize(image, [short], antialias=True), [size, size])  # pyright: ignore[reportArgumentType, reportReturnType]


Request = tuple[int, list[int], list[int]]  # part, rows in it, their views
Answer = tuple[np.ndarray, list[str]]  # uint8 pixels [B,3,S,S], and the files that did not decode


class Decoder(Dataset):
    """Answers requests, in whatever process it is called."""

    def __init__(self, parts: tuple[Listing, ...], views: Views) -> None:
        self.parts, self.views = parts, views

    def __getitem__(self, request: Request) -> Answer:
        part, rows, views = request
        files, size = self.parts[part], self.views.size
        out = np.zeros((len(rows), 3, size, size), dtype=np.uint8)
        errors = []
        for n, (row, view) in enumerate(zip(rows, views, strict=True)):
            try:
                with Image.open(files.path(row)) as image:
                    out[n] = self._draw(image.convert("RGB"), view)
            except Exception as error:
                errors.append(f"{files.path(row)} ({_reason(error)})")
        return out, errors

    def _draw(self, image: Image.Image, view: int) -> np.ndarray:
        resized = self.views.preset.resized
        if resized and view >= 0:
            return np.asarray(resized_crop(image, view, self.views.size)).transpose(2, 0, 1)
        plain = np.asarray(fit(image, self.views.size, EVAL_RATIO if resized else 1.0)).transpose(2, 0, 1)
        if view < 0:
            return plain
        return self.views.apply(torch.from_numpy(plain.copy())[None], torch.tensor([view]))[0].numpy()


class Requests(Sampler[Request]):
    """What the workers are to do next, set anew before each pass: they outlive it."""

    def __init__(self) -> None:
        self.part, self.index, self.view, self.size = 0, torch.empty(0), torch.empty(0), 1

    def ask(self, part: int, index: Tensor, view: Tensor, size: int) -> "Requests":
        self.part, self.index, self.view, self.size = part, index.cpu(), view.cpu(), size
        return self

    def __iter__(self) -> Iterator[Request]:
        for rows, views in zip(self.index.split(self.size), self.view.split(self.size), strict=True):
            yield self.part, rows.tolist(), views.tolist()


def _same(answer: Any) -> Any:
    return (
        answer  # arrays travel through the pipe: shared memory is 64 MB in a container, and a bus error explains little
    )


def _start(_: int) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the main process's to answer: it saves, then ends its workers


class Pool:
    """`workers` processes (0: this one) that decode the files of all parts; started at the first need, then kept."""

    def __init__(self, parts: tuple[Listing, ...], views: Views, workers: int) -> None:
        self.views, self.workers = views, workers
        self._decode = Decoder(parts, views)
        self._requests = Requests()
        self._loader = self._make(self._requests)
        self._busy = False

    def _make(self, requests: Requests, keep: bool = True) -> DataLoader:
        return DataLoader(
            self._decode,
            batch_size=None,
            sampler=requests,
            num_workers=self.workers,
            persistent_workers=keep and self.workers > 0,
            collate_fn=_same,
            worker_init_fn=_start,
            generator=torch.Generator(),  # else every pass draws a number from the global generator
        )

    def batches(self, part: int, index: Tensor, view: Tensor, size: int, device: Device) -> Iterator[Tensor]:
        """Raises DataError naming files that do not decode, and when a worker was killed."""
        if len(index) <= size:  # one batch is not worth waking the workers
            yield _checked(self._decode[part, index.tolist(), view.tolist()], device)
        elif self._busy:  # with another pass that is not over
            for answer in self._answers(self._make(Requests().ask(part, index, view, size), keep=False)):
                yield _checked(answer, device)
        else:
            self._busy = True
            self._requests.ask(part, index, view, size)
            try:
                for answer in self._answers(self._loader):
                    yield _checked(answer, device)
            finally:
                self._busy = False

    def _answers(self, loader: DataLoader) -> Iterator[Answer]:
        try:
            yield from loader
        except RuntimeError as error:
            self._loader = self._make(self._requests)
            raise DataError(
                f"a worker process that decodes images ended ({str(error).splitlines()[0]})",
                hint="Mostly a lack of memory: --set data.workers=2, or 0 to decode in the main process.",
            ) from error

    def decoded(self, part: int, threads: int) -> Tensor:
        """Every plain image of a part [N,3,S,S] uint8. Raises DataError naming all files that do not decode."""
        count, size = len(self._decode.parts[part]), self.views.size
        out = np.empty((count, 3, size, size), dtype=np.uint8)
        errors: list[str] = []

        def one(row: int) -> None:
            pixels, wrong = self._decode[part, [row], [PLAIN]]
            out[row] = pixels[0]
            errors.extend(wrong)

        with ThreadPoolExecutor(max(threads, 1)) as pool:
            list(pool.map(one, range(count)))
        if errors:
            raise corrupt(sorted(errors))
        return torch.from_numpy(out)


class Files:
    """A store: one part of a pool's files, decoded when asked for."""

    def __init__(self, pool: Pool, part: int) -> None:
        self.pool, self.part, self.views = pool, part, pool.views

    def batches(self, index: Tensor, view: Tensor, size: int, device: Device) -> Iterator[Tensor]:
        return self.pool.batches(self.part, index, view, size, device)


def _checked(answer: Answer, device: Device) -> Tensor:
    pixels, errors = answer
    if errors:
        raise corrupt(errors)
    return as_float(moved(torch.from_numpy(pixels), device))
