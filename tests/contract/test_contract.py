"""The contract itself: a method that breaks one rule fails the check for that rule, with a message that says why."""

from functools import cache
from pathlib import Path

import pytest
import torch

from kdcli.workflows import method_contract

HERE = Path(__file__).parent
WRONG = {  # method -> the check that must fail, and its message; others may fail with it
    "NoHard": ("terms are finite scalars", "`hard` is missing"),
    "Vector": ("terms are finite scalars", "'hard' is not a scalar"),
    "LowTerm": ("terms are finite scalars", "bfloat16: losses are float32"),
    "LongNote": ("terms are finite scalars", r"note 'rank' is \[9\]"),
    "NotOneNote": ("terms are finite scalars", "note 'rank' is not finite"),
    "Overflows": ("extreme outputs stay finite", "the term teacher is not finite"),
    "NoRoot": ("extreme outputs stay finite", "a gradient is not finite"),
    "LowArithmetic": ("half precision is float32", r"compute in \.float\(\)"),
    "ReadsItem": ("nothing is read back to the host", r"rogues\.py, line \d+, in more"),
    "Branches": ("nothing is read back to the host", r"rogues\.py, line \d+, in more"),
    "Masks": ("nothing is read back to the host", r"rogues\.py, line \d+, in more"),
    "ReadsBuffer": ("nothing is read back to the host", r"rogues\.py, line \d+, in more"),
    "ReadsAfter": ("nothing is read back to the host", r"rogues\.py, line \d+, in after"),
    "ReadsEpoch": ("steps are alike", "capturable = False is missing"),
    "Counts": ("steps are alike", "capturable = False is missing"),
    "Undetached": ("peers' targets are detached", r"'mutual', in which student learns, sends a gradient to peer\.out"),
    "Climbs": ("the loss falls", "loss with the labels goes from"),
    "Stubborn": ("the loss falls", "loss with the labels goes from"),
    "Meddles": ("only learners learn", "of a mentor have changed"),
    "Wakes": ("only learners learn", "of a mentor have changed|is not in eval mode"),
    "Reaches": ("only learners learn", "phase alone changes peer, which is not one of its learners"),
    "Lazy": ("only learners learn", "extra does not learn"),
    "Forgets": ("it continues as it was saved", "after loading, the loss is"),
    "Gambles": ("it continues as it was saved", r"lesson\.generator"),
    "ClassNumbers": ("mixup", r"rogues\.py, line \d+, in more"),
    "Couples": ("micro-batches", r"Need\.FULL_BATCHES is missing"),
    "Divides": ("one image", r"Need\.PAIRS is missing"),
    "TwoMentors": ("the fewest mentors suffice", r"rogues\.py, line \d+, in more"),
    "Untyped": ("options are typed", "weight takes any value"),
    "Ships": ("the graduate is what ships", r"gives \[20, 3\]"),
}


@cache
def toy() -> method_contract.Toy:
    return method_contract.Toy(torch.device("cpu"))


def put(check: str, method: str) -> None:
    toy().put(method_contract.CHECKS[check], f"{HERE / 'rogues.py'}:{method}", {})


@pytest.mark.parametrize("method", WRONG)
def test_the_check_that_is_there_for_it_fails(method):
    check, words = WRONG[method]
    with pytest.raises(method_contract.Broken, match=words):
        put(check, method)


@pytest.mark.parametrize("method", ["Honest", "Plain", "Refuses", "Declares", "Paired"])
def test_a_method_that_keeps_the_rules_passes(method):
    """Every check, so that none of those above fails for every method."""
    verdicts = {
        one.check: one for one in method_contract.examine(f"{HERE / 'rogues.py'}:{method}", {}, torch.device("cpu"))
    }
    assert list(verdicts) == list(method_contract.CHECKS)
    idle = {"no step waits for the GPU"}
    if method == "Honest":
        idle |= {"steps are alike", "micro-batches"}
    else:
        idle |= {"peers' targets are detached"}
    assert {key: one.reason for key, one in verdicts.items() if one.result == "failed"} == {}
    assert {key for key, one in verdicts.items() if one.result == "not applicable"} == idle


def test_every_check_has_a_method_that_breaks_it():
    untested = set(method_contract.CHECKS) - {check for check, _ in WRONG.values()}
    assert untested == {"no step waits for the GPU", "what is logged"}  # the first one: tests/gpu


def test_mentors_that_were_changed_do_not_spoil_the_next_check():
    with pytest.raises(method_contract.Broken, match="mentor"):
        put("the loss falls", "Meddles")
    put("the loss falls", "Honest")
