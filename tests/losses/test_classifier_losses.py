"""OFA's loss and SHAKE's logits, each against plain Python."""

import math

import pytest
import torch

from kdcli.losses.classifier import ofa_loss
from kdcli.losses.classroom_kd import soft_loss
from kdcli.losses.shake import standardise

STUDENT = [[1.0, 0.5, -0.5], [0.2, 0.1, 0.3]]
MENTOR = [[3.0, 0.0, -1.0], [-1.0, 0.5, 2.0]]
TARGET = [1, 2]


def softmax(row, tau):
    powers = [math.exp(z / tau) for z in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize(("eps", "tau"), [(1.0, 1.0), (1.5, 1.0), (0.7, 3.0)])
def test_ofa_by_hand(eps, tau):
    wanted = []
    for s, t, y in zip(STUDENT, MENTOR, TARGET, strict=True):
        p, q = softmax(t, tau), softmax(s, tau)
        weights = [(1 + p[c]) ** eps - 1 if c == y else p[c] ** eps for c in range(3)]
        wanted.append(-sum(w * math.log(q[c]) for c, w in enumerate(weights)))
    got = ofa_loss(torch.tensor(STUDENT), torch.tensor(MENTOR), torch.tensor(TARGET), eps=eps, tau=tau)
    assert got.tolist() == pytest.approx(wanted, rel=1e-5)


def test_ofa_at_eps_1_teaches_what_kd_teaches():
    """Cross-entropy of the teacher's answer: KL but for the teacher's own entropy, so the same gradient."""
    s, t = torch.tensor(STUDENT, requires_grad=True), torch.tensor(MENTOR)
    ofa = torch.autograd.grad(ofa_loss(s, t, torch.tensor(TARGET)).sum(), s)[0]
    kd = torch.autograd.grad(soft_loss(s, t, tau=1.0).sum(), s)[0]
    torch.testing.assert_close(ofa, kd)


def test_ofa_raises_the_true_class_where_eps_is_larger():
    s, t, y = torch.zeros(2, 3, requires_grad=True), torch.tensor(MENTOR), torch.tensor(TARGET)
    grads = [torch.autograd.grad(ofa_loss(s, t, y, eps=eps).sum(), s)[0] for eps in (1.0, 1.5)]
    for row, true in enumerate(TARGET):
        assert grads[1][row, true] < grads[0][row, true]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss", [ofa_loss, lambda s, t, y: standardise(s).square() + standardise(t)])
def test_extreme_logits(dtype, loss):
    rows = [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [0.0, 0.0, 1e4]]
    s = torch.tensor(rows, dtype=dtype).requires_grad_()
    value = loss(s, torch.tensor(rows[::-1], dtype=dtype), torch.tensor([1, 0, 0]))
    (grad,) = torch.autograd.grad(value.sum(), s)
    assert value.dtype == torch.float32
    assert torch.isfinite(value).all()
    assert torch.isfinite(grad).all()


def test_standardised_logits_by_hand():
    for row, got in zip(STUDENT, standardise(torch.tensor(STUDENT)).tolist(), strict=True):
        mean = sum(row) / 3
        deviation = math.sqrt(sum((z - mean) ** 2 for z in row) / 3 + 1e-7)
        assert got == pytest.approx([3.1415 * (z - mean) / deviation for z in row], rel=1e-5)
    torch.testing.assert_close(
        standardise(torch.tensor(STUDENT) * 7 + 3), standardise(torch.tensor(STUDENT)), rtol=1e-4, atol=1e-4
    )
