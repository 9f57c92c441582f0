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

__all__ = ["METHODS", "Lesson", "Method", "Phase", "Room", "Terms", "View", "build", "find", "options"]


def find(name: str) -> type[Method]:
    """The class of a method. Raises RecipeError with the nearest name."""
    if name not in METHODS:
        raise RecipeError(f"method.name: no method called {name!r}", hint=did_you_mean(name, METHODS))
    module, _, cls = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def options(name: str) -> dict[str, inspect.Parameter]:
    """A method's options: its constructor's keyword arguments."""
    return dict(list(inspect.signature(find(name).__init__).parameters.items())[1:])


def build(name: str, given: dict[str, Any], where: str = "recipe") -> Method:
    """The method with its options checked against its constructor.

    Raises RecipeError naming the key, what is allowed and the nearest option.
    """
    cls, allowed = find(name), options(name)
    for key in given:
        if key not in allowed:
            known = ", ".join(allowed) or "none"
            raise RecipeError(
                f"{where}: method.{key}: method {name} has no such option",
                hint=did_you_mean(key, allowed) or f"Its options: {known}.",
            )
    fields: dict[str, Any] = {key: (p.annotation, p.default) for key, p in allowed.items()}
    try:
        config = ConfigDict(extra="forbid", allow_inf_nan=False)
        checked = create_model(name, __config__=config, **fields).model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{where}: method.{key}: {first['msg']} (given {first['input']!r})") from None
    return cls(**{key: getattr(checked, key) for key in allowed})
