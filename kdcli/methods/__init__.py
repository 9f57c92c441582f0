"""Methods by name. One lazy dict is the whole registry."""

import importlib
import inspect
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from kdcli.errors import RecipeError, did_you_mean
from kdcli.methods.base import Lesson, Method, Phase, Room, Terms, View

METHODS = {
    "nokd": "kdcli.methods.plain:NoKD",
    "kd": "kdcli.methods.plain:KD",
    "aver": "kdcli.methods.plain:Aver",
    "classroom": "kdcli.methods.classroom:ClassroomKD",
    "tekap": "kdcli.methods.tekap:TeKAP",
    "disk": "kdcli.methods.disk:DiSK",
    "dkd": "kdcli.methods.logits:DKD",
    "nkd": "kdcli.methods.logits:NKD",
    "dist": "kdcli.methods.logits:DIST",
    "wsld": "kdcli.methods.logits:WSLD",
    "ctkd": "kdcli.methods.temperature:CTKD",
    "dtkd": "kdcli.methods.temperature:DTKD",
    "mlkd": "kdcli.methods.multilevel:MLKD",
    "fitnets": "kdcli.methods.maps:FitNets",
    "at": "kdcli.methods.maps:AT",
    "sp": "kdcli.methods.maps:SP",
    "nst": "kdcli.methods.maps:NST",
    "vid": "kdcli.methods.maps:VID",
    "smkd": "kdcli.methods.attention:SMKD",
    "semckd": "kdcli.methods.attention:SemCKD",
    "pkt": "kdcli.methods.relations:PKT",
    "rkd": "kdcli.methods.relations:RKD",
    "crd": "kdcli.methods.contrast:CRD",
    "ft": "kdcli.methods.stages:FT",
    "ab": "kdcli.methods.stages:AB",
    "srrl": "kdcli.methods.heads:SRRL",
    "simkd": "kdcli.methods.heads:SimKD",
    "ofa": "kdcli.methods.heads:OFA",
    "ebkd": "kdcli.methods.several:EBKD",
    "camkd": "kdcli.methods.several:CAMKD",
    "aekd": "kdcli.methods.several:AEKD",
    "takd": "kdcli.methods.assistants:TAKD",
    "dgkd": "kdcli.methods.assistants:DGKD",
    "dml": "kdcli.methods.online:DML",
    "one": "kdcli.methods.online:ONE",
    "okddip": "kdcli.methods.online:OKDDip",
    "ffl": "kdcli.methods.online:FFL",
    "shake": "kdcli.methods.shadow:SHAKE",
}

FEATURES = {"fitnets", "at", "sp", "nst", "vid", "smkd", "pkt", "rkd", "crd", "ft", "ab", "simkd"}
"""Methods that hear nothing of their mentors' logits."""

__all__ = ["METHODS", "Lesson", "Method", "Phase", "Room", "Terms", "View", "build", "find", "in_force", "options"]


def find(name: str) -> type[Method]:
    """The class of a method. Raises RecipeError with the nearest name."""
    if name not in METHODS:
        raise RecipeError(f"method.name: no method called {name!r}", hint=did_you_mean(name, METHODS))
    module, _, cls = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def options(name: str) -> dict[str, inspect.Parameter]:
    """A method's options: its constructor's keyword arguments."""
    return _arguments(find(name))


def _arguments(cls: type[Method]) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(cls.__init__).parameters.items())[1:])


def in_force(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """All options of a method as they are in force when some are given; those of `tekap` as `tekap.n` and so on."""
    values = {key: p.default for key, p in options(name).items()} | given
    around = values.pop("tekap", False)
    if around is False:
        return values
    around = {key: p.default for key, p in _around().items()} | ({} if around is True else around)
    return values | {f"tekap.{key}": value for key, value in around.items()}


def build(name: str, given: dict[str, Any], where: str = "recipe") -> Method:
    """The method with its options checked against its constructor; `tekap` among them puts TeKAP around it.

    Raises RecipeError naming the key, what is allowed and the nearest option.
    """
    cls, given = find(name), dict(given)
    around = given.pop("tekap", False)
    method = cls(**_checked(f"method {name}", _arguments(cls), given, f"{where}: method"))
    if around is False:
        return method
    if not isinstance(around, bool | dict):
        raise RecipeError(
            f"{where}: method.tekap: true, or a table of its options (given {around!r})",
            hint="For example: --set method.tekap.n=3",
        )
    if name == "tekap":
        raise RecipeError(f"{where}: method.tekap: method tekap is that already", hint="Leave it out.")
    if name in FEATURES:
        raise RecipeError(
            f"{where}: method.tekap: it adds noise to mentors' logits, and method {name} learns from features alone",
            hint='Leave it out; TeKAP\'s own feature form is name = "tekap", parts = "features".',
        )
    if not method.teachers:
        raise RecipeError(
            f"{where}: method.tekap: it adds noise to mentors' logits, and method {name} has no mentors",
            hint="Leave it out, or choose a method that learns from mentors (kd, dkd).",
        )
    from kdcli.methods.tekap import Perspectives

    table = around if isinstance(around, dict) else {}
    values = _checked("tekap", _around(), table, f"{where}: method.tekap")
    return Perspectives(method, **values)


def _around() -> dict[str, inspect.Parameter]:
    """The options of TeKAP around another method."""
    from kdcli.methods.tekap import Perspectives

    return {key: p for key, p in _arguments(Perspectives).items() if key != "method"}


def _checked(who: str, allowed: dict[str, inspect.Parameter], given: dict[str, Any], where: str) -> dict[str, Any]:
    """A value for each argument, given or its default, checked against its annotation."""
    for key in given:
        if key not in allowed:
            known = ", ".join(allowed) or "none"
            raise RecipeError(
                f"{where}.{key}: {who} has no such option",
                hint=did_you_mean(key, allowed) or f"Its options: {known}.",
            )
    fields: dict[str, Any] = {key: (p.annotation, p.default) for key, p in allowed.items()}
    try:
        config = ConfigDict(extra="forbid", allow_inf_nan=False)
        checked = create_model("Options", __config__=config, **fields).model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{where}.{key}: {first['msg']} (given {first['input']!r})") from None
    return {key: getattr(checked, key) for key in allowed}
