"""No teacher, one teacher, all alike: each against plain Python."""

import math

import feature_kit as kit
import pytest
import torch

from kdcli import methods
from kdcli.losses.classroom_kd import soft_loss
from kdcli.methods import Lesson, Phase
from kdcli.models.outputs import Output
from kdcli.recipe import TrainConfig
from kdcli.tasks import Classify

STUDENT = [[1.0, 0.5, -0.5], [0.2, 0.1, 0.3]]
MENTORS = [[[3.0, 0.0, -1.0], [-1.0, 0.5, 2.0]], [[0.4, 0.3, 0.2], [0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]]]
TARGET = [0, 2]
PHASE = Phase("main", 1, ("student",), TrainConfig())


def lesson(mentors=MENTORS, target=TARGET, smoothing=0.0) -> Lesson:
    view = Output(torch.tensor(STUDENT, requires_grad=True))
    task = Classify(3, smoothing)
    return Lesson(
        torch.tensor(target),
        torch.arange(2),
        0.0,
        0,
        task,
        torch.Generator(),
        view,
        {"student": view},
        kit.each(mentors),
    )


def softmax(row: list[float], tau: float = 1.0) -> list[float]:
    powers = [math.exp(z / tau) for z in row]
    return [power / sum(powers) for power in powers]


def cross_entropy() -> float:
    return -sum(math.log(softmax(row)[y]) for row, y in zip(STUDENT, TARGET, strict=True)) / 2


def distilled(mentor: list[list[float]], tau: float) -> float:
    total = 0.0
    for m, s in zip(mentor, STUDENT, strict=True):
        total += sum(p * (math.log(p) - math.log(q)) for p, q in zip(softmax(m, tau), softmax(s, tau), strict=True))
    return tau**2 * total / 2


def loss(name: str, given: Lesson | None = None, **options: object) -> dict[str, float]:
    terms = methods.build(name, options).loss(given or lesson(), PHASE)
    return {key: value.item() for key, value in terms.items()}


def test_nokd_is_cross_entropy_and_needs_no_mentors():
    assert loss("nokd", lesson(mentors=())) == {"hard": pytest.approx(cross_entropy())}
    assert methods.find("nokd").teachers == 0


def test_nokd_smooths_labels_where_the_task_does():
    uniform = -sum(math.log(p) for row in STUDENT for p in softmax(row)) / 6
    assert loss("nokd", lesson(smoothing=0.1))["hard"] == pytest.approx(0.9 * cross_entropy() + 0.1 * uniform)


def test_kd_weighs_labels_and_the_teacher_alone():
    expected = {"hard": 0.1 * cross_entropy(), "teacher": 0.9 * distilled(MENTORS[0], 4.0)}
    assert loss("kd") == {key: pytest.approx(value, rel=1e-4) for key, value in expected.items()}
    assert loss("kd") == loss("kd", lesson(mentors=MENTORS[:1]))  # peers are ignored


def test_kd_options():
    expected = {"hard": 2 * cross_entropy(), "teacher": 3 * distilled(MENTORS[0], 1.5)}
    assert loss("kd", tau=1.5, alpha=2, beta=3) == {k: pytest.approx(v, rel=1e-4) for k, v in expected.items()}


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("form", ["sum", "mean"])
def test_aver_is_eq_12(form, tau):
    each = [distilled(mentor, tau) for mentor in MENTORS]
    taught = sum(each) if form == "sum" else sum(each) / 3
    expected = {"hard": pytest.approx(cross_entropy()), "mentors": pytest.approx(taught, rel=1e-4)}
    assert loss("aver", form=form, tau=tau) == expected


def test_aver_and_kd_are_made_of_the_soft_loss():
    student, mentors = torch.tensor(STUDENT), torch.tensor(MENTORS)
    for form in ("sum", "mean"):
        each = soft_loss(student, mentors, tau=4.0).mean(-1)
        exact = each.sum() if form == "sum" else each.mean()
        assert loss("aver", form=form)["mentors"] == pytest.approx(exact.item())
    assert loss("kd", beta=1)["teacher"] == pytest.approx(soft_loss(student, mentors[0], tau=4.0).mean().item())


def test_defaults_of_a_method():
    method = methods.build("nokd", {})
    train = TrainConfig(epochs=7)
    assert method.phases.__func__ is methods.Method.phases  # pyright: ignore
    with pytest.raises(TypeError, match="defines no loss"):
        methods.Method().loss(lesson(), PHASE)

    class Silent(methods.Method):
        def learners(self):
            return {"student": torch.nn.Identity()}

    (phase,) = Silent().phases(train)
    assert (phase.name, phase.epochs, phase.learners, phase.train) == ("main", 7, ("student",), train)
