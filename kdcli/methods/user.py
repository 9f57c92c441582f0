"""A user's own method: the class `my_file.py:Mine`. The file runs only when a method in it is named."""

import hashlib
import sys
from pathlib import Path
from types import ModuleType

from kdcli.errors import RecipeError, did_you_mean
from kdcli.methods.base import Method
from kdcli.system.user_code import PRIVATE, file_of, read, words


def load(name: str) -> type[Method]:
    """The class `file.py:Class`; the file runs once for each content, as a module with a private name.

    Raises RecipeError for a file that cannot be read or run, and for a class that is missing or is not a method.
    """
    path, cls = file_of(name), name.rpartition(":")[2]
    module = _run(path)
    classes = [
        key
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    found = getattr(module, cls, None)
    if found is None:
        hint = did_you_mean(cls, classes) if classes else "The file has no subclass of kdcli.methods.Method."
        raise RecipeError(f"method.name: {path.name} has no class {cls}", hint=hint)
    if not (isinstance(found, type) and issubclass(found, Method)):
        others = f" Methods in {path.name}: {', '.join(classes)}." if classes else ""
        raise RecipeError(
            f"method.name: {path.name}: {cls} is not a method", hint=f"class {cls}(kdcli.methods.Method): ...{others}"
        )
    if found.loss is Method.loss:
        raise RecipeError(f"method.name: {path.name}: {cls} defines no loss", hint="def loss(self, lesson, phase): ...")
    return found


def _run(path: Path) -> ModuleType:
    source = read(path)
    name = PRIVATE + hashlib.sha256(source).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    try:
        code = compile(source, str(path), "exec")
    except SyntaxError as error:
        line = f": {error.text.strip()}" if error.text else ""
        raise RecipeError(
            f"{path.name}, line {error.lineno}: {error.msg}{line}", hint="Fix the syntax error."
        ) from None
    except ValueError as error:  # null bytes
        raise RecipeError(f"{path.name} is not a Python file: {error}") from None
    sys.modules[name] = module  # before the file runs: dataclasses and type hints look up their module
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
