"""The contract itself: methods that break one rule are told so, by the check that is there for it, in plain words."""

from functools import cache
from pathlib import Path

import pytest
import torch

from kdcli.workflows import method_contract

HERE = Path(__file__).parent
WRONG = {  # method -> the check that must fail, and what it says; others may fail with it
    "NoHard": ("terms are finite scalars", "`hard` is missing"),
    "Vector": ("terms are finite scalars", "'hard' is no scalar"),
    "LowTerm": ("terms are finite scalars", "bfloat16: losses are float32"),
    "LongNote": ("terms are finite scalars", r"note 'rank' is \[9\]"),
    "NotOneNote": ("terms are finite scalars", "note 'rank' is not finite"),
    "Overflows": ("extreme answers stay finite", "the term teacher is not finite"),
    "NoRoot": ("extreme answers stay finite", "a gradient is not finite"),
    "LowArithmetic": ("half precision is float32", r"compute in \.float\(\)"),
    "ReadsItem": ("nothing is read back to the host", r"rogues\.py, line \d+, in more"),
    "Branches": ("nothing is read back to the host", r"rogues\.py, line \d+, in more"),
    "Masks": ("nothing is read back to the host", r"rogues\.py, line \d+, in more"),
    "ReadsBuffer": ("nothing is read back to the host", r"rogues\.py, line \d+, in more"),
    "ReadsAfter": ("nothing is read back to the host", r"rogues\.py, line \d+, in after"),
    "ReadsEpoch": ("steps are alike", "capturable = False is missing"),
    "Counts": ("steps are alike", "capturable = False is missing"),
    "Undetached": ("peers' targets are detached", r"'mutual', in which student learns, sends a gradient to peer\.out"),
    "Climbs": ("the loss falls", "cross-entropy goes from"),
    "Stubborn": ("the loss falls", "cross-entropy goes from"),
    "Meddles": ("only learners learn", "a mentor's weights"),
    "Wakes": ("only learners learn", "a mentor's weights, statistics or mode|is not in eval mode"),
    "Reaches": ("only learners learn", "phase alone changes peer, whom it does not name"),
    "Lazy": ("only learners learn", "extra does not learn"),
    "Forgets": ("it goes on as it was saved", "loaded, it goes on with"),
    "Gambles": ("noise follows seed and step", r"lesson\.generator"),
    "ClassNumbers": ("mixup", r"rogues\.py, line \d+, in more"),
    "Couples": ("micro-batches", "full_batches is missing in needs"),
    "Divides": ("one image", "`pairs` is missing in needs"),
    "TwoMentors": ("mentors are asked for", r"rogues\.py, line \d+, in more"),
    "Untyped": ("options are checked", "any value will do for weight"),
    "Ships": ("the graduate is what ships", r"answers \[20, 3\]"),
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
    """Every check, so that none of those above fails whoever it is put to."""
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
    assert untested == {
        "no step waits for the GPU",  # tests/gpu
        "peers may be swapped",  # fails for kdcli's own alone: see below
        "so does its moving average",  # as "it goes on as it was saved", with other settings
        "neighbours do not matter",
        "what is logged",
    }


def test_a_symmetric_method_may_not_tell_peers_apart(monkeypatch):
    monkeypatch.setattr(method_contract, "SYMMETRIC", (f"{HERE / 'rogues.py'}:TwoMentors",))
    with pytest.raises(method_contract.Broken, match="swapping two peers"):
        put("peers may be swapped", "TwoMentors")


def test_mentors_that_were_changed_do_not_spoil_the_next_check():
    with pytest.raises(method_contract.Broken, match="mentor"):
        put("the loss falls", "Meddles")
    put("the loss falls", "Honest")
