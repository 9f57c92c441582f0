"""The classification task: what it asks of an answer, by hand."""

import math

import pytest
import torch

from kdcli.tasks.classify import Classify, calibration_error

OUT = [[2.0, 0.0, -1.0], [0.5, 1.5, 0.0]]
TARGET = [0, 2]


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(z) for z in row))
    return [z - total for z in row]


def test_hard_is_cross_entropy_per_sample():
    hard = Classify(3).hard(torch.tensor(OUT), torch.tensor(TARGET))
    torch.testing.assert_close(
        hard, torch.tensor([-log_softmax(row)[y] for row, y in zip(OUT, TARGET, strict=True)], dtype=torch.float32)
    )


def test_hard_with_label_smoothing():
    hard = Classify(3, label_smoothing=0.3).hard(torch.tensor(OUT), torch.tensor(TARGET))
    expected = []
    for row, y in zip(OUT, TARGET, strict=True):
        logs = log_softmax(row)
        expected.append(-0.7 * logs[y] - 0.3 * sum(logs) / 3)
    torch.testing.assert_close(hard, torch.tensor(expected, dtype=torch.float32))


def test_hard_with_shares_of_classes():
    shares = [[0.7, 0.3, 0.0], [0.0, 0.4, 0.6]]
    hard = Classify(3).hard(torch.tensor(OUT), torch.tensor(shares))
    expected = [
        -sum(share * log for share, log in zip(row, log_softmax(out), strict=True))
        for row, out in zip(shares, OUT, strict=True)
    ]
    torch.testing.assert_close(hard, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hard_is_computed_in_float32(dtype):
    out = torch.tensor(OUT).to(dtype)
    hard = Classify(3).hard(out, torch.tensor(TARGET))
    assert hard.dtype == torch.float32
    torch.testing.assert_close(hard, Classify(3).hard(out.float(), torch.tensor(TARGET)))


def test_mark_of_one_model_and_of_many():
    task, out, target = Classify(3), torch.tensor(OUT), torch.tensor(TARGET)
    expected = torch.tensor([log_softmax(row)[y] for row, y in zip(OUT, TARGET, strict=True)], dtype=torch.float32)
    torch.testing.assert_close(task.log_mark(out, target), expected)
    both = task.log_mark(torch.stack([out, out.flip(-1)]), target)
    assert both.shape == (2, 2)
    torch.testing.assert_close(both[0], expected)
    assert (both <= 0).all()


def test_the_mark_is_not_smoothed():
    out, target = torch.tensor(OUT), torch.tensor(TARGET)
    assert torch.equal(Classify(3, 0.3).log_mark(out, target), Classify(3).log_mark(out, target))


def test_soft_of_stacked_mentors():
    task, out, tau = Classify(3), torch.tensor(OUT), 2.0
    mentors = torch.stack([out.flip(0), out])
    soft = task.soft(out, mentors, tau)
    expected = []
    for mentor, student in ((OUT[1], OUT[0]), (OUT[0], OUT[1])):
        log_p, log_q = (log_softmax([z / tau for z in row]) for row in (mentor, student))
        expected.append(tau**2 * sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
    torch.testing.assert_close(soft[0], torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(soft[1], torch.zeros(2), rtol=0, atol=1e-6)


def test_metrics_count_first_and_first_five():
    out = torch.arange(8.0).repeat(4, 1)  # class 7 first, then 6, 5, 4, 3
    metrics = Classify(8).sums(out, torch.tensor([7, 3, 2, 6]))
    assert metrics["top1"].item() == 1
    assert metrics["top5"].item() == 3
    assert all(value.ndim == 0 for value in metrics.values())


def test_metrics_with_fewer_than_five_classes():
    metrics = Classify(3).sums(torch.tensor(OUT), torch.tensor([0, 2]))
    assert (metrics["top1"].item(), metrics["top5"].item()) == (1, 2)


def test_metrics_of_mixed_images_count_their_larger_part():
    shares = torch.tensor([[0.6, 0.4, 0.0], [0.45, 0.0, 0.55]])
    assert Classify(3).sums(torch.tensor(OUT), shares)["top1"].item() == 1
    assert Classify(3).sums(torch.tensor(OUT), shares.flip(0))["top1"].item() == 0


def test_chance():
    assert Classify(8).chance == 12.5


def test_calibration_error_by_hand():
    # bins of 0.2: [0.1], [0.5, 0.55], [0.9, 0.95, 1.0]
    confidence = torch.tensor([0.1, 0.5, 0.55, 0.9, 0.95, 1.0])
    correct = torch.tensor([False, True, False, True, True, False])
    expected = 1 / 6 * abs(0 - 0.1) + 2 / 6 * abs(0.5 - 0.525) + 3 / 6 * abs(2 / 3 - 0.95)
    assert calibration_error(confidence, correct, bins=5) == pytest.approx(100 * expected, rel=1e-5)


def test_calibration_error_at_its_ends():
    ones = torch.ones(10)
    assert calibration_error(ones, torch.ones(10, dtype=torch.bool)) == 0
    assert calibration_error(ones, torch.zeros(10, dtype=torch.bool)) == pytest.approx(100)
    assert calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool)) == 0
