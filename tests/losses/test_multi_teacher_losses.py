"""Weights over teachers, each against plain Python, and the quadratic programme against an exhaustive search."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kdcli.losses.classroom_kd import soft_loss
from kdcli.losses.multi_teacher import confidence_weights, entropy_weights, least_norm_weights, mean_gradients

STUDENT = [[1.0, 0.5, -0.5], [0.2, 0.1, 0.3]]
MENTORS = [[[3.0, 0.0, -1.0], [-1.0, 0.5, 2.0]], [[0.4, 0.3, 0.2], [0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]]]


def softmax(row: list[float], tau: float = 1.0) -> list[float]:
    powers = [math.exp(z / tau) for z in row]
    return [power / sum(powers) for power in powers]


def test_entropy_weights_by_hand():
    entropy = [[-sum(p * math.log(p) for p in softmax(row)) for row in mentor] for mentor in MENTORS]
    w = entropy_weights(torch.tensor(MENTORS))
    for m, i in itertools.product(range(3), range(2)):
        share = entropy[m][i] / sum(each[i] for each in entropy)
        assert w[m, i].item() == pytest.approx(1 - share, rel=1e-5)
    assert torch.allclose(w.sum(0), torch.full((2,), 2.0))  # M - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_entropy_of_teachers_without_any_doubt(dtype):
    sure = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]], dtype=dtype)
    assert torch.equal(entropy_weights(sure), torch.full((2, 1), 0.5))
    mixed = torch.tensor([[[1e4, -1e4, 0.0]], [[1.0, 1.0, 0.0]]], dtype=dtype)
    assert torch.equal(entropy_weights(mixed), torch.tensor([[1.0], [0.0]]))


def test_confidence_weights_by_hand():
    ce = [[0.1, 2.0], [0.7, 1.0], [3.0, 0.0]]
    w = confidence_weights(torch.tensor(ce))
    for m, i in itertools.product(range(3), range(2)):
        share = math.exp(ce[m][i]) / sum(math.exp(each[i]) for each in ce)
        assert w[m, i].item() == pytest.approx((1 - share) / 2, rel=1e-5)
    assert torch.allclose(w.sum(0), torch.ones(2))
    assert torch.equal(confidence_weights(torch.tensor([[0.0], [2e4]])), torch.tensor([[1.0], [0.0]]))


def test_mean_gradients_are_autograds():
    student = torch.tensor(STUDENT, requires_grad=True)
    g = mean_gradients(student, torch.tensor(MENTORS), tau=4.0)
    for m in range(3):
        loss = soft_loss(student, torch.tensor(MENTORS[m]), tau=4.0).mean()
        (expected,) = torch.autograd.grad(loss, student)
        assert torch.allclose(g[m], expected.mean(0), atol=1e-6)


def problems() -> list[tuple[Tensor, float]]:
    """Gradients and bounds: of two to six teachers, well and badly conditioned, with and without a bound at work."""
    torch.manual_seed(0)
    out = []
    for n in range(60):
        m = 2 + n % 5
        g = torch.randn(m, 12) * torch.rand(m, 1)
        if n % 3 == 0:  # nearly one direction
            g = g + 3 * torch.randn(1, 12)
        if n % 3 == 1:  # of very different lengths
            g = g * torch.logspace(0, -3, m)[:, None]
        out.append((g * 10.0 ** (n % 7 - 5), float(torch.empty(1).uniform_(1 / m + 0.01, 1.2))))
    return out


def exhausted(g: Tensor, c: float) -> np.ndarray:
    """The best of the solutions of every choice of weights at 0, at c and between."""
    a = g.double().numpy()
    a = a / np.abs(a).max()
    m, q = len(a), a @ a.T
    best, found = math.inf, np.zeros(m)
    for kinds in itertools.product((0, 1, 2), repeat=m):
        w = np.array([c if kind == 1 else 0.0 for kind in kinds])
        free = [i for i, kind in enumerate(kinds) if kind == 2]
        if free:
            n = len(free)
            system = np.ones((n + 1, n + 1))
            system[:n, :n], system[n, n] = q[np.ix_(free, free)], 0.0
            w[free] = np.linalg.lstsq(system, np.r_[-(q @ w)[free], 1 - w.sum()], rcond=None)[0][:n]
        if abs(w.sum() - 1) < 1e-9 and w.min() > -1e-9 and w.max() < c + 1e-9 and w @ q @ w < best - 1e-14:
            best, found = w @ q @ w, w
    return found


def test_least_norm_weights_are_exact():
    bound = set()
    for g, c in problems():
        w = least_norm_weights(g, C=c).double().numpy()
        exact = exhausted(g, c)
        assert np.abs(w - exact).max() < 1e-5, (len(g), c)
        bound |= {"zero"} if exact.min() < 1e-9 else set()
        bound |= {"C"} if exact.max() > c - 1e-9 else set()
    assert bound == {"zero", "C"}  # both kinds of bounds were at work


def test_least_norm_weights_against_scipy():
    for g, c in problems()[2::6]:  # the well conditioned, where SLSQP finds the end
        a = g.double().numpy() / float(g.abs().max())
        start = np.full(len(a), 1 / len(a))
        sum_to_one = {"type": "eq", "fun": lambda w: w.sum() - 1}
        found = minimize(
            lambda w, a=a: ((w @ a) ** 2).sum(), start, jac=lambda w, a=a: 2 * a @ (w @ a), method="SLSQP",
            bounds=[(0, c)] * len(a), constraints=[sum_to_one], options={"ftol": 1e-15, "maxiter": 500},
        )  # fmt: skip
        assert np.abs(least_norm_weights(g, C=c).double().numpy() - found.x).max() < 1e-5


def test_least_norm_weights_at_the_edges():
    third = torch.full((3,), 1 / 3)
    assert torch.allclose(least_norm_weights(torch.zeros(3, 5)), third)
    assert torch.allclose(least_norm_weights(torch.ones(3, 5)), third)  # equal teachers weigh alike
    assert torch.allclose(least_norm_weights(torch.randn(3, 5), C=1 / 3), third)  # nothing else is allowed
    opposed = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    assert torch.allclose(least_norm_weights(opposed, C=1.0), torch.tensor([0.75, 0.25]), atol=1e-6)
    assert torch.allclose(least_norm_weights(opposed, C=0.6), torch.tensor([0.6, 0.4]), atol=1e-6)
    assert torch.allclose(least_norm_weights(1e-9 * opposed, C=0.6), torch.tensor([0.6, 0.4]), atol=1e-6)


def test_least_norm_weights_of_unit_gradients():
    g = torch.tensor([[1.0, 0.0, 0.0], [0.0, 10.0, 0.0], [0.0, 0.0, 0.1]])
    # unit vectors at right angles weigh alike; then each is divided by its length
    assert torch.allclose(least_norm_weights(g, normalise=True), torch.tensor([1.0, 0.1, 10.0]) / 11.1, atol=1e-6)
    assert least_norm_weights(torch.zeros(3, 5), normalise=True).isfinite().all()


def test_least_norm_weights_follow_the_teachers():
    g = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    order = [2, 0, 3, 1]
    assert torch.allclose(least_norm_weights(g)[order], least_norm_weights(g[order]), atol=1e-6)


def test_least_norm_weights_read_nothing_back():
    with FakeTensorMode():
        assert least_norm_weights(torch.randn(4, 7)).shape == (4,)
