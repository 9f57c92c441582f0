"""Exported files: every format in one dictionary, by the suffix of its files. Importing this imports no torch."""

from pathlib import Path
from typing import Any

from kdcli.errors import RecipeError, WeightsError, did_you_mean
from kdcli.export.base import Exported, Format, Runtime


def _write_onnx(*args: Any, **options: Any) -> Exported:
    from kdcli.export.onnx import export_onnx

    return export_onnx(*args, **options)


def _open_onnx(path: Path, **options: Any) -> Runtime:
    from kdcli.export.runtime import OnnxModel

    return OnnxModel(path, **options)


FORMATS: dict[str, Format] = {".onnx": Format("onnx", _write_onnx, _open_onnx)}
"""Suffix -> format. A new format is one line here and the two functions it names; the first one is the default."""


def suffix_of(name: str | None) -> str:
    """The suffix of the format called `name` (None: the default). Raises RecipeError when there is none."""
    suffixes = {kind.name: suffix for suffix, kind in FORMATS.items()}
    if name is None:
        return next(iter(FORMATS))
    if name not in suffixes:
        raise RecipeError(f"no export format is called {name!r}", hint=did_you_mean(name, suffixes))
    return suffixes[name]


def is_exported(name: str | Path) -> bool:
    """Whether a name has the suffix of an exported file; the file need not exist."""
    return Path(name).suffix in FORMATS


def format_of(path: Path) -> Format:
    """The format of a file by its suffix. Raises WeightsError (exit 3) for a suffix that no format has."""
    if not is_exported(path):
        raise WeightsError(
            f"{path}: not the name of an exported file, which ends in {' or '.join(FORMATS)}",
            hint="`kdcli export` writes one.",
        )
    return FORMATS[path.suffix]


def open_file(path: str | Path, *, threads: int | None = None) -> Runtime:
    """An exported file as a model. `threads`: of one operator, default as many as torch uses.

    Raises WeightsError (exit 3) for a file that is missing, broken or of no known format.
    """
    path = Path(path)
    return format_of(path).open(path, threads=threads)


def student_file(folder: Path) -> Path:
    """The exported student in a run's folder: the first one that exists, else where the default format is written."""
    paths = [folder / f"student{suffix}" for suffix in FORMATS]
    return next((path for path in paths if path.is_file()), paths[0])


__all__ = [
    "FORMATS", "Exported", "Format", "Runtime", "format_of", "is_exported", "open_file", "student_file", "suffix_of",
]  # fmt: skip
