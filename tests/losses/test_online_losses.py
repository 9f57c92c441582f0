"""What students teach each other, against plain Python."""

import itertools
import math

import pytest
import torch

from kdcli.losses.online import attended, gated, mutual_loss, peer_loss, ramp

OUTS = [[[1.0, 0.5, -0.5], [0.2, 0.1, 0.3]], [[3.0, 0.0, -1.0], [-1.0, 0.5, 2.0]], [[0.4, 0.3, 0.2], [0.0, 0.0, 1.0]]]


def softmax(row: list[float], tau: float = 1.0) -> list[float]:
    powers = [math.exp(z / tau) for z in row]
    return [power / sum(powers) for power in powers]


def divergence(target: list[float], student: list[float], tau: float, eps: float = 1e-7) -> float:
    p, q = [one + eps for one in softmax(target, tau)], softmax(student, tau)
    return tau**2 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("eps", [1e-7, 1e-2])
def test_peer_loss_by_hand(eps):
    found = peer_loss(torch.tensor(OUTS[0]), torch.tensor(OUTS[1]), tau=3.0, eps=eps)
    expected = [divergence(t, s, 3.0, eps) for t, s in zip(OUTS[1], OUTS[0], strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert peer_loss(torch.tensor(OUTS[0]), torch.tensor(OUTS[0])).abs().max() < 1e-5  # nothing to learn


@pytest.mark.parametrize("pairwise", [True, False])
def test_mutual_loss_by_hand(pairwise):
    expected = []
    for i in range(2):
        total = 0.0
        for j in range(3):
            others = [k for k in range(3) if k != j]
            if pairwise:
                total += sum(divergence(OUTS[k][i], OUTS[j][i], 3.0) for k in others) / 2
            else:
                mean = [sum(OUTS[k][i][c] for k in others) / 2 for c in range(3)]
                total += divergence(mean, OUTS[j][i], 3.0)
        expected.append(total)
    assert mutual_loss(torch.tensor(OUTS), tau=3.0, pairwise=pairwise).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pairwise", [True, False])
def test_who_is_aimed_at_learns_only_when_asked(pairwise):
    fixed, moved = (torch.tensor(OUTS, requires_grad=True) for _ in range(2))
    mutual_loss(fixed, pairwise=pairwise).sum().backward()
    mutual_loss(moved, pairwise=pairwise, through=True).sum().backward()
    assert not torch.allclose(fixed.grad, moved.grad, atol=1e-3)
    # with the aim fixed the gradient of D is tau (q - p), here of the first student towards its aim
    q = torch.tensor([softmax(row, 3.0) for row in OUTS[0]])
    aims = [[OUTS[1][i], OUTS[2][i]] for i in range(2)]
    if pairwise:
        p = torch.tensor([[sum(x) / 2 for x in zip(*(softmax(a, 3.0) for a in aim), strict=True)] for aim in aims])
    else:
        p = torch.tensor([softmax([sum(x) / 2 for x in zip(*aim, strict=True)], 3.0) for aim in aims])
    assert torch.allclose(fixed.grad[0], 3.0 * (q - p), atol=1e-5)


def test_gated_by_hand():
    gate = [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]
    found = gated(torch.tensor(OUTS), torch.tensor(gate))
    for i, c in itertools.product(range(2), range(3)):
        assert found[i, c].item() == pytest.approx(sum(gate[i][n] * OUTS[n][i][c] for n in range(3)))


def test_attended_by_hand():
    queries = [[[1.0, 2.0], [0.0, 1.0]], [[-1.0, 0.5], [2.0, 2.0]], [[0.0, 0.0], [1.0, -1.0]]]
    keys = [[[0.5, 0.5], [1.0, 0.0]], [[1.0, -1.0], [0.3, 0.1]], [[2.0, 0.0], [0.0, 1.0]]]
    found = attended(torch.tensor(OUTS), torch.tensor(queries), torch.tensor(keys))
    for a, i in itertools.product(range(3), range(2)):
        w = softmax([sum(x * y for x, y in zip(queries[a][i], keys[b][i], strict=True)) for b in range(3)])
        for c in range(3):
            assert found[a, i, c].item() == pytest.approx(sum(w[b] * OUTS[b][i][c] for b in range(3)), abs=1e-5)


def test_ramp():
    assert [ramp(e, epochs=80) for e in (0, 40, 80, 200)] == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])
    assert ramp(0.0, epochs=0) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    outs = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]], [[0.0, 0.0, 0.0]]], dtype=dtype).requires_grad_()
    for pairwise, through in itertools.product([True, False], repeat=2):
        loss = mutual_loss(outs, pairwise=pairwise, through=through).sum()
        (grad,) = torch.autograd.grad(loss, outs)
        assert loss.isfinite()
        assert grad.isfinite().all()
    vectors = 1e3 * torch.randn(3, 1, 2, dtype=torch.float32)
    loss = peer_loss(outs, attended(outs, vectors, vectors)).sum()
    (grad,) = torch.autograd.grad(loss, outs)
    assert grad.isfinite().all()
