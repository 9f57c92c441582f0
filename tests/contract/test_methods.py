"""The contract for every method, with every set of options that changes what it computes.

The checks are those of kdcli.workflows.method_contract, which `kdcli check --method` runs too. A method that is added
to `kdcli.methods.METHODS` is tested here automatically; give it a line in OPTIONS if its options select between
equations.
"""

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli import methods
from kdcli.errors import RecipeError
from kdcli.methods import METHODS
from kdcli.workflows.method_contract import CHECKS, Broken, Idle, Toy
from kdcli.workflows.toy_classroom import fingerprint, remade, train

CHOICES: dict[str, list[Any]] = {
    "ranking": ["batch", "sample", "position"],
    "mark_mean": ["geometric", "arithmetic"],
    "filter": ["rank", "none"],
    "mentoring": ["adaptive", "fixed"],
    "gap": ["max", "mentor", "student"],
    "alpha": ["rank", "mark"],
}
CLASSROOM: list[dict[str, Any]] = [
    {},
    {"ranking": "sample"},
    {"ranking": "position"},
    {"mark_mean": "arithmetic", "delta": 1.0},
    {"filter": "none"},
    {"mentoring": "fixed", "tau": 4.0},
    {"mentoring": "dtkd"},
    {"gap": "student"},
    {"gap": "mentor", "filter": "none"},
    {"gap": "student", "ranking": "sample", "filter": "none", "delta": 1.0},
    {"alpha": "mark", "ranking": "sample"},
    {"variant": "official"},
    {"variant": "official", "mentoring": "fixed", "delta": 1.0},
]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "kd": [{}, {"tau": 1.0}, {"tekap": True}],
    "aver": [{}, {"form": "mean"}, {"tau": 1.0}],
    "classroom": CLASSROOM,
    "tekap": [{}, {"parts": "features"}, {"parts": "both"}],
    "mlkd": [{}, {"variant": "official"}],
    "smkd": [{}, {"form": "transposed"}],
    "ft": [{}, {"variant": "official"}],
    "camkd": [{}, {"wide": True}, {"variant": "official"}],
    "aekd": [{}, {"normalise": True}],
    "dml": [{}, {"form": "ensemble"}, {"variant": "official"}],
    "okddip": [{}, {"form": "networks"}],
    "ffl": [{}, {"form": "networks"}],
}
"""Sets of options of a method, the defaults first; a method that is not listed has only the defaults."""
GRID = [  # all combinations of ClassroomKD's options, except those that differ in an option without effect
    one
    for values in itertools.product(*CHOICES.values())
    for one in [dict(zip(CHOICES, values, strict=True))]
    if (one["ranking"] != "sample" or one["mark_mean"] == "geometric")
    and (one["mentoring"] != "fixed" or one["gap"] == "max")
]
ONCE = {"options are typed", "the graduate is what ships"}
"""Checks whose result does not depend on the options."""
IDLE = {  # check -> the methods that it may not apply to; it must apply to all others
    "no step waits for the GPU": set(METHODS),  # tests/gpu runs it
    "peers' targets are detached": set(METHODS) - {"dml"},  # branches of one network are not learners
    "steps are alike": {"dkd", "ctkd", "dtkd", "disk", "one", "okddip", "ffl"},  # their weights change over epochs
    "micro-batches": {"tekap", "kd", "disk", "dgkd"},  # noise (kd: with tekap); DGKD draws which mentors it leaves out
    "mixup": set(),
}
THROUGH = [  # whose equations let gradient flow into the targets of other learners
    ("dml", {"variant": "official"}),
    ("okddip", {"form": "networks"}),  # its attention learns through the targets
    ("ffl", {"form": "networks"}),  # its fusion learns from all of them
]
NEGATIVE = {"vid"}  # a log-likelihood; the terms of all others are not negative


@cache
def toy(task: str = "classify") -> Toy:
    return Toy(torch.device("cpu"), task)


