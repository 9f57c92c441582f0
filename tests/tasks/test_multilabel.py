"""Several classes an image: losses, mark and metrics against plain loops, scikit-learn and numbers by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from kdcli.losses.multilabel import binary_soft_loss
from kdcli.tasks import TASKS, MultiLabel
from kdcli.tasks.base import plain
from kdcli.tasks.multilabel import average_precision

OUT = [[2.0, -1.0, 0.5], [-3.0, 0.0, 4.0]]
TARGET = [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def random(n: int, k: int, seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = scale * torch.randn(n, k, generator=generator)
    return out, (torch.rand(n, k, generator=generator) < 0.3).float()


def test_hard_is_the_negative_log_likelihood_of_all_labels():
    found = MultiLabel(3).hard(torch.tensor(OUT), torch.tensor(TARGET))
    expected = [
        -sum(math.log(sigmoid(z) if y else 1 - sigmoid(z)) for z, y in zip(zs, ys, strict=True))
        for zs, ys in zip(OUT, TARGET, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_soft_is_the_sum_of_binary_divergences(tau: float):
    mentors = torch.tensor([OUT, [row[::-1] for row in OUT]])
    found = MultiLabel(3).soft(torch.tensor(OUT).flip(0), mentors, tau)
    for m, mentor in enumerate(mentors.tolist()):
        for b, (teacher, student) in enumerate(zip(mentor, OUT[::-1], strict=True)):
            total = 0.0
            for t, s in zip(teacher, student, strict=True):
                p, q = sigmoid(t / tau), sigmoid(s / tau)
                total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
            assert found[m, b].item() == pytest.approx(tau**2 * total, rel=1e-4)


def test_a_temperature_of_its_own_for_every_mentor_and_image():
    out, mentors = random(5, 4)[0], torch.stack([random(5, 4, seed=n)[0] for n in (1, 2)])
    tau = torch.rand(2, 5, generator=torch.Generator().manual_seed(3)) * 4 + 0.5
    found = MultiLabel(4).soft(out, mentors, tau)
    for m in range(2):
        for b in range(5):
            one = binary_soft_loss(out[b : b + 1], mentors[m, b : b + 1], tau=float(tau[m, b]))
            torch.testing.assert_close(found[m, b], one[0])


def test_the_mark_is_the_mean_probability_of_what_is_right():
    found = MultiLabel(3).log_mark(torch.tensor(OUT), torch.tensor(TARGET)).exp()
    expected = [
        sum(sigmoid(z) if y else 1 - sigmoid(z) for z, y in zip(zs, ys, strict=True)) / 3
        for zs, ys in zip(OUT, TARGET, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    stacked = MultiLabel(3).log_mark(torch.tensor([OUT, OUT]), torch.tensor(TARGET))
    assert stacked.shape == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite_with_their_gradients(dtype: torch.dtype):
    task = MultiLabel(3)
    extremes = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]])
    for mentor in (extremes, -extremes, torch.zeros(2, 3)):
        out = extremes.to(dtype).requires_grad_()
        loss = task.hard(out, torch.tensor(TARGET)).sum() + task.soft(out, mentor.to(dtype)[None], 4.0).sum()
        loss = loss + task.log_mark(out, torch.tensor(TARGET)).sum()
        loss.backward()
        assert torch.isfinite(loss)
        assert out.grad is not None
        assert torch.isfinite(out.grad).all()
        assert out.grad.dtype == dtype


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_scikit_learns(ties: bool):
    out, target = random(200, 6)
    out = out.round(decimals=1) if ties else out
    found = average_precision(out, target)
    expected = [average_precision_score(target[:, k], out[:, k]) for k in range(6)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_a_class_that_does_not_occur_has_no_average_precision():
    out, target = random(20, 3)
    target[:, 1] = 0
    assert average_precision(out, target).isnan().tolist() == [False, True, False]
    score = MultiLabel(3).score(plain(MultiLabel(3).sums(out, target)))
    assert score["map"] == pytest.approx(100 * average_precision(out, target)[[0, 2]].mean().item(), rel=1e-5)


def test_a_score_has_map_first_and_micro_f1():
    out, target = random(120, 5)
    task = MultiLabel(5)
    score = task.score(plain(task.sums(out, target)))
    assert [*score] == ["map", "f1", "loss"]
    assert (score.primary.name, score.images) == ("map", 120)
    assert score["f1"] == pytest.approx(100 * f1_score(target, out >= 0, average="micro"))
    assert score["loss"] == pytest.approx(task.hard(out, target).mean().item(), rel=1e-5)
    assert score["map"] == pytest.approx(100 * average_precision_score(target, out, average="macro"), rel=1e-5)


def test_sums_add_up_over_batches():
    out, target = random(60, 4)
    task = MultiLabel(4)
    whole, parts = (
        task.sums(out, target),
        [task.sums(*some) for some in zip(out.split(20), target.split(20), strict=True)],
    )
    for name in ("images", "both", "yes", "right", "loss"):
        torch.testing.assert_close(whole[name], sum(part[name] for part in parts))
    assert all(value.ndim == 0 for value in whole.values())


def test_the_same_answer_is_the_same_set_of_classes():
    task, a = MultiLabel(2), torch.tensor([[1.0, -1.0], [1e-6, 1.0], [0.5, 0.5]])
    b = torch.tensor([[2.0, -3.0], [-1e-6, 1.0], [0.5, -0.5]])
    assert task.same(a, b).tolist() == [True, False, False]
    assert task.same(a, b, tie=1e-5).tolist() == [True, True, False]
    assert task.decode(a).tolist() == [[True, False], [True, True], [True, True]]


def test_details_count_exact_images_and_each_class():
    details, each = MultiLabel(2).details(torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.tensor([[1.0, 0], [0, 1]]))
    assert details == {"exact": 50.0}
    assert each.tolist() == [50.0, 100.0]


def test_every_task_keeps_the_protocol():
    """What the rest of the house asks of a task, put to each one that is registered."""
    for name, kind in TASKS.items():
        task = kind(4)
        raw = np.array([0, 2, 1]) if name == "classify" else np.array([[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]])
        target, out = kind.target(raw), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        mentors = torch.stack([out, -out])
        assert task.name == name
        assert len(target) == 3
        assert task.head(7)(torch.rand(3, 7)).shape == (3, 4)
        assert torch.equal(task.moved(target, lambda points: points), target)
        assert task.hard(out, target).shape == (3,)
        assert task.soft(out, mentors, 2.0).shape == task.log_mark(mentors, target).shape == (2, 3)
        torch.testing.assert_close(task.soft(out, mentors, 2.0)[0], torch.zeros(3), atol=1e-6, rtol=0)
        assert (task.log_mark(mentors, target) <= 0).all()
        score = task.score(plain(task.sums(out, target)))
        assert [*score] == [metric.name for metric in task.metrics]
        assert score.value == score[task.metrics[0].name]
        assert task.same(out, out.clone()).all()
        assert len(task.decode(out)) == 3
        details, each = task.details(out, target)
        assert all(math.isfinite(value) for value in details.values())
        assert each.shape == (4,)
        assert 0 <= task.chance < 100
