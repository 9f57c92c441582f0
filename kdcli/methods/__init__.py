"""Methods by name. One lazy dict is the whole registry; a name like `my_file.py:Mine` is the user's own class."""

import importlib
import inspect
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model
from torch import nn

from kdcli.errors import KdcliError, RecipeError, did_you_mean
from kdcli.methods.base import ANY, Lesson, Method, Need, Phase, SetupContext, Temperature, Terms
from kdcli.models.outputs import Output
from kdcli.system import user_code

METHODS = {
    "nokd": "kdcli.methods.baselines:NoKD",
    "kd": "kdcli.methods.baselines:KD",
    "aver": "kdcli.methods.baselines:Aver",
    "classroom": "kdcli.methods.classroom_kd:ClassroomKD",
    "tekap": "kdcli.methods.tekap:TeKAP",
    "disk": "kdcli.methods.disk:DiSK",
    "dkd": "kdcli.methods.logits:DKD",
    "nkd": "kdcli.methods.logits:NKD",
    "dist": "kdcli.methods.logits:DIST",
    "wsld": "kdcli.methods.logits:WSLD",
    "ctkd": "kdcli.methods.temperature:CTKD",
    "dtkd": "kdcli.methods.temperature:DTKD",
    "mlkd": "kdcli.methods.multilevel:MLKD",
    "fitnets": "kdcli.methods.features:FitNets",
    "at": "kdcli.methods.features:AT",
    "sp": "kdcli.methods.features:SP",
    "nst": "kdcli.methods.features:NST",
    "vid": "kdcli.methods.features:VID",
    "smkd": "kdcli.methods.feature_attention:SMKD",
    "semckd": "kdcli.methods.feature_attention:SemCKD",
    "pkt": "kdcli.methods.relational:PKT",
    "rkd": "kdcli.methods.relational:RKD",
    "crd": "kdcli.methods.crd:CRD",
    "ft": "kdcli.methods.feature_pretraining:FT",
    "ab": "kdcli.methods.feature_pretraining:AB",
    "srrl": "kdcli.methods.classifier:SRRL",
    "simkd": "kdcli.methods.classifier:SimKD",
    "ofa": "kdcli.methods.classifier:OFA",
    "ebkd": "kdcli.methods.multi_teacher:EBKD",
    "camkd": "kdcli.methods.multi_teacher:CAMKD",
    "aekd": "kdcli.methods.multi_teacher:AEKD",
    "takd": "kdcli.methods.assistants:TAKD",
    "dgkd": "kdcli.methods.assistants:DGKD",
    "dml": "kdcli.methods.online:DML",
    "one": "kdcli.methods.online:ONE",
    "okddip": "kdcli.methods.online:OKDDip",
    "ffl": "kdcli.methods.online:FFL",
    "shake": "kdcli.methods.shake:SHAKE",
}

__all__ = [
    "ANY", "METHODS", "Lesson", "Method", "Need", "Output", "Phase", "SetupContext", "Temperature", "Terms",
    "build", "find", "in_force", "options",
]  # fmt: skip


def find(name: str) -> type[Method]:
    """The class of a method. Raises RecipeError with the nearest name."""
    if user_code.named(name):
        return user_code.load(name)
    if name not in METHODS:
        hint = did_you_mean(name, METHODS) or "A class of your own is my_file.py:Mine."
        raise RecipeError(f"method.name: no method called {name!r}", hint=hint)
    module, _, cls = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def options(name: str) -> dict[str, inspect.Parameter]:
    """A method's options: its constructor's keyword arguments."""
    return _arguments(find(name), user_code.label(name))


def in_force(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """All options of a method as they are in force when some are given; those of `tekap` as `tekap.n` and so on."""
    values = {key: p.default for key, p in options(name).items()} | given
    around = values.pop("tekap", False)
    if around is False:
        return values
    told = {key: p.default for key, p in _perspectives().items()} | (around if isinstance(around, dict) else {})
    return values | {f"tekap.{key}": value for key, value in told.items()}


def build(name: str, given: dict[str, Any], where: str = "recipe") -> Method:
    """The method with its options checked against its constructor; `tekap` among them puts TeKAP around it.

    Raises RecipeError naming the key, what is allowed and the nearest option.
    """
    cls, label = find(name), user_code.label(name)
    plain = {key: value for key, value in given.items() if key != "tekap"}
    try:
        method = cls(**_checked(f"method {label}", options(name), plain, f"{where}: method"))
    except Exception as error:
        if isinstance(error, KdcliError) or not user_code.named(name):
            raise
        raise RecipeError(
            f"{where}: method {label} cannot be made: {user_code.words(error)}", hint="--debug shows the traceback."
        ) from error
    around = given.get("tekap", False)
    return method if around is False else _around(method, name, around, f"{where}: method.tekap")


def _around(method: Method, name: str, given: Any, where: str) -> Method:
    """TeKAP around a method: `given` is true or a table of its options."""
    from kdcli.methods.tekap import Perspectives

    if not isinstance(given, bool | dict):
        raise RecipeError(
            f"{where}: true, or a table of its options (given {given!r})", hint="For example: --set method.tekap.n=3"
        )
    if name == "tekap":
        raise RecipeError(f"{where}: method tekap is that already", hint="Leave it out.")
    if not method.reads_logits:
        raise RecipeError(
            f"{where}: it adds noise to mentors' logits, and method {name} learns from features alone",
            hint='Leave it out; TeKAP\'s own feature form is name = "tekap", parts = "features".',
        )
    if not method.teachers:
        raise RecipeError(
            f"{where}: it adds noise to mentors' logits, and method {user_code.label(name)} has no mentors",
            hint="Leave it out, or choose a method that learns from mentors (kd, dkd).",
        )
    table = given if isinstance(given, dict) else {}
    return Perspectives(method, **_checked("tekap", _perspectives(), table, where))


def _perspectives() -> dict[str, inspect.Parameter]:
    """The options of TeKAP around another method."""
    from kdcli.methods.tekap import Perspectives

    return {key: p for key, p in _arguments(Perspectives, "tekap").items() if key != "method"}


def _arguments(cls: type[Method], label: str) -> dict[str, inspect.Parameter]:
    if cls.__init__ is nn.Module.__init__:
        return {}
    try:
        given = list(inspect.signature(cls.__init__, eval_str=True).parameters.items())[1:]
    except NameError as error:  # an annotation in quotes
        raise RecipeError(f"{label}: its options cannot be read: {error}") from None
    return {key: p for key, p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _checked(who: str, allowed: dict[str, inspect.Parameter], given: dict[str, Any], where: str) -> dict[str, Any]:
    """A value for each argument, given or its default, checked against its annotation."""
    for key in given:
        if key not in allowed:
            known = ", ".join(allowed) or "none"
            raise RecipeError(
                f"{where}.{key}: {who} has no such option",
                hint=did_you_mean(key, allowed) or f"Its options: {known}.",
            )
    fields: dict[str, Any] = {
        key: (Any if p.annotation is p.empty else p.annotation, ... if p.default is p.empty else p.default)
        for key, p in allowed.items()
    }
    try:
        config = ConfigDict(extra="forbid", allow_inf_nan=False)
        checked = create_model("Options", __config__=config, **fields).model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{where}.{key}: {first['msg']} (given {first['input']!r})") from None
    return {key: getattr(checked, key) for key in allowed}