def sets(of: dict[str, list[dict[str, Any]]], once: bool = False) -> list[Any]:
    """Every method with each of its option sets, or with the first one only."""
    every = [(name, one) for name in METHODS for one in of.get(name, [{}])[: 1 if once else None]]
    return [pytest.param(name, one, id="-".join([name, *map(str, one.values())])) for name, one in every]


CASES = [
    pytest.param(check, *case.values, id=f"{check}-{case.id}")
    for check in CHECKS
    for case in sets(OPTIONS, check in ONCE)
]


@pytest.mark.parametrize(("check", "name", "options"), CASES)
def test_contract(check, name, options):
    if check == "peers' targets are detached" and (name, options) in THROUGH:
        with pytest.raises(Broken, match="sends a gradient to"):
            toy().put(CHECKS[check], name, options)
        return
    try:
        toy().put(CHECKS[check], name, options)
    except Idle as why:
        if name not in IDLE.get(check, ()):
            pytest.fail(f"does not apply to {name}: {why}")


MULTILABEL = [
    case for case in sets({**OPTIONS, "classroom": CLASSROOM[:4]}) if "multilabel" in methods.build(*case.values).tasks
]


@pytest.mark.parametrize(
    "check",
    ["terms are finite scalars", "extreme outputs stay finite", "the loss falls", "only learners learn",
     "micro-batches", "the graduate is what ships"],
)  # fmt: skip
@pytest.mark.parametrize(("name", "options"), MULTILABEL)
def test_multilabel(check, name, options):
    """Targets [B, K] with several classes an image: every method that is not only for classification trains on them."""
    if (check, name) == ("the graduate is what ships", "classroom") and options:
        pytest.skip("the options change nothing in it")
    try:
        toy("multilabel").put(CHECKS[check], name, options)
    except Idle as why:
        if name not in IDLE.get(check, ()):
            pytest.fail(f"does not apply to {name}: {why}")


def test_the_methods_for_classification_alone_are_those_with_a_softmax_over_classes():
    alone = {name for name in METHODS if methods.build(name, {}).tasks == {"classify"}}
    assert alone == {
        "dkd", "nkd", "dist", "wsld", "dtkd", "mlkd", "ebkd", "camkd", "aekd", "disk", "ofa", "shake", "crd",
        "dml", "one", "okddip", "ffl",
    }  # fmt: skip
    for name, options in (
        ("classroom", {"mentoring": "dtkd"}),
        ("tekap", {"parts": "features"}),
        ("tekap", {"parts": "both"}),
    ):
        assert methods.build(name, options).tasks == {"classify"}
    with pytest.raises(RecipeError, match="method dkd is for classify, not for task = 'multilabel'"):
        toy("multilabel").learner("dkd", {})


@pytest.mark.parametrize(
    "check", ["terms are finite scalars", "extreme outputs stay finite", "nothing is read back to the host"]
)
@pytest.mark.parametrize("options", GRID, ids=lambda o: "-".join(o.values()))
def test_every_combination_of_classroom_options(check, options):
    toy().put(CHECKS[check], "classroom", options)


@pytest.mark.parametrize(("name", "options"), sets({**OPTIONS, "classroom": CLASSROOM + GRID}))
def test_terms_are_not_negative(name, options):
    if name in NEGATIVE:
        pytest.skip("a log-likelihood")
    subject = toy().subject(name, options)
    for phase, given in subject.lessons:
        lesson = remade(given)
        for key, value in subject.terms(phase, lesson).items():
            assert value >= -1e-4, key
        if name == "classroom":
            assert lesson.notes.keys() >= {"rank", "mark", "active", "temperature"}


