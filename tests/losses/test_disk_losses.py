"""DiSK's equations, one sample and one class at a time in plain Python."""

import itertools
import math

import pytest
import torch

from kdcli.losses import disk
from kdcli.losses.classroom_kd import log_mark, soft_loss

STUDENT = [[1.0, 0.5, -0.5, 0.2], [0.2, 0.1, 0.6, -1.0], [-1.0, 0.4, 1.0, 2.0]]
TEACHER = [[3.0, 0.0, -1.0, 1.0], [-1.0, 0.5, 2.0, 0.0], [0.0, 2.5, -0.5, 1.5]]
TARGET = [0, 1, 2]
G = [0.25, 0.7, 0.02]


def softmax(row: list[float], tau: float = 1.0) -> list[float]:
    powers = [math.exp(z / tau) for z in row]
    return [power / sum(powers) for power in powers]


def top(row: list[float], k: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda c: -row[c])[:k])


def by_hand(k: int, tau: float, tau_s: float, label: bool, form: str) -> list[float]:
    out = []
    for s, t, y, g in zip(STUDENT, TEACHER, TARGET, G, strict=True):
        mask = top(t, k) | ({y} if label else set())
        given = [
            z / tau if c in mask or form == "full" else min(t) if form == "minimum" else 0 for c, z in enumerate(t)
        ]
        q = softmax(given)
        if form != "full":
            q = [share if c in mask else 0.0 for c, share in enumerate(q)]
        p = softmax(s, tau_s)
        out.append(-tau * tau_s * sum(q[c] * math.log(p[c] + (g if c in mask else 0)) for c in range(4)))  # Eq. 4
    return out


def guided(k: int = 2, tau: float = 4.0, tau_s: float = 4.0, label: bool = False, form: str = "full", g=G, **over):
    student, teacher = (torch.tensor(over.get(name, x)) for name, x in (("student", STUDENT), ("teacher", TEACHER)))
    mask = disk.guided_classes(teacher, torch.tensor(TARGET) if label else None, K=k)
    target = disk.guided_target(teacher, mask, tau=tau, form=form)  # pyright: ignore[reportArgumentType]
    return disk.guided_loss(student, target, mask, torch.tensor(g).log(), tau=tau, tau_s=tau_s)


@pytest.mark.parametrize("k", [1, 2, 3, 20])
@pytest.mark.parametrize(("tau", "tau_s"), [(4.0, 4.0), (4.0, 3.0), (1.0, 2.0)])
@pytest.mark.parametrize("label", [False, True])
@pytest.mark.parametrize("form", ["full", "minimum", "zero"])
def test_eq_4(k, tau, tau_s, label, form):
    assert guided(k, tau, tau_s, label, form).tolist() == pytest.approx(
        by_hand(k, tau, tau_s, label, form), rel=1e-5, abs=1e-6
    )


def test_the_label_joins_the_teachers_best():
    teacher = torch.tensor(TEACHER)
    assert disk.guided_classes(teacher, K=1).int().tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]
    with_label = disk.guided_classes(teacher, torch.tensor(TARGET), K=1)
    assert with_label.int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]


def test_without_help_it_is_kd_to_the_gradient():
    student = torch.tensor(STUDENT, requires_grad=True)
    mask = disk.guided_classes(torch.tensor(TEACHER), K=2)
    target = disk.guided_target(torch.tensor(TEACHER), mask, tau=4.0)
    none = disk.guided_loss(student, target, mask, torch.full((3,), -math.inf), tau=4.0, tau_s=4.0)
    (ours,) = torch.autograd.grad(none.sum(), student)
    (theirs,) = torch.autograd.grad(soft_loss(student, torch.tensor(TEACHER), tau=4.0).sum(), student)
    torch.testing.assert_close(ours, theirs)
    entropy = [-16 * sum(q * math.log(q) for q in softmax(row, 4.0)) for row in TEACHER]
    kl = soft_loss(student, torch.tensor(TEACHER), tau=4.0)
    torch.testing.assert_close(none, kl + torch.tensor(entropy))


def test_help_lowers_the_loss_below_zero_and_weakens_the_gradient():
    student = torch.tensor(STUDENT, requires_grad=True)
    mask = disk.guided_classes(torch.tensor(TEACHER), K=4)
    target, norms, means = disk.guided_target(torch.tensor(TEACHER), mask, tau=1.0), [], []
    for g in (1e-6, 0.1, 0.5, 1.0):
        loss = disk.guided_loss(student, target, mask, torch.full((3,), math.log(g)), tau=1.0, tau_s=1.0)
        (grad,) = torch.autograd.grad(loss.sum(), student)
        norms.append(grad.norm().item())
        means.append(loss.mean().item())
    assert norms == sorted(norms, reverse=True)
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0


def test_many_runs_at_once_are_each_by_itself():
    students = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    help_ = torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    mask = disk.guided_classes(torch.tensor(TEACHER), K=2)
    target = disk.guided_target(torch.tensor(TEACHER), mask, tau=4.0)
    at_once = disk.guided_loss(students, target, mask, help_.log(), tau=4.0, tau_s=2.0)
    for r in range(5):
        torch.testing.assert_close(at_once[r], guided(2, 4.0, 2.0, g=help_[r].tolist(), student=students[r].tolist()))
    ce, wrong = -log_mark(students, torch.tensor(TARGET)), students.argmax(-1) != torch.tensor(TARGET)
    over = disk.budget_loss(help_, ce, wrong, budget=0.1)
    for r in range(5):
        torch.testing.assert_close(over[r], disk.budget_loss(help_[r], ce[r], wrong[r], budget=0.1))


