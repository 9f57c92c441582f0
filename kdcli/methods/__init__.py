"""Methods by name. METHODS is the registry; a name like `my_file.py:Mine` is a class of the user's."""

import importlib
from typing import Any

from kdcli.errors import KdcliError, RecipeError, did_you_mean
from kdcli.methods import fields, user
from kdcli.methods.base import ANY, Lesson, Method, Need, Phase, SetupContext, Temperature, Terms
from kdcli.methods.fields import Option
from kdcli.models.outputs import Output
from kdcli.system import user_code
from kdcli.tasks import TASKS

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
    "ctkd": "kdcli.methods.logits:CTKD",
    "dtkd": "kdcli.methods.logits:DTKD",
    "mlkd": "kdcli.methods.logits:MLKD",
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
WRAPPERS = {"tekap": "kdcli.methods.tekap:Perspectives"}
"""Key among a method's options -> what that key puts around the method: true, or a table of the wrapper's options."""

__all__ = [
    "ANY", "METHODS", "Lesson", "Method", "Need", "Option", "Output", "Phase", "SetupContext", "Temperature", "Terms",
    "build", "find", "in_force", "options",
]  # fmt: skip


def find(name: str) -> type[Method]:
    """The class of a method. Raises RecipeError with the nearest name."""
    if user_code.named(name):
        cls = user.load(name)
    elif name in METHODS:
        cls = _import(METHODS[name])
    else:
        hint = did_you_mean(name, METHODS) or "A class of your own is written my_file.py:Mine."
        raise RecipeError(f"method.name: no method called {name!r}", hint=hint)
    fields.check_constructor(cls, user_code.label(name), cls.options())
    return cls


def options(name: str) -> dict[str, Option]:
    """The options of a method: name, type, default and documentation."""
    return find(name).options()


def in_force(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The value of every option when some are given; those of a wrapper as `tekap.n` and so on."""
    values = {key: option.default for key, option in options(name).items()} | given
    for key, path in WRAPPERS.items():
        table = values.pop(key, False)
        if table is not False:
            inner = {name: option.default for name, option in _import(path).options().items()}
            inner |= table if isinstance(table, dict) else {}
            values |= {f"{key}.{name}": value for name, value in inner.items()}
    return values


def build(name: str, given: dict[str, Any], where: str = "recipe") -> Method:
    """The method with its options; a key of WRAPPERS among them puts that wrapper around it.

    where: what an error names before the key. Raises RecipeError that names the key, what is allowed and the nearest
    option, and for a need or a task that does not exist.
    """
    cls, label = find(name), user_code.label(name)
    plain = {key: value for key, value in given.items() if key not in WRAPPERS}
    try:
        method = cls(**fields.validated(f"method {label}", cls.options(), plain, f"{where}: method"))
        method.needs = _known(method, label, "needs", Need)
        method.tasks = _known(method, label, "tasks", TASKS)
    except Exception as error:
        if isinstance(error, KdcliError) or not user_code.named(name):
            raise
        raise RecipeError(
            f"{where}: method {label} cannot be created: {user_code.words(error)}", hint="--debug shows the traceback."
        ) from error
    for key, path in WRAPPERS.items():
        if given.get(key, False) is not False:
            method = _import(path).around(method, label, given[key], f"{where}: method.{key}")
    return method


def _import(path: str) -> Any:
    module, _, cls = path.partition(":")
    return getattr(importlib.import_module(module), cls)


def _known(method: Method, label: str, attribute: str, allowed: Any) -> Any:
    """The method's needs or tasks as a frozenset. Raises RecipeError for one that does not exist."""
    given = getattr(method, attribute)
    names = {given} if isinstance(given, str) else set(given)
    for name in sorted(map(str, names)):
        if name not in [*allowed]:
            raise RecipeError(
                f"method {label}: {attribute} names {name!r}, which does not exist", hint=did_you_mean(name, allowed)
            )
    return frozenset(allowed(name) if allowed is Need else name for name in names)
