"""Factors and activation boundaries, against loops."""

import math

import pytest
import torch

from kdcli.losses.feature_pretraining import boundary_loss, factor_loss


def two(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 3, 2, 2, generator=generator)


def normal(row):
    length = math.sqrt(sum(x * x for x in row))
    return [x / length for x in row]


@pytest.mark.parametrize("p2", [1.0, 2.0])
def test_factors_of_the_paper_by_hand(p2):
    s, t = two()
    total = 0.0
    for b in range(2):
        total += sum(
            abs(x - y) ** p2
            for x, y in zip(normal(s[b].flatten().tolist()), normal(t[b].flatten().tolist()), strict=True)
        )
    assert factor_loss(s, t, p2=p2).item() == pytest.approx(total / s.numel(), rel=1e-4)


@pytest.mark.parametrize("p1", [1.0, 2.0])
def test_factors_of_the_code_by_hand(p1):
    s, t = two(1)
    total = 0.0
    for b in range(2):
        maps = [
            normal([sum(abs(v) ** p1 for v in x[b, :, n // 2, n % 2].tolist()) / 3 for n in range(4)]) for x in (s, t)
        ]
        total += sum(abs(x - y) for x, y in zip(*maps, strict=True))
    assert factor_loss(s, t, p1=p1, variant="official").item() == pytest.approx(total / 8, rel=1e-4)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_equal_factors_and_their_multiples_cost_nothing(variant):
    s, t = two(2)
    assert factor_loss(s, 3 * s, variant=variant).item() == pytest.approx(0, abs=1e-6)
    assert factor_loss(s, t, variant=variant).item() == pytest.approx(factor_loss(t, s, variant=variant).item())
    assert factor_loss(s, t, variant=variant) > 0.01
    assert (factor_loss(s, -s, variant=variant) > 0.01) == (variant == "paper")  # attention maps know no sign


@pytest.mark.parametrize("margin", [1.0, 0.5])
def test_boundaries_by_hand(margin):
    s, t = two(3)
    total = 0.0
    for x, y in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True):
        if y <= 0 and x > -margin:
            total += (x + margin) ** 2
        elif y > 0 and x <= margin:
            total += (x - margin) ** 2
    assert boundary_loss(s, t, margin=margin).item() == pytest.approx(total / 2, rel=1e-4)


def test_on_the_right_side_by_a_margin_costs_nothing():
    t = torch.tensor([2.0, -3.0, 0.0, 0.1]).reshape(1, 4, 1, 1)
    assert boundary_loss(torch.tensor([1.0, -1.0, -1.0, 5.0]).reshape(1, 4, 1, 1), t) == 0
    assert boundary_loss(torch.zeros(1, 4, 1, 1), t) == 4  # on the boundary: the margin from every side
