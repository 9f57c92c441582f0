"""A user's own method: a class in a Python file, named `file.py:Class`. Nothing of a file runs until it is named so."""

import hashlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from kdcli.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from kdcli.methods import Method

PRIVATE = "kdcli_own_"  # what such a module's name begins with, so that no other can be called the same


def named(name: str) -> bool:
    """Whether a method's name is a file's class, and none of kdcli's own."""
    return ":" in name or name.endswith(".py")


def label(name: str) -> str:
    """A method's name where it has to be short and safe: in folders, in tables, in checkpoints."""
    return name.rpartition(":")[2] if ":" in name else name.removesuffix(".py")


def resolve(name: str, folder: Path | None = None) -> str:
    """The name with its file's whole path, looked for in `folder` (a recipe's), then here; else as it is."""
    path, colon, cls = name.rpartition(":")
    if not named(name) or not colon:
        return name
    tries = [Path(path).expanduser()]
    if folder is not None:
        tries.insert(0, folder / tries[0])
    return next((f"{one.resolve()}:{cls}" for one in tries if one.is_file()), name)


def file_of(name: str) -> Path:
    """The file of an own method. Raises RecipeError where it names no class, or a file that is not there."""
    path, _, cls = name.rpartition(":")
    if name.endswith(".py") or not cls.isidentifier():
        raise RecipeError(f"method.name: {name} says no class", hint=f"{path or name}:Mine, for example.")
    file = Path(path).expanduser()
    if not file.is_file():
        where = file.parent if file.parent.is_dir() else Path()
        there = [one.name for one in sorted(where.glob("*.py"))]
        hint = did_you_mean(file.name, there) or "A path is taken from the recipe's folder, then from where you are."
        raise RecipeError(f"method.name: there is no file {path} (for {name})", hint=hint)
    return file


def digest(name: str) -> str:
    """sha256 of an own method's file."""
    return hashlib.sha256(_bytes(file_of(name))).hexdigest()


def load(name: str) -> "type[Method]":
    """The class, its file run under a private module name (once, as long as its content is the same).

    Raises RecipeError for what cannot be read, run, or found in it, or is no method.
    """
    from kdcli.methods.base import Method

    path, cls = file_of(name), name.rpartition(":")[2]
    module = _run(path)
    own = [
        key
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    found = getattr(module, cls, None)
    if found is None:
        hint = did_you_mean(cls, own) if own else "It has no class that is a kdcli.methods.Method."
        raise RecipeError(f"method.name: {path.name} has no class {cls}", hint=hint)
    if not (isinstance(found, type) and issubclass(found, Method)):
        methods = f" The methods of {path.name}: {', '.join(own)}." if own else ""
        raise RecipeError(
            f"method.name: {path.name}: {cls} is no method", hint=f"class {cls}(kdcli.methods.Method): ...{methods}"
        )
    if found.loss is Method.loss:
        raise RecipeError(f"method.name: {path.name}: {cls} defines no loss", hint="def loss(self, lesson, phase): ...")
    return found


def blame(error: BaseException) -> str:
    """`my_file.py, line 12, in loss: ` when an error arose in an own method, or in what it called; else nothing."""
    said, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if str(trace.tb_frame.f_globals.get("__name__", "")).startswith(PRIVATE):
            within = "" if code.co_name == "<module>" else f", in {code.co_name}"
            said = f"{Path(code.co_filename).name}, line {trace.tb_lineno}{within}: "
        trace = trace.tb_next
    return said


def words(error: BaseException) -> str:
    """An error in one line, with where in an own method it arose."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{blame(error)}{type(error).__name__}{f': {text}' if text else ''}"


def _run(path: Path) -> ModuleType:
    source = _bytes(path)
    name = PRIVATE + hashlib.sha256(source).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    try:
        code = compile(source, str(path), "exec")
    except SyntaxError as error:
        line = f": {error.text.strip()}" if error.text else ""
        raise RecipeError(f"{path.name}, line {error.lineno}: {error.msg}{line}", hint="Put it right.") from None
    except ValueError as error:  # a file with null bytes
        raise RecipeError(f"{path.name} is not Python: {error}") from None
    sys.modules[name] = module  # before it runs: dataclasses and type hints look their module up
    try:
        exec(code, vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(
            f"{path.name} cannot be loaded: {words(error)}", hint=f"`python {path}` shows the whole traceback."
        ) from None
    return module


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", hint="Check the file's permissions.") from None