@pytest.mark.parametrize("budget", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("max_ce", [None, 1.0])
def test_eq_3(budget, max_ce):
    ce = [-math.log(softmax(row)[y]) for row, y in zip(STUDENT, TARGET, strict=True)]
    bounded = [min(one, max_ce or math.inf) for one in ce]
    spent = sum(g * one for g, one in zip(G, bounded, strict=True))
    wrong = [max(range(4), key=row.__getitem__) != y for row, y in zip(STUDENT, TARGET, strict=True)]
    assert sum(wrong) == 2
    given = (torch.tensor(G), torch.tensor(ce))
    by_batch = disk.budget_loss(*given, budget=budget, max_ce=max_ce)
    by_wrong = disk.budget_loss(*given, torch.tensor(wrong), budget=budget, max_ce=max_ce)
    assert by_batch.item() == pytest.approx(max(spent / 3 - budget, 0))
    assert by_wrong.item() == pytest.approx(max(spent / 2 - budget, 0))
    assert (by_batch == 0) == (budget == 5.0)


def test_a_batch_without_mistakes_is_guarded():
    over = disk.budget_loss(torch.tensor([0.5]), torch.tensor([0.2]), torch.tensor([False]), budget=0.0)
    assert over.item() == pytest.approx(0.1)


def test_eq_6():
    ours, theirs = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [3.0, 5.0]])
    loss = disk.guided_feature_loss(ours, theirs, torch.tensor([0.25, 1.0]))
    assert loss.tolist() == pytest.approx([0.75 * 5, 0.0])
    maps = torch.arange(8.0).reshape(2, 1, 2, 2)
    assert disk.guided_feature_loss(maps, maps + 1, torch.tensor([0.5, 0.0])).tolist() == pytest.approx([2.0, 4.0])


def test_lambda_rises_in_periods_and_ends_at_its_height():
    given = {"lambda_min": 1.0, "lambda_max": 5.0, "period": 4}
    plain = [disk.lambda_at(r, 10, last_monotone=False, **given) for r in range(10)]
    assert plain == pytest.approx([1 + 4 * (1 - math.cos(math.pi * (r % 4) / 4)) / 2 for r in range(10)])
    last = [disk.lambda_at(r, 10, **given) for r in range(10)]
    assert last[:8] == plain[:8]
    assert last[8:] == pytest.approx([1.0, 5.0])
    whole = [disk.lambda_at(r, 8, **given) for r in range(8)]
    assert whole[:4] == plain[:4]
    assert whole[4:] == pytest.approx([1 + 4 * (1 - math.cos(math.pi * r / 3)) / 2 for r in range(4)])
    assert disk.lambda_at(0, 1, **given) == 5.0


def test_lambda_of_papers_md():
    found = [disk.lambda_at(e, 200, lambda_min=1, lambda_max=5, period=50) for e in (0, 25, 49, 50, 199)]
    assert found == pytest.approx([1.0, 3.0, 1 + 2 * (1 - math.cos(math.pi * 49 / 50)), 1.0, 5.0])


def test_budget_falls_and_starts_again_lower():
    given = {"budget_max": 0.6, "budget_min": 0.4, "period": 20}
    assert [disk.budget_at(r, **given) for r in (0, 10, 20)] == pytest.approx([0.6, 0.5, 0.6])
    assert [disk.budget_at(r, decay=0.9, **given) for r in (0, 20, 30, 40)] == pytest.approx([0.6, 0.54, 0.47, 0.486])


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_students_temperature_is_the_minimiser(tau, scale):
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(64, 10, generator=generator)
    student = scale * (teacher + torch.randn(64, 10, generator=generator))
    candidates = disk.temperatures(tau)
    slope = torch.zeros(len(candidates))
    for part in range(0, 64, 16):
        rows = slice(part, part + 16)
        slope = slope + disk.temperature_slope(student[rows], teacher[rows], tau=tau, candidates=candidates)
    found = disk.best_temperature(slope, candidates)

    def divergence(at: float) -> float:
        t = (teacher.double() / tau).log_softmax(-1)
        return (t.exp() * (t - (student.double() / at).log_softmax(-1))).sum().item()

    assert divergence(found) <= min(divergence(found * by) for by in (0.98, 0.99, 1.01, 1.02))


def test_a_scaled_teachers_temperature_is_scaled():
    teacher = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
    candidates = disk.temperatures(4.0)
    for scale, expected in ((1.0, 4.0), (0.3, 1.2), (2.5, 10.0), (100.0, 64.0), (0.001, 0.25)):
        slope = disk.temperature_slope(scale * teacher, teacher, tau=4.0, candidates=candidates)
        assert disk.best_temperature(slope, candidates) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_have_finite_losses_and_gradients(dtype):
    rows = torch.tensor([[1e4, -1e4, 0.0, 0.0], [-1e4, 1e4, 1e4, -1e4], [0.0, 0.0, 0.0, 0.0]]).to(dtype)
    for order, z, form in itertools.product(itertools.permutations(range(3)), (-1e4, 0.0, 1e4), ("full", "minimum")):
        student, guide = rows[list(order)].clone().requires_grad_(), torch.full((3,), z, requires_grad=True)
        log_g = torch.nn.functional.logsigmoid(guide)
        mask = disk.guided_classes(rows, torch.tensor(TARGET), K=1)
        target = disk.guided_target(rows, mask, tau=4.0, form=form)  # pyright: ignore[reportArgumentType]
        loss = disk.guided_loss(student, target, mask, log_g, tau=4.0, tau_s=4.0)
        ce, wrong = -log_mark(student, torch.tensor(TARGET)), student.argmax(-1) != torch.tensor(TARGET)
        total = loss.sum() + 50 * disk.budget_loss(log_g.exp(), ce, wrong, budget=0.1)
        grads = torch.autograd.grad(total, (student, guide))
        assert torch.isfinite(total)
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert grads[0].dtype == dtype
