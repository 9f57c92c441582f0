"""Every equation of the logit methods, worked out one sample and one class at a time in plain Python."""

import itertools
import math

import pytest
import torch

from kdcli.losses import logits as losses
from kdcli.losses.classroom_kd import soft_loss
from kdcli.losses.logits import NORM_FLOOR, SHARPNESS_FLOOR

STUDENT = [[1.0, 0.5, -0.5, 0.2], [0.2, 0.1, 0.6, -1.0], [2.0, 0.3, -0.4, 1.1]]
TEACHER = [[3.0, 0.0, -1.0, 0.5], [-1.0, 0.5, 2.0, 0.3], [0.1, 2.5, -0.5, 1.5]]
PEER = [[0.5, 1.0, 0.0, -0.3], [0.7, 0.2, 0.9, 0.1], [1.0, 1.2, 0.3, 2.2]]
TARGET = [0, 2, 1]
SAMPLES, CLASSES = range(3), range(4)


def softmax(row: list[float], tau: float = 1.0) -> list[float]:
    powers = [math.exp(z / tau) for z in row]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def without(row: list[float], y: int) -> list[float]:
    return [z for k, z in enumerate(row) if k != y]


def pearson(a: list[float], b: list[float]) -> float:
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    top = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(STUDENT, dtype=dtype), torch.tensor(TEACHER, dtype=dtype), torch.tensor(TARGET)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_dkd(tau):
    target_class, others = losses.dkd_loss(*tensors(), tau=tau)
    for b in SAMPLES:
        y = TARGET[b]
        p, q = softmax(TEACHER[b], tau)[y], softmax(STUDENT[b], tau)[y]
        assert target_class[b].item() == pytest.approx(tau**2 * kl([p, 1 - p], [q, 1 - q]), rel=1e-4)
        hand = tau**2 * kl(softmax(without(TEACHER[b], y), tau), softmax(without(STUDENT[b], y), tau))
        assert others[b].item() == pytest.approx(hand, rel=1e-4)


def test_dkd_parts_make_up_kd():
    """KL = TCKD + (1 - p_target) NCKD: the paper's own decomposition."""
    student, teacher, target = tensors()
    target_class, others = losses.dkd_loss(student, teacher, target, tau=2.0)
    rest = 1 - (teacher / 2).softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(target_class + rest * others, soft_loss(student, teacher, tau=2.0))


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_nkd(tau):
    target_class, others = losses.nkd_loss(*tensors(), tau=tau)
    for b in SAMPLES:
        y = TARGET[b]
        hand = -softmax(TEACHER[b])[y] * math.log(softmax(STUDENT[b])[y])  # at temperature 1 whatever tau
        assert target_class[b].item() == pytest.approx(hand, rel=1e-4)
        p, q = softmax(without(TEACHER[b], y), tau), softmax(without(STUDENT[b], y), tau)
        hand = -(tau**2) * sum(a * math.log(c) for a, c in zip(p, q, strict=True))
        assert others[b].item() == pytest.approx(hand, rel=1e-4)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_dist(tau):
    inter, intra = losses.dist_loss(*tensors()[:2], tau=tau)
    p, q = ([softmax(row, tau) for row in model] for model in (TEACHER, STUDENT))
    rows = sum(pearson(q[b], p[b]) for b in SAMPLES) / 3
    columns = sum(pearson([q[b][k] for b in SAMPLES], [p[b][k] for b in SAMPLES]) for k in CLASSES) / 4
    assert inter.item() == pytest.approx(tau**2 * (1 - rows), rel=1e-3)
    assert intra.item() == pytest.approx(tau**2 * (1 - columns), rel=1e-3)


def test_dist_says_nothing_of_scale():
    """A softmax's deviations times any positive number correlate as before: nothing is left to learn."""
    _, teacher, _ = tensors()
    inter, intra = losses.dist_loss(teacher, teacher, tau=4.0)
    assert inter.item() == pytest.approx(0, abs=1e-3)
    assert intra.item() == pytest.approx(0, abs=1e-3)
    inter, intra = losses.dist_loss(torch.zeros(3, 4), teacher, tau=1.0)  # a uniform answer correlates with nothing
    assert inter.item() == pytest.approx(1)
    assert intra.item() == pytest.approx(1)


def test_dist_of_two_samples_far_from_uniform_is_not_guarded():
    spread = (torch.tensor(STUDENT) / 4).softmax(-1)
    assert (spread - spread.mean(-1, keepdim=True)).norm(dim=-1).min() > 1e3 * NORM_FLOOR