# --- options ----------------------------------------------------------------------------------------------------------


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(RecipeError, match="classrom") as caught:
        methods.build("classrom", {})
    assert "classroom" in caught.value.hint


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_option_is_refused(name):
    with pytest.raises(RecipeError, match=r"there\.toml: method\.zzz: .*no such option"):
        methods.build(name, {"zzz": 1}, "there.toml")


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(RecipeError, match=r"method\.rankin") as caught:
        methods.build("classroom", {"rankin": "batch"})
    assert "ranking" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("kd", {"tau": "warm"}, r"method\.tau: .*number.*'warm'"),
        ("kd", {"tau": [4.0]}, r"method\.tau"),
        ("kd", {"tau": 0.0}, r"method\.tau: .*greater than 0"),
        ("aver", {"tau": -1.0}, r"method\.tau: .*greater than 0"),
        ("classroom", {"tau": float("nan")}, r"method\.tau: .*finite"),
        ("classroom", {"beta": float("inf")}, r"method\.beta: .*finite"),
        ("classroom", {"alpha": 0.5}, r"method\.alpha: .*'rank' or 'mark'"),
        ("classroom", {"ranking": "batches"}, r"method\.ranking: .*'batch', 'sample' or 'position'"),
        ("aver", {"form": "median"}, r"method\.form: .*'sum' or 'mean'"),
        ("classroom", {"variant": "official", "ranking": "sample"}, r"method\.variant: .*'sample'"),
        ("classroom", {"variant": "official", "ranking": "position"}, r"method\.variant: .*'position'"),
    ],
)
def test_an_option_that_cannot_be_is_refused(name, options, words):
    with pytest.raises(RecipeError, match=words):
        methods.build(name, options)


def test_a_whole_number_will_do_for_a_fraction():
    method = methods.build("kd", {"tau": 4})
    assert type(method.tau) is float
    assert methods.options("nokd") == {}
    assert set(methods.options("kd")) == {"tau", "alpha", "beta"}


# --- in a classroom ---------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_step():
    name = f"{Path(__file__).parent / 'rogues.py'}:Draws"
    given = toy().batches(toy().learner(name, {}), 3)
    here = [terms["noise"] for terms in train(toy().learner(name, {}), given)]
    assert len(set(here)) == 3
    torch.randn(9)
    late = toy().learner(name, {})  # which has drawn nothing before this step
    assert train(late, given[2:], first=2)[0]["noise"] == here[2]
    assert train(toy().learner(name, {}, seed=1), given[:1])[0]["noise"] != here[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_alone_decides_a_learners_first_weights(seed):
    one, two, other = (toy().learner(who, {}, seed=n) for who, n in (("kd", seed), ("aver", seed), ("kd", seed + 1)))
    assert fingerprint([one.student]) == fingerprint([two.student])
    assert fingerprint([one.student]) != fingerprint([other.student])


def test_the_control_has_only_the_labels():
    one = toy().learner("nokd", {}, mentors=0)
    assert set(train(one, toy().batches(one, 1))[0]) == {"hard"}


@pytest.mark.parametrize("options", CLASSROOM, ids=lambda o: "-".join(map(str, o.values())))
def test_classroom_logs_under_the_models_names(options):
    one = toy().learner("classroom", options)
    for step, (batch, outputs) in enumerate(toy().batches(one, 2)):
        one.step(batch, outputs, 0, step, step)
    row = one.row(1, {})
    mentors = [member.name for member in one.classroom.mentors]
    whole = ["student", *mentors]
    assert len(mentors) == 3
    assert {key for key in row if key.startswith("rank/")} == {f"rank/{who}" for who in whole}
    assert {key for key in row if key.startswith("active/")} == {f"active/{who}" for who in mentors}
    assert row["active/mentor0"] == 1  # it is a classroom in which somebody is active
    if options.get("ranking") != "sample" and options.get("filter") != "none" and "mark_mean" not in options:
        assert row["active/mentor2"] == 0
    if options.get("ranking") != "position" and options.get("variant") != "official":
        assert sum(row[f"rank/{who}"] for who in whole) == pytest.approx(3, rel=1e-4)  # Eq. 5
