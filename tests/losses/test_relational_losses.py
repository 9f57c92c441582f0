"""PKT and RKD against loops over single numbers."""

import math

import pytest
import torch
from torch import Tensor

from kdcli.losses.relational import probabilistic_loss, relational_loss


def vectors(dims: int, batch: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batch, dims, generator=torch.Generator().manual_seed(seed))


def smooth_l1(a: float, b: float) -> float:
    d = abs(a - b)
    return 0.5 * d * d if d < 1 else d - 0.5


def length(row: list[float]) -> float:
    return math.sqrt(sum(value * value for value in row))


def test_pkt_is_its_definition():
    student, mentor = vectors(3), vectors(4, seed=1)
    near = []
    for rows in (student.tolist(), mentor.tolist()):
        rows = [[value / (length(row) + 1e-7) for value in row] for row in rows]
        cosine = [[(sum(x * y for x, y in zip(a, b, strict=True)) + 1) / 2 for b in rows] for a in rows]
        near.append([[value / sum(row) for value in row] for row in cosine])
    total = 0.0
    for q_row, p_row in zip(*near, strict=True):
        total += sum(p * math.log((p + 1e-7) / (q + 1e-7)) for q, p in zip(q_row, p_row, strict=True))
    assert probabilistic_loss(student, mentor).item() == pytest.approx(total / 25, rel=1e-4)


def test_pkt_sees_only_directions_between():
    student = vectors(6)
    turn = torch.linalg.qr(vectors(6, 6, seed=2))[0]
    assert probabilistic_loss(student, 9 * student @ turn).item() == pytest.approx(0, abs=1e-8)
    assert probabilistic_loss(student, student[[1, 0, 2, 3, 4]]) > 1e-3


def angles_by_hand(rows: list[list[float]]) -> list[float]:
    out = []
    for a in rows:
        unit = []
        for b in rows:
            away = [y - x for x, y in zip(a, b, strict=True)]
            unit.append([value / (length(away) or 1.0) for value in away])
        out += [sum(x * y for x, y in zip(u, v, strict=True)) for u in unit for v in unit]
    return out


def distances_by_hand(rows: list[list[float]]) -> list[float]:
    found = [length([y - x for x, y in zip(a, b, strict=True)]) for a in rows for b in rows]
    positive = [value for value in found if value > 0]
    return [value * len(positive) / sum(positive) for value in found]


@pytest.mark.parametrize("part", [2**26, 60, 1])  # whole, in parts of several vertices, vertex by vertex
def test_rkd_is_its_definition(part):
    student, mentor = vectors(3), 4 * vectors(4, seed=1)
    distance, angle = relational_loss(student, mentor, w_distance=25.0, w_angle=50.0, part=part)
    d = [distances_by_hand(x.tolist()) for x in (student, mentor)]
    a = [angles_by_hand(x.tolist()) for x in (student, mentor)]
    assert distance.item() == pytest.approx(25 * sum(map(smooth_l1, *d)) / 25, rel=1e-4)
    assert angle.item() == pytest.approx(50 * sum(map(smooth_l1, *a)) / 125, rel=1e-4)


@pytest.mark.parametrize("part", [60, 1])
def test_rkd_in_parts_has_the_gradient_of_the_whole(part):
    student, mentor = vectors(3).requires_grad_(), vectors(4, seed=1)
    (whole,) = torch.autograd.grad(sum(relational_loss(student, mentor)), student)
    (parts,) = torch.autograd.grad(sum(relational_loss(student, mentor, part=part)), student)
    torch.testing.assert_close(parts, whole)
    assert whole.abs().max() > 1e-2


def test_rkd_sees_neither_place_nor_size_nor_turn():
    student = vectors(6)
    turn = torch.linalg.qr(vectors(6, 6, seed=2))[0]
    for value in relational_loss(student, 3 * student @ turn + 10):
        assert value.item() == pytest.approx(0, abs=1e-6)
    assert all(value > 1e-2 for value in relational_loss(student, student[[1, 0, 2, 3, 4]]))


def test_rkds_weights():
    student, mentor = vectors(3), vectors(4, seed=1)
    one, two = relational_loss(student, mentor, w_distance=1, w_angle=1)
    three, four = relational_loss(student, mentor, w_distance=3, w_angle=4)
    torch.testing.assert_close(torch.stack([three, four]), torch.stack([3 * one, 4 * two]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_samples_at_one_place_and_huge_ones_give_numbers(dtype):
    some = vectors(8)
    kinds = (torch.zeros(5, 8), some, 1e4 * some.sign(), some[[0, 0, 1, 1, 2]], 1e-3 * some)
    for student in kinds:
        for mentor in kinds:
            for loss in (probabilistic_loss, lambda s, t: sum(relational_loss(s, t))):
                given = student.to(dtype).requires_grad_()
                value = loss(given, mentor.to(dtype))
                (grad,) = torch.autograd.grad(value, given)
                assert value.dtype == torch.float32
                assert torch.isfinite(value)
                assert torch.isfinite(grad).all()


def test_two_samples_at_one_place_draw_no_boundless_gradient():
    student = vectors(8)[[0, 0, 1, 2, 3]].requires_grad_()
    (grad,) = torch.autograd.grad(relational_loss(student, vectors(8, seed=1))[1], student)
    assert grad.abs().max() < 1e3