def test_wsld():
    tau = 2.0
    found = losses.wsld_loss(*tensors(), tau=tau)
    for b in SAMPLES:
        ours, theirs = (-math.log(softmax(model[b])[TARGET[b]]) for model in (STUDENT, TEACHER))
        w = 1 - math.exp(-ours / (theirs + 1e-7))
        p, q = softmax(TEACHER[b], tau), softmax(STUDENT[b], tau)
        hand = tau**2 * w * -sum(a * math.log(c) for a, c in zip(p, q, strict=True))
        assert found[b].item() == pytest.approx(hand, rel=1e-4)


def test_wslds_weight_is_a_number_to_the_gradient():
    student, teacher, target = tensors()
    student.requires_grad_()
    (found,) = torch.autograd.grad(losses.wsld_loss(student, teacher, target, tau=2.0).sum(), student)
    w = 1 - torch.exp(
        -torch.nn.functional.cross_entropy(student, target, reduction="none")
        / torch.nn.functional.cross_entropy(teacher, target, reduction="none")
    )
    by_hand = 2.0 * w[:, None] * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1))
    torch.testing.assert_close(found, by_hand.detach())


def test_wsld_of_shares_is_that_of_class_numbers():
    student, teacher, target = tensors()
    shares = torch.nn.functional.one_hot(target, 4).float()
    torch.testing.assert_close(
        losses.wsld_loss(student, teacher, shares, tau=2.0), losses.wsld_loss(student, teacher, target, tau=2.0)
    )


@pytest.mark.parametrize("tau", [4.0, 12.0])
def test_dtkd(tau):
    student, teacher, _ = tensors()
    tau_s, tau_m = losses.dynamic_temperatures(student, teacher, tau=tau)
    found = losses.dtkd_loss(student, teacher, tau_s=tau_s, tau_m=tau_m)
    for b in SAMPLES:
        a, c = max(STUDENT[b]), max(TEACHER[b])
        t_s, t_t = 2 * a / (a + c) * tau, 2 * c / (a + c) * tau  # the sharper of the two has the higher one
        assert tau_s[b].item() == pytest.approx(t_s, rel=1e-5)
        assert tau_m[b].item() == pytest.approx(t_t, rel=1e-5)
        hand = t_s * t_t * kl(softmax(TEACHER[b], t_t), softmax(STUDENT[b], t_s))
        assert found[b].item() == pytest.approx(hand, rel=1e-3)
    torch.testing.assert_close(tau_s + tau_m, torch.full((3,), 2 * tau))


def test_dtkd_of_equal_logits_is_plain_distillation():
    student, teacher, _ = tensors()
    student = student - student.amax(-1, keepdim=True) + teacher.amax(-1, keepdim=True)
    tau_s, tau_m = losses.dynamic_temperatures(student, teacher, tau=4.0)
    found = losses.dtkd_loss(student, teacher, tau_s=tau_s, tau_m=tau_m)
    torch.testing.assert_close(found, soft_loss(student, teacher, tau=4.0))
    assert losses.dtkd_loss(teacher, teacher, tau_s=tau_m, tau_m=tau_m).abs().max() < 1e-5


