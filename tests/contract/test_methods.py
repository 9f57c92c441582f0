"""What every method must pass (DESIGN section 8), with every set of options that changes what it computes.

The checks are kdcli.workflows.method_contract's, which `kdcli check --method` runs too. A method that is added to
`kdcli.methods.METHODS` is tested here from then on; give it a line in OPTIONS when its options select between
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
from kdcli.workflows import method_contract
from kdcli.workflows.method_contract import CHECKS, Idle, Toy, teach

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
"""A method's sets of options, the defaults first; one that is not named has the defaults alone."""
GRID = [  # all of ClassroomKD's combinations but those that differ in an option that another makes idle
    one
    for values in itertools.product(*CHOICES.values())
    for one in [dict(zip(CHOICES, values, strict=True))]
    if (one["ranking"] != "sample" or one["mark_mean"] == "geometric")
    and (one["mentoring"] != "fixed" or one["gap"] == "max")
]
ONCE = {"options are checked", "so does its moving average", "the graduate is what ships"}
"""Checks that other options would not change."""
IDLE = {  # check -> of whom it says nothing; of everybody else it must
    "no step waits for the GPU": set(METHODS),  # tests/gpu puts them to it
    "peers may be swapped": set(METHODS) - set(method_contract.SYMMETRIC)
    | {"tekap"},  # whose other forms hear features
    "peers' targets are detached": set(METHODS) - {"dml"},  # branches of one network are no learners of their own
    "steps are alike": {"dkd", "ctkd", "dtkd", "disk", "one", "okddip", "ffl"},  # they ramp something up
    "micro-batches": {
        "tekap",
        "kd",
        "disk",
        "dgkd",
    },  # noise; kd with tekap around it; DGKD leaves mentors out by chance
}
THROUGH = [  # whose equations let a gradient through what a learner is to the others
    ("dml", {"variant": "official"}),
    ("okddip", {"form": "networks"}),  # its attention learns through the targets
    ("ffl", {"form": "networks"}),  # its fusion learns from all of them
]
NEGATIVE = {"vid"}  # a log-likelihood may be; no other equation here can


@cache
def toy() -> Toy:
    return Toy(torch.device("cpu"))


def sets(of: dict[str, list[dict[str, Any]]], once: bool = False) -> list[Any]:
    """Every method with each of its option sets, or with the first alone."""
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
        with pytest.raises(method_contract.Broken, match="sends a gradient to"):
            toy().put(CHECKS[check], name, options)
        return
    try:
        toy().put(CHECKS[check], name, options)
    except Idle as why:
        if name not in IDLE.get(check, ()):
            pytest.fail(f"says nothing of {name}: {why}")


@pytest.mark.parametrize(
    "check", ["terms are finite scalars", "extreme answers stay finite", "nothing is read back to the host"]
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
        lesson = method_contract.remade(given)
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
    here = [terms["noise"] for terms in teach(toy().learner(name, {}), given)]
    assert len(set(here)) == 3
    torch.randn(9)
    late = toy().learner(name, {})  # has drawn nothing before this step
    assert teach(late, given[2:], first=2)[0]["noise"] == here[2]
    assert teach(toy().learner(name, {}, seed=1), given[:1])[0]["noise"] != here[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_learner_begins_where_its_seed_says(seed):
    one, two, other = (toy().learner(who, {}, seed=n) for who, n in (("kd", seed), ("aver", seed), ("kd", seed + 1)))
    assert method_contract.fingerprint([one.student]) == method_contract.fingerprint([two.student])
    assert method_contract.fingerprint([one.student]) != method_contract.fingerprint([other.student])


def test_the_control_hears_nobody():
    one = toy().learner("nokd", {}, mentors=0)
    assert set(teach(one, toy().batches(one, 1))[0]) == {"hard"}


@pytest.mark.parametrize("name", METHODS)
def test_mentors_that_are_missing_are_asked_for_by_their_flag(name):
    if methods.find(name).teachers:
        with pytest.raises(RecipeError, match=f"method {name} learns from mentors") as caught:
            toy().learner(name, {}, mentors=0)
        assert "--teacher" in caught.value.hint


@pytest.mark.parametrize("options", CLASSROOM, ids=lambda o: "-".join(map(str, o.values())))
def test_what_classroom_logs_goes_by_the_models_names(options):
    one = toy().learner("classroom", options)
    for step, (batch, taught) in enumerate(toy().batches(one, 2)):
        one.step(batch, taught, 0, step, step)
    row = one.row(1, {})
    mentors = [member.name for member in one.classroom.mentors]
    whole = ["student", *mentors]
    assert len(mentors) == 3
    assert {key for key in row if key.startswith("rank/")} == {f"rank/{who}" for who in whole}
    assert {key for key in row if key.startswith("active/")} == {f"active/{who}" for who in mentors}
    assert row["active/mentor0"] == 1  # it is a classroom in which something is at play
    if options.get("ranking") != "sample" and options.get("filter") != "none" and "mark_mean" not in options:
        assert row["active/mentor2"] == 0
    if options.get("ranking") != "position" and options.get("variant") != "official":
        assert sum(row[f"rank/{who}"] for who in whole) == pytest.approx(3, rel=1e-4)  # Eq. 5
