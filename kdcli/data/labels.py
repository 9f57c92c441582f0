"""`labels.csv` in a folder of images: several classes an image, checked line by line."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kdcli.errors import DataError

NAME = "labels.csv"
FILE, LABELS = ("file", "image", "filename", "path"), ("labels", "label", "classes", "tags")
LAYOUT = (
    f"{NAME} begins with the line `file,labels`; each further line names an image as a path from {NAME}'s folder, then "
    "its labels separated by ; (none: an empty cell)."
)


@dataclass
class Row:
    """One image's line."""

    line: int
    labels: list[str]  # sorted, each once


def present(folder: Path) -> bool:
    """Whether the folder has a labels.csv whose first line names a column of files and one of labels."""
    try:
        with open(folder / NAME, "rb") as file:
            first = file.readline(10_000).decode("utf-8-sig", errors="replace")
        header = [cell.strip().lower() for cell in next(csv.reader([first]), [])]
    except (OSError, csv.Error):
        return False
    return any(name in header for name in FILE) and any(name in header for name in LABELS)


def read(path: Path) -> dict[str, Row]:
    """Each image's row by its path relative to the file's folder, with / between folders.

    Raises DataError with the line number for a row that cannot be meant.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", hint=LAYOUT) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8", hint="Save it as UTF-8.") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    out: dict[str, Row] = {}
    try:
        header = next(reader, [])
        at_file, at_labels = (_column(path, header, names) for names in (FILE, LABELS))
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"{path}, line {reader.line_num}"
            if len(cells) != len(header):
                raise DataError(f"{where}: {len(cells)} cells, and the first line has {len(header)}", hint=LAYOUT)
            name = str(PurePosixPath(cells[at_file].strip().replace("\\", "/")))
            if name == ".":
                raise DataError(f"{where}: no file is named", hint=LAYOUT)
            if name in out:
                raise DataError(
                    f"{where}: {name} was already on line {out[name].line}",
                    hint="One line an image; several labels are separated by ; in one cell.",
                )
            labels = {label.strip() for label in cells[at_labels].split(";")} - {""}
            out[name] = Row(reader.line_num, sorted(labels))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}", hint=LAYOUT) from None
    if not out:
        raise DataError(f"{path}: no image is listed", hint=LAYOUT)
    return out


def _column(path: Path, header: list[str], names: tuple[str, ...]) -> int:
    found = [n for n, cell in enumerate(header) if cell.strip().lower() in names]
    if len(found) != 1:
        what = f"{len(found)} columns" if found else "no column"
        raise DataError(
            f"{path}, line 1: {what} called {', '.join(names[:-1])} or {names[-1]}; it has {', '.join(header)}",
            hint=LAYOUT,
        )
    return found[0]
