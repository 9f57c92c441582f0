"""Every equation of the losses against numbers worked out one mentor, sample and class at a time in plain Python."""

import math

import pytest
import torch
from torch import Tensor

from kdcli.losses import classroom_kd as losses

TARGET = [0, 2, 1]
STUDENT = [[1.0, 0.5, -0.5], [0.2, 0.1, 0.3], [-1.0, 0.0, 1.0]]  # [B, K]
MENTORS = [  # [M, B, K]
    [[3.0, 0.0, -1.0], [-1.0, 0.5, 2.0], [0.0, 2.5, -0.5]],
    [[0.4, 0.3, 0.2], [0.0, 0.0, 1.0], [1.0, 0.5, 0.0]],
]
EVERYONE = [STUDENT, *MENTORS]


def softmax(logits: list[float], tau: float = 1.0) -> list[float]:
    """Eq. 2."""
    powers = [math.exp(z / tau) for z in logits]
    return [power / sum(powers) for power in powers]


def divergence(mentor: list[float], student: list[float], tau: float) -> float:
    """Eq. 7 of one sample."""
    p, q = softmax(mentor, tau), softmax(student, tau)
    return tau**2 * sum(p[k] * (math.log(p[k]) - math.log(q[k])) for k in range(len(p)))


def true_class(logits: list[list[float]]) -> list[float]:
    """Eq. 3 of every sample."""
    return [softmax(row)[y] for row, y in zip(logits, TARGET, strict=True)]


def near(tensor: Tensor, expected: object, atol: float = 1e-6) -> None:
    torch.testing.assert_close(tensor, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=atol)


def test_eq_2_3_the_mark_is_the_true_class_probability():
    log_p = losses.log_mark(torch.tensor(EVERYONE), torch.tensor(TARGET))
    assert log_p.shape == (3, 3)
    near(log_p.exp(), [true_class(model) for model in EVERYONE])


def test_eq_3_is_one_over_exp_of_cross_entropy():
    ce = torch.nn.functional.cross_entropy(torch.tensor(STUDENT), torch.tensor(TARGET), reduction="none")
    torch.testing.assert_close(losses.log_mark(torch.tensor(STUDENT), torch.tensor(TARGET)).exp(), 1 / ce.exp())


def test_the_mark_of_a_hopeless_answer_does_not_underflow():
    log_p = losses.log_mark(torch.tensor([[1e4, -1e4]]), torch.tensor([1]))
    assert log_p.item() == -2e4


def test_eq_4_arithmetic():
    log_p = torch.tensor([true_class(model) for model in EVERYONE]).log()
    expected = [sum(true_class(model)) / 3 for model in EVERYONE]
    near(losses.log_batch_mark(log_p, mark_mean="arithmetic").exp(), expected)


def test_algorithm_1_geometric():
    log_p = torch.tensor([true_class(model) for model in EVERYONE]).log()
    expected = [math.prod(true_class(model)) ** (1 / 3) for model in EVERYONE]
    near(losses.log_batch_mark(log_p, mark_mean="geometric").exp(), expected)


def test_the_two_means_differ_and_geometric_is_the_smaller():
    log_p = torch.tensor([[0.9, 0.1, 0.5]]).log()
    geometric, arithmetic = (losses.log_batch_mark(log_p, mark_mean=m).exp() for m in ("geometric", "arithmetic"))
    near(arithmetic, [0.5])
    near(geometric, [0.045 ** (1 / 3)])
    assert geometric < arithmetic - 0.1


def test_eq_5_shares_times_the_number_of_mentors():
    w = [0.2, 0.5, 0.1, 0.4]  # student, teacher, two peers
    r = losses.rank_by_share(torch.tensor(w).log())
    near(r, [3 * x / 1.2 for x in w])
    assert r.sum().item() == pytest.approx(3)


def test_eq_5_of_every_sample():
    w = [[0.2, 0.9], [0.5, 0.3]]
    near(losses.rank_by_share(torch.tensor(w).log()), [[0.2 / 0.7, 0.9 / 1.2], [0.5 / 0.7, 0.3 / 1.2]])


def test_eq_5_official_rounds_shares_before_multiplying():
    w = [0.2, 0.5, 0.1, 0.4]
    r = losses.rank_by_share(torch.tensor(w).log(), decimals=2)
    near(r, [3 * round(x / 1.2, 2) for x in w])
    assert r[0].item() == pytest.approx(0.51)  # 0.1667 -> 0.17, not round(0.5, 2)


def test_eq_5_when_nobody_knows_anything():
    r = losses.rank_by_share(torch.tensor([-2e4, -2e4, -2e4]))
    near(r, [2 / 3] * 3)


