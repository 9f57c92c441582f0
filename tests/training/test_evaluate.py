"""Scores counted by hand on a model whose answers are written into the pixels."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.data import Split
from kdcli.data.dataset import Pixels
from kdcli.data.views import Views
from kdcli.tasks import Classify
from kdcli.tasks.classify import calibration_error
from kdcli.training import evaluate

CPU = torch.device("cpu")


class Reader(nn.Module):
    """Answers the class that a pixel holds (plus `shift`), with a confidence that depends on `peak` alone."""

    def __init__(self, classes: int = 6, peak: float = 2.0, shift: int = 0) -> None:
        super().__init__()
        self.classes, self.peak, self.shift = classes, peak, shift
        self.drop = nn.Dropout(0.9)
        self.sizes: list[int] = []

    def forward(self, pixels: Tensor) -> Tensor:
        self.sizes.append(len(pixels))
        said = (pixels[:, 0, 0, 0] * 255).round().long()
        return self.drop(self.peak * F.one_hot((said + self.shift) % self.classes, self.classes).float())


def split(said: list[int], target: list[int]) -> Split:
    pixels = torch.zeros(len(said), 3, 8, 8, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.tensor(said)
    return Split(Pixels(pixels, Views("none", 8)), torch.tensor(target))


def test_a_score_counts_first_and_first_five() -> None:
    out = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]])
    target = torch.tensor([0, 0, 4, 5])
    found = evaluate.score_outputs(out, target, Classify(6))
    assert (found.images, found["top1"], found["top5"]) == (4, 25.0, 50.0)
    assert found["loss"] == pytest.approx(F.cross_entropy(out, target).item())


def test_five_of_three_classes_are_all() -> None:
    found = evaluate.score_outputs(torch.tensor([[1.0, 2, 3]]), torch.tensor([0]), Classify(3))
    assert (found["top1"], found["top5"]) == (0.0, 100.0)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_scored_in_eval_and_left_as_it_was(training: bool) -> None:
    model = Reader().train(training)
    found = evaluate.score(model, split([0, 1, 2, 3], [0, 1, 2, 0]), Classify(6), CPU)
    assert found.value == 75.0
    assert model.training == model.drop.training == training


def test_a_model_that_fails_is_left_as_it_was_too() -> None:
    class Broken(Reader):
        def forward(self, pixels: Tensor) -> Tensor:
            raise ValueError("no")

    model = Broken().train()
    with pytest.raises(ValueError, match="no"):
        evaluate.score(model, split([0], [0]), Classify(6), CPU)
    assert model.training


def test_answers_come_in_order_from_whole_and_short_batches() -> None:
    model, said = Reader(), [n % 6 for n in range(600)]
    out = evaluate.outputs(model, split(said, said), CPU)
    assert model.sizes == [256, 256, 88]
    assert out.argmax(-1).tolist() == said
    assert out.dtype == torch.float32
    assert not out.requires_grad


def test_a_plain_function_may_be_scored() -> None:
    found = evaluate.score(lambda pixels: Reader().eval()(pixels).half(), split([0, 1], [0, 0]), Classify(6), CPU)
    assert found.value == 50.0


def test_a_report_tells_classes_calibration_and_agreement() -> None:
    said, target = [0, 0, 1, 1, 2, 2, 2, 3], [0, 0, 1, 2, 2, 2, 1, 3]
    names = ["a", "b", "c", "d", "never", "absent"]
    mentors = {"same": Reader(peak=9.0), "other": Reader(shift=1)}
    found = evaluate.report(Reader(), split(said, target), names, Classify(6), CPU, dict(mentors))
    assert found.score.value == 75.0
    assert found.score.images == 8
    assert found.per_class == {"a": 100.0, "b": 50.0, "c": pytest.approx(200 / 3), "d": 100.0}
    assert found.agreement == {"same": 100.0, "other": 0.0}
    confidence = math.exp(2) / (math.exp(2) + 5)  # the same for every image, so one bin holds all
    assert found.details["calibration"] == pytest.approx(100 * abs(0.75 - confidence), rel=1e-5)


def test_calibration_weighs_bins_by_what_they_hold() -> None:
    """Guo et al., Eq. 3: three images at 0.9 with two right, one at 0.2 that is right."""
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.2])
    correct = torch.tensor([True, True, False, True])
    expected = 100 * (3 / 4 * abs(2 / 3 - 0.9) + 1 / 4 * abs(1 - 0.2))
    assert calibration_error(confidence, correct) == pytest.approx(expected, rel=1e-5)
    assert calibration_error(torch.ones(5), torch.ones(5, dtype=torch.bool)) == pytest.approx(0.0)
    assert calibration_error(torch.ones(5), torch.zeros(5, dtype=torch.bool)) == pytest.approx(100.0)