def test_dtkd_learns_through_the_students_largest_logit():
    student, teacher, _ = (x.double() if x.is_floating_point() else x for x in tensors())

    def loss(x: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        tau_s, tau_m = losses.dynamic_temperatures(x.detach() if frozen else x, teacher, tau=4.0)
        return losses.dtkd_loss(x, teacher, tau_s=tau_s, tau_m=tau_m).sum()

    student.requires_grad_()
    (whole,), (part,) = (torch.autograd.grad(loss(student, frozen), student) for frozen in (False, True))
    largest = student.argmax(-1)
    for b, k in itertools.product(SAMPLES, CLASSES):
        if k == largest[b]:
            assert not math.isclose(whole[b, k].item(), part[b, k].item(), rel_tol=1e-2)
        else:
            assert whole[b, k].item() == pytest.approx(part[b, k].item(), rel=1e-4, abs=1e-6)


def test_dtkds_temperatures_stay_positive():
    low = torch.tensor([[-5.0, -6.0], [0.0, -1.0], [0.01, 0.0]])
    tau_s, tau_m = losses.dynamic_temperatures(low, torch.tensor([[3.0, 0.0]] * 3), tau=4.0)
    expected = 2 * SHARPNESS_FLOOR / (SHARPNESS_FLOOR + 3) * 4
    assert tau_s.tolist() == pytest.approx([expected] * 3)
    assert (tau_m < 8).all()


def test_ctkds_reversal():
    assert [losses.reversal(e) for e in (0, 5, 10, 11, 240)] == pytest.approx([0, -0.5, -1, -1, -1])
    hand = 0.5 * (math.cos(math.pi * 3 / 8) + 1) * (0.2 + 2) - 2
    assert losses.reversal(3, decay_max=0.2, decay_min=-2.0, decay_loops=8) == pytest.approx(hand)
    assert losses.reversal(1, decay_loops=0) == -1
    r = torch.tensor([0.1, -7.3, 1e-8], requires_grad=True)
    turned = losses.reversed_gradient(r, -0.25)
    assert turned.equal(r)
    (grad,) = torch.autograd.grad((turned**2).sum(), r)
    torch.testing.assert_close(grad, -0.25 * 2 * r.detach())


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_mlkds_relations(tau):
    p, q = ([softmax(row, tau) for row in model] for model in (TEACHER, STUDENT))
    between = 0.0
    for i, j in itertools.product(SAMPLES, SAMPLES):
        ours, theirs = (sum(m[i][k] * m[j][k] for k in CLASSES) for m in (q, p))
        between += (theirs - ours) ** 2 / 3
    alike = 0.0
    for k, n in itertools.product(CLASSES, CLASSES):
        ours, theirs = (sum(m[b][k] * m[b][n] for b in SAMPLES) for m in (q, p))
        alike += (theirs - ours) ** 2 / 4
    student, teacher, _ = tensors()
    assert losses.batch_level_loss(student, teacher, tau=tau).item() == pytest.approx(between, rel=1e-4)
    assert losses.class_level_loss(student, teacher, tau=tau).item() == pytest.approx(alike, rel=1e-4)


def every(student: torch.Tensor, mentor: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every loss of these files, one tensor each; dynamic temperatures included."""
    tau_s, tau_m = losses.dynamic_temperatures(student, mentor, tau=4.0)
    return {
        "dkd": torch.stack(losses.dkd_loss(student, mentor, target, tau=4.0)),
        "nkd": torch.stack(losses.nkd_loss(student, mentor, target, tau=1.0)),
        "dist": torch.stack(losses.dist_loss(student, mentor, tau=4.0)),
        "wsld": losses.wsld_loss(student, mentor, target, tau=2.0),
        "dtkd": losses.dtkd_loss(student, mentor, tau_s=tau_s, tau_m=tau_m),
        "class": losses.class_level_loss(student, mentor, tau=4.0),
        "batch": losses.batch_level_loss(student, mentor, tau=4.0),
    }


def test_several_mentors_are_each_for_themselves():
    student, teacher, target = tensors()
    mentors = torch.stack([teacher, torch.tensor(PEER)])
    both = every(student, mentors, target)
    for m in range(2):
        for name, one in every(student, mentors[m], target).items():
            stacked = both[name][:, m] if name in ("dkd", "nkd", "dist") else both[name][m]
            torch.testing.assert_close(stacked, one)


def test_the_mentor_itself_has_nothing_left_to_learn():
    _, teacher, target = tensors()
    for name, value in every(teacher, teacher, target).items():
        if name not in ("nkd", "wsld"):  # cross-entropies, least there but not nothing
            assert value.abs().max() < (1e-4 if name == "dist" else 1e-5), name  # its eps is 16e-8 of a norm's square
    for part in ("wsld", "nkd"):  # of NKD's two only the other classes' is least there
        student = teacher.clone().requires_grad_()
        value = every(student, teacher, target)[part]
        (grad,) = torch.autograd.grad(value.sum() if part == "wsld" else value[1].sum(), student)
        assert grad.abs().max() < 1e-5


def test_losses_are_computed_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        student, teacher, target = tensors(dtype)
        low, exact = every(student, teacher, target), every(student.float(), teacher.float(), target)
        for name, value in low.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, exact[name])


def patterns(target: torch.Tensor) -> dict[str, torch.Tensor]:
    right = torch.nn.functional.one_hot(target, 4).float()
    wrong = right.roll(1, -1)
    return {
        "right": 2e4 * right - 1e4,
        "wrong": 2e4 * wrong - 1e4,
        "spike": 1e4 * wrong,
        "high": torch.full_like(right, 1e4),
        "low": torch.full_like(right, -1e4),
        "zero": torch.zeros_like(right),
        "onehot": right,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_logits_stay_finite_forward_and_backward(dtype):
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    for ours, theirs in itertools.product(patterns(target).items(), patterns(target).items()):
        for name in every(torch.randn(6, 4), torch.randn(6, 4), target):
            student = ours[1].to(dtype).requires_grad_()
            value = every(student, theirs[1].to(dtype), target)[name]
            (grad,) = torch.autograd.grad(value.sum() / 6, student)
            assert torch.isfinite(value).all(), (name, ours[0], theirs[0])
            assert torch.isfinite(grad).all(), (name, ours[0], theirs[0])
            assert grad.dtype == dtype
