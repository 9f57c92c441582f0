"""Mentors' answers: one stack, in float32, the same whatever precision they think in."""

import engine_kit as kit
import pytest
import torch

from kdcli import weights
from kdcli.classroom import Member
from kdcli.data import Batch
from kdcli.mentors import Mentors


@pytest.fixture(autouse=True)
def _zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_HOME", str(kit.home()))


def members() -> list[Member]:
    return kit.seat(kit.recipe("classroom")).mentors


def batch(n: int = 24) -> Batch:
    return next(kit.seat(kit.recipe()).data.test.plain(n))


def test_answers_are_stacked_the_teacher_first() -> None:
    mentors, some = Mentors(members(), "fp32", kit.CPU), batch()
    found = mentors.answer(some)
    assert found is not None
    assert found.out.shape == (2, 24, 10)
    assert found.out.dtype == torch.float32
    assert [member.name for member in mentors.members] == ["cifar_resnet14", "cifar_resnet8"]
    with torch.no_grad():
        for row, member in zip(found.out, mentors.members, strict=True):
            torch.testing.assert_close(row, member(some.pixels))


def test_answers_may_be_part_of_a_loss() -> None:
    """They were made in inference mode, whose tensors no backward pass may keep: the stack must not be one."""
    found = Mentors(members(), "fp32", kit.CPU).answer(batch())
    assert found is not None
    assert not found.out.is_inference()
    assert not found.out.requires_grad
    x = torch.ones((), requires_grad=True)
    (x * found.out).square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad)


def test_bf16_mentors_answer_almost_alike_and_in_channels_last() -> None:
    some = batch(48)
    plain, quick = Mentors(members(), "fp32", kit.CPU), Mentors(members(), "bf16", kit.CPU)
    a, b = plain.answer(some), quick.answer(some)
    assert a is not None
    assert b is not None
    assert b.out.dtype == torch.float32
    scale = a.out.std(-1, keepdim=True)
    assert float(((a.out - b.out).abs() / scale).max()) < 0.2
    assert float(((a.out - b.out).abs() / scale).mean()) < 0.03
    assert float((a.out.argmax(-1) == b.out.argmax(-1)).float().mean()) > 0.9
    for member in quick.members:
        weights = [p for p in member.net.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
        assert weights
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
        assert {p.dtype for p in member.net.parameters()} == {torch.bfloat16}
        assert member.mean_.dtype == torch.float32  # pixels are normalised before anything is rounded


def test_mentors_are_frozen_and_in_eval_mode_whatever_they_were() -> None:
    awake = [member.train().requires_grad_(True) for member in members()]
    before = [weights.digest(member.net) for member in awake]  # running statistics too
    Mentors(awake, "fp32", kit.CPU).answer(batch())
    assert not any(module.training for member in awake for module in member.modules())
    assert not any(p.requires_grad for member in awake for p in member.parameters())
    assert [weights.digest(member.net) for member in awake] == before


def test_a_classroom_without_mentors_answers_nothing() -> None:
    assert Mentors([], "bf16", kit.CPU).answer(batch()) is None


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("n", [1, 2, 23])
def test_workers_that_share_a_batch_answer_as_one_does(workers: int, n: int) -> None:
    some, threads = batch(n), torch.get_num_threads()
    one = Mentors(members(), "fp32", kit.CPU, workers=1).answer(some)
    shared = Mentors(members(), "fp32", kit.CPU, workers=workers).answer(some)
    assert one is not None
    assert shared is not None
    assert shared.out.shape == (2, n, 10)
    assert not shared.out.is_inference()
    torch.testing.assert_close(shared.out, one.out, rtol=1e-5, atol=1e-5)
    assert torch.get_num_threads() == threads  # a worker's single thread is its own affair


def test_a_mentors_failure_in_a_worker_is_raised() -> None:
    mentors = Mentors(members(), "fp32", kit.CPU, workers=2)
    mentors.members[0].net.forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        mentors.answer(batch(4))
