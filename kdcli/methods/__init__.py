"""Methods by name. One lazy dict is the whole registry; a name like `my_file.py:Mine` is the user's own class."""

import importlib
import inspect
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from torch import nn

from kdcli import own
from kdcli.errors import KdcliError, RecipeError, did_you_mean
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

__all__ = ["METHODS", "Lesson", "Method", "Phase", "Room", "Terms", "View", "build", "find", "options"]


def find(name: str) -> type[Method]:
    """The class of a method. Raises RecipeError with the nearest name."""
    if own.named(name):
        return own.load(name)
    if name not in METHODS:
        hint = did_you_mean(name, METHODS) or "A class of your own is my_file.py:Mine."
        raise RecipeError(f"method.name: no method called {name!r}", hint=hint)
    module, _, cls = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def options(name: str) -> dict[str, inspect.Parameter]:
    """A method's options: its constructor's keyword arguments."""
    cls = find(name)
    if cls.__init__ is nn.Module.__init__:
        return {}
    try:
        given = list(inspect.signature(cls.__init__, eval_str=True).parameters.items())[1:]
    except NameError as error:  # an annotation in quotes
        raise RecipeError(f"{own.label(name)}: its options cannot be read: {error}") from None
    return {key: p for key, p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def build(name: str, given: dict[str, Any], where: str = "recipe") -> Method:
    """The method with its options checked against its constructor.

    Raises RecipeError naming the key, what is allowed and the nearest option.
    """
    cls, allowed, label = find(name), options(name), own.label(name)
    for key in given:
        if key not in allowed:
            known = ", ".join(allowed) or "none"
            raise RecipeError(
                f"{where}: method.{key}: method {label} has no such option",
                hint=did_you_mean(key, allowed) or f"Its options: {known}.",
            )
    fields: dict[str, Any] = {
        key: (Any if p.annotation is p.empty else p.annotation, ... if p.default is p.empty else p.default)
        for key, p in allowed.items()
    }
    try:
        config = ConfigDict(extra="forbid", allow_inf_nan=False)
        checked = create_model(label, __config__=config, **fields).model_validate(given)
        return cls(**{key: getattr(checked, key) for key in allowed})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{where}: method.{key}: {first['msg']} (given {first['input']!r})") from None
    except Exception as error:
        if isinstance(error, KdcliError) or not own.named(name):
            raise
        raise RecipeError(
            f"{where}: method {label} cannot be made: {own.words(error)}", hint="--debug shows the traceback."
        ) from error
