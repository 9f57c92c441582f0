"""The options of a method are its annotated class fields: collected, documented and validated here.

tau: Temperature = 4.0
\"\"\"Temperature of the teacher and the student.\"\"\"
"""

import ast
import inspect
import textwrap
import types
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo

from kdcli.errors import RecipeError, did_you_mean

BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Option:
    """One option of a method."""

    name: str
    type: Any  # the annotation, bounds included
    default: Any
    doc: str  # what the option does, in one line

    @property
    def words(self) -> str:
        """The type as a table shows it: `float > 0`, `'sum' or 'mean'`."""
        return _words(self.type)


@cache
def collect(cls: type, root: type) -> dict[str, Option]:
    """The options of `cls`, a subclass of `root`: fields with an annotation and a default, base classes first.

    A subclass may give an option another default; without a docstring of its own the field keeps the inherited one.
    ClassVars, names with a leading underscore and what `root` itself declares are not options. Raises RecipeError for
    an annotation that cannot be evaluated, and for a name that `root` uses for something else.
    """
    found: dict[str, Option] = {}
    for base in reversed([one for one in cls.__mro__ if one not in root.__mro__]):
        try:
            annotations = inspect.get_annotations(base, eval_str=True)
        except NameError as error:
            raise RecipeError(f"{cls.__name__}: the annotations of its options cannot be read: {error}") from None
        known = docs(base)
        for name, kind in annotations.items():
            if name.startswith("_") or name not in vars(base) or name in root.__annotations__ or _class_var(kind):
                continue
            if hasattr(root, name):
                raise RecipeError(
                    f"{cls.__name__}: an option cannot be called {name}: every method has an attribute of that name",
                    hint="Rename the field.",
                )
            doc = known.get(name) or (found[name].doc if name in found else "")
            found[name] = Option(name, kind, vars(base)[name], doc)
    return found


def docs(cls: type) -> dict[str, str]:
    """Name -> the string literal below it in a class's body, on one line; empty where there is no source file."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found: dict[str, str] = {}
    for field, text in pairwise(body):
        targets = [field.target] if isinstance(field, ast.AnnAssign) else getattr(field, "targets", [None])
        target = targets[0]
        if isinstance(target, ast.Name) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[target.id] = " ".join(str(text.value.value).split())
    return found


def validated(label: str, options: dict[str, Option], given: dict[str, Any], where: str) -> dict[str, Any]:
    """The value of every option, given or default, checked against its annotation.

    label: the method as an error calls it. where: what stands before `.KEY` in an error, `recipe.toml: method`.
    Raises RecipeError for an unknown option, with the nearest name, and for a value that its type does not allow.
    """
    for key in given:
        if key not in options:
            hint = did_you_mean(key, options) or f"Its options: {', '.join(options) or 'none'}."
            raise RecipeError(f"{where}.{key}: {label} has no such option", hint=hint)
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    fields: dict[str, Any] = {one.name: (one.type, one.default) for one in options.values()}
    try:
        checked = create_model("Options", __config__=config, **fields).model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{where}.{key}: {first['msg']} (given {first['input']!r})") from None
    return {key: getattr(checked, key) for key in options}


def check_constructor(cls: type, label: str, options: dict[str, Option]) -> None:
    """Raise RecipeError unless `__init__` takes options as `**options`: they are declared as fields."""
    given = list(inspect.signature(cls.__init__).parameters.values())[1:]
    named = [one for one in given if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    if named:
        forms = "; ".join(str(one.replace(kind=one.KEYWORD_ONLY)) for one in named)
        raise RecipeError(
            f"method {label}: __init__ has parameters of its own ({', '.join(one.name for one in named)}); options are "
            "annotated class fields",
            hint=f"In the class: {forms}\n(a docstring beneath each). What depends on them goes into "
            "def __init__(self, **options): super().__init__(**options); ...",
        )
    if options and not any(one.kind is one.VAR_KEYWORD for one in given):
        raise RecipeError(
            f"method {label}: __init__ does not take its options ({', '.join(options)})",
            hint="def __init__(self, **options): super().__init__(**options); ...",
        )


def _class_var(kind: Any) -> bool:
    return kind is ClassVar or get_origin(kind) is ClassVar


def _words(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [
            f"{sign} {getattr(bound, key)}"
            for info in args[1:]
            for bound in (info.metadata if isinstance(info, FieldInfo) else [info])
            for key, sign in BOUNDS.items()
            if hasattr(bound, key)
        ]
        return " ".join([_words(args[0]), " and ".join(bounds)]).strip()
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join("none" if one is types.NoneType else _words(one) for one in args)
    if origin in (tuple, list):
        return f"list of {_words(args[0])}"
    return getattr(kind, "__name__", str(kind))