def test_eq_6_to_9_gap_of_every_denominator():
    r_s, r_m = 0.4, [1.0, 0.1]
    for gap, epsilon in {"max": [1.0, 0.4], "mentor": [1.0, 0.1], "student": [0.4, 0.4]}.items():
        expected = [abs(m - r_s) / e for m, e in zip(r_m, epsilon, strict=True)]
        near(losses.performance_gap(torch.tensor(r_m), torch.tensor(r_s), gap=gap), expected)  # pyright: ignore


def test_eq_8_of_ranks_that_are_zero():
    zero = torch.zeros(2)
    for gap in ("max", "mentor", "student"):
        near(losses.performance_gap(zero, zero[0], gap=gap), [0.0, 0.0])
    near(losses.performance_gap(torch.ones(1), zero[0], gap="student"), [losses.GAP_LIMIT])
    near(losses.performance_gap(zero[:1], torch.tensor(1.0), gap="mentor"), [losses.GAP_LIMIT])


def test_eq_8_at_its_limit_gives_the_loss_its_limit():
    """Where the gap is cut the tempered divergence no longer depends on the temperature."""
    student, mentor = torch.tensor(STUDENT).double(), torch.tensor(MENTORS[0]).double()
    d = (mentor - mentor.mean(-1, keepdim=True)) - (student - student.mean(-1, keepdim=True))
    limit = d.square().sum(-1) / (2 * 3)
    at = losses.soft_loss(student, mentor, tau=1 + 12 * losses.GAP_LIMIT)
    torch.testing.assert_close(at.double(), limit, rtol=0.1, atol=0.1)  # the rest is float32's rounding


@pytest.mark.parametrize("tau", [1.0, 4.0, 12.5])
def test_eq_7(tau):
    expected = [[divergence(m, s, tau) for m, s in zip(mentor, STUDENT, strict=True)] for mentor in MENTORS]
    near(losses.soft_loss(torch.tensor(STUDENT), torch.tensor(MENTORS), tau=tau), expected, atol=tau**2 * 5e-7)


def test_eq_7_with_a_temperature_for_every_mentor_and_sample():
    tau = [[1.0, 2.0, 3.0], [4.0, 5.0, 13.0]]
    expected = [[divergence(MENTORS[m][b], STUDENT[b], tau[m][b]) for b in range(3)] for m in range(2)]
    near(losses.soft_loss(torch.tensor(STUDENT), torch.tensor(MENTORS), tau=torch.tensor(tau)), expected, atol=1e-4)


def test_eq_7_has_the_mentor_as_its_reference():
    p, q = torch.tensor(MENTORS[0]), torch.tensor(STUDENT)
    there, back = losses.soft_loss(q, p, tau=1.0), losses.soft_loss(p, q, tau=1.0)
    assert (there - back).abs().max() > 0.1
    assert losses.soft_loss(p, p, tau=4.0).abs().max() < 1e-5


def test_eq_7_gradient_is_tau_times_the_difference_of_probabilities():
    student = torch.tensor(STUDENT, requires_grad=True)
    losses.soft_loss(student, torch.tensor(MENTORS[0]), tau=4.0).sum().backward()
    expected = [
        [4 * (q - p) for q, p in zip(softmax(s, 4.0), softmax(m, 4.0), strict=True)]
        for s, m in zip(STUDENT, MENTORS[0], strict=True)
    ]
    assert student.grad is not None
    near(student.grad, expected)


def test_eq_13_14_places_from_the_worst():
    near(losses.rank_by_position(torch.tensor([0.3, 0.9, 0.1, 0.5]).log()), [0.2, 0.4, 0.1, 0.3])
    near(losses.rank_by_position(torch.tensor([0.3, 0.9, 0.1]).log(), lambda_=0.5), [1.0, 1.5, 0.5])


def test_eq_13_of_every_sample_and_with_ties():
    w = torch.tensor([[0.3, 0.2], [0.9, 0.2], [0.1, 0.2]])
    near(losses.rank_by_position(w.log()), [[0.2, 0.1], [0.3, 0.2], [0.1, 0.3]])


def test_everything_is_computed_in_float32():
    student, mentors = torch.tensor(STUDENT).bfloat16(), torch.tensor(MENTORS).half()
    assert losses.soft_loss(student, mentors, tau=4.0).dtype == torch.float32
    assert losses.log_mark(mentors, torch.tensor(TARGET)).dtype == torch.float32
    exact = losses.soft_loss(student.float(), mentors.float(), tau=4.0)
    torch.testing.assert_close(losses.soft_loss(student, mentors, tau=4.0), exact)
