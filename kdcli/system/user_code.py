"""Names, files and digests of the user's own code (`file.py:Class`), and where in it an error arose.

Nothing here runs the file.
"""

import hashlib
from pathlib import Path

from kdcli.errors import RecipeError, did_you_mean

PRIVATE = "kdcli_own_"  # prefix of the module names under which such files run, so that they cannot hide another module


def named(name: str) -> bool:
    """Whether a method's name means a class in a file, and not a built-in method."""
    return ":" in name or name.endswith(".py")


def label(name: str) -> str:
    """The short name of a method, safe in folders, tables and checkpoints: the class's name."""
    return name.rpartition(":")[2] if ":" in name else name.removesuffix(".py")


def resolve(name: str, folder: Path | None = None) -> str:
    """The name with its file's absolute path, looked up in `folder` (the recipe's), then in the current directory.

    Unchanged if there is no such file.
    """
    path, colon, cls = name.rpartition(":")
    if not named(name) or not colon:
        return name
    candidates = [Path(path).expanduser()]
    if folder is not None:
        candidates.insert(0, folder / candidates[0])
    return next((f"{file.resolve()}:{cls}" for file in candidates if file.is_file()), name)


def file_of(name: str) -> Path:
    """The file of `file.py:Class`. Raises RecipeError if the name has no class or the file does not exist."""
    path, _, cls = name.rpartition(":")
    if name.endswith(".py") or not cls.isidentifier():
        raise RecipeError(f"method.name: {name} names no class", hint=f"For example {path or name}:Mine.")
    file = Path(path).expanduser()
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else Path()
        files = [one.name for one in sorted(folder.glob("*.py"))]
        hint = did_you_mean(file.name, files) or "Paths are relative to the recipe's folder, then to the current one."
        raise RecipeError(f"method.name: there is no file {path} (for {name})", hint=hint)
    return file


def digest(name: str) -> str:
    """sha256 of the file."""
    return hashlib.sha256(read(file_of(name))).hexdigest()


def read(path: Path) -> bytes:
    """The file's content. Raises RecipeError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", hint="Check the file's permissions.") from None


def blame(error: BaseException) -> str:
    """`my_file.py, line 12, in loss: ` if the error arose in the user's code or in what it called; else empty."""
    where, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if str(trace.tb_frame.f_globals.get("__name__", "")).startswith(PRIVATE):
            within = "" if code.co_name == "<module>" else f", in {code.co_name}"
            where = f"{Path(code.co_filename).name}, line {trace.tb_lineno}{within}: "
        trace = trace.tb_next
    return where


def words(error: BaseException) -> str:
    """An error in one line, with the place in the user's code where it arose."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{blame(error)}{type(error).__name__}{f': {text}' if text else ''}"
