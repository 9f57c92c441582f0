"""What the engine guarantees for every method: noise, neighbours, resuming with a moving average, declared needs.

Methods in SYMMETRIC also have the same loss with two peers swapped.
"""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from test_methods import OPTIONS, sets

from kdcli import methods
from kdcli.errors import RecipeError
from kdcli.methods import METHODS, Need
from kdcli.workflows.method_contract import Toy, goes_on_as_saved, total
from kdcli.workflows.toy_classroom import fingerprint, leaves, remade, train

SYMMETRIC = {"nokd", "kd", "aver", "classroom", "tekap", "ebkd", "aekd"}
"""Methods that have no part of their own for a peer, and read only logits."""
REFUSED = [  # need -> settings that are refused with it, words of the message and of the hint
    (Need.HARD_TARGET, {"mixup": 0.2}, "mixup", "train.mixup=0"),
    (Need.HARD_TARGET, {"cutmix": 0.2}, "cutmix", "train.cutmix=0"),
    (Need.INDEX, {"mixup": 0.2}, "mixup", "train.mixup=0"),
    (Need.TWO_VIEWS, {"cutmix": 0.2}, "cutmix", "train.cutmix=0"),
    (Need.FULL_BATCHES, {"accumulate": 2}, "micro-batches", "accumulate=1"),
    (Need.PAIRS, {"batch_size": 33}, "one image", "drop_last"),  # of a hundred images one is left
]
EVERY = pytest.mark.parametrize(("name", "options"), sets(OPTIONS))


@cache
def toy() -> Toy:
    return Toy(torch.device("cpu"))


@EVERY
def test_noise_is_a_function_of_seed_and_step(name, options):
    """Dropout and noise do not depend on other random numbers that are drawn in between."""
    one, two, other, seeded = (toy().learner(name, options, seed=seed) for seed in (0, 0, 0, 1))
    given, subject = toy().batches(one, 2), toy().subject(name, options)
    for phase, epoch in toy().phases(one, two, other, seeded):
        start = copy.deepcopy(one.state())
        torch.manual_seed(999)
        here = train(one, given, epoch)
        torch.manual_seed(5)
        torch.randn(77)
        there = train(two, given[:1], epoch)
        torch.randn(3)
        there += train(two, given[1:], epoch, 1)
        assert here == there
        assert train(seeded, given[:1], epoch)[0] != here[0]
        lesson = remade(next(lesson for of, lesson in subject.lessons if of.name == phase.name))
        loss = total(subject.terms(phase, lesson))
        (grad,) = torch.autograd.grad(loss, lesson.student.out, allow_unused=True)
        if grad is not None and grad.any() and phase.learners == tuple(one.method.learners()):
            other.load(start)
            assert train(other, given[:1], epoch, 4)[0] != here[0], "the same units are dropped at another step"


@EVERY
def test_a_learner_ends_as_it_does_alone(name, options):
    alone, one, two = (toy().learner(*which) for which in ((name, options), (name, options), ("nokd", {})))
    given, plain = toy().batches(alone, 3), toy().batches(two, 3)
    expected, found = train(alone, given), []
    for step in range(3):
        train(two, plain[step : step + 1], first=step)
        found += train(one, given[step : step + 1], first=step)
    assert found == expected
    assert fingerprint([one.student]) == fingerprint([alone.student])


@pytest.mark.parametrize("name", METHODS)
def test_a_moving_average_continues_as_it_was_saved(name):
    settings = {"student": "cifar_resnet10_xxs", "ema": 0.9, "clip_grad": 1.0, "optimizer": "adamw"}
    goes_on_as_saved(toy(), name, {}, **settings)


@pytest.mark.parametrize(("name", "options"), [case for case in sets(OPTIONS) if case.values[0] in SYMMETRIC])
def test_peers_may_be_swapped(name, options):
    subject = toy().subject(name, options)
    for phase, given in subject.lessons:
        here, there = remade(given), remade(given)
        there = replace(there, mentors=[there.mentors[m] for m in (0, 2, 1)])
        losses, grads = [], []
        for lesson in (here, there):
            loss, reached = total(subject.terms(phase, lesson)), list(leaves(lesson).values())
            losses.append(loss.item())
            grads.append(torch.autograd.grad(loss, reached, allow_unused=True, materialize_grads=True))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-5)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@EVERY
def test_what_a_method_needs_is_enforced(name, options):
    """Settings under which the equation has no meaning are refused, by the method's name and with the cure."""
    method = methods.build(name, options)
    for need, settings, words, cure in REFUSED:
        if need in method.needs:
            with pytest.raises(RecipeError, match=words) as caught:
                toy().learner(name, options, **settings)
            assert f"method {name}" in caught.value.message
            assert cure in caught.value.hint
    if method.teachers:
        number = f"needs {method.teachers} mentors?, and the classroom has {method.teachers - 1 or 'none'}"
        with pytest.raises(RecipeError, match=f"method {name} {number}") as caught:
            toy().learner(name, options, mentors=method.teachers - 1)
        assert "--teacher" in caught.value.hint


def test_a_name_that_no_method_has_is_refused_as_an_option():
    for name in METHODS:
        with pytest.raises(RecipeError, match=r"toy: method\.zzz"):
            methods.build(name, {"zzz": 1}, "toy")


def test_a_users_method_has_its_file_and_class_in_refusals():
    name = f"{Path(__file__).parent / 'rogues.py'}:Refuses"
    with pytest.raises(RecipeError, match="method Refuses needs hard labels"):
        toy().learner(name, {}, mixup=0.2)
