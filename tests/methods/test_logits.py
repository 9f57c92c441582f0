"""Methods that read logits alone, against plain Python: weights, warm-ups, temperatures and views."""

import math
from typing import Any

import feature_kit as kit
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdcli import methods
from kdcli.errors import RecipeError
from kdcli.losses import logits as losses
from kdcli.methods import Lesson, Phase
from kdcli.methods.logits import masks
from kdcli.models.outputs import Output
from kdcli.recipe import TrainConfig
from kdcli.tasks import Classify

STUDENT = [[1.0, 0.5, -0.5, 0.2], [0.2, 0.1, 0.6, -1.0], [2.0, 0.3, -0.4, 1.1], [0.4, 0.9, 0.3, 0.8]]
TEACHER = [[3.0, 0.0, -1.0, 0.5], [-1.0, 0.5, 2.0, 0.3], [0.1, 2.5, -0.5, 1.5], [0.3, 0.2, 0.1, 1.9]]
PEER = [[0.5, 1.0, 0.0, -0.3], [0.7, 0.2, 0.9, 0.1], [1.0, 1.2, 0.3, 2.2], [0.1, 0.6, 0.2, 0.5]]
STRONG = [[0.4, 0.1, 0.5, 0.9], [0.3, 0.2, 0.1, 0.0], [1.0, 1.3, 0.4, 0.1], [0.7, 0.7, 0.5, 0.2]]
STRONG_TEACHER = [[2.0, 1.0, 0.5, 0.5], [0.0, 0.5, 1.0, 0.8], [0.1, 1.5, 0.5, 1.0], [0.2, 0.4, 0.9, 1.2]]
TARGET = [0, 2, 1, 3]
SAMPLES, CLASSES = range(4), range(4)
PHASE = Phase("main", 1, ("student",), TrainConfig())


def lesson(epoch: float = 0.0, target: Any = None, strong: bool = False, peers: bool = True) -> Lesson:
    view = Output(torch.tensor(STUDENT, requires_grad=True))
    if strong:
        view.strong = Output(torch.tensor(STRONG, requires_grad=True))
    mentors = kit.each([TEACHER, PEER] if peers else [TEACHER], [STRONG_TEACHER, PEER] if strong else None)
    target = torch.tensor(TARGET) if target is None else target
    generator = torch.Generator().manual_seed(0)
    return Lesson(target, torch.arange(4), epoch, 0, Classify(4), generator, view, {"student": view}, mentors)


def terms(name: str, given: Lesson | None = None, **options: Any) -> dict[str, float]:
    found = methods.build(name, options).loss(given or lesson(), PHASE)
    return {key: value.item() for key, value in found.items()}


def near(expected: dict[str, float]) -> dict[str, Any]:
    return {key: pytest.approx(value, rel=1e-3, abs=1e-6) for key, value in expected.items()}


def softmax(row: list[float], tau: float = 1.0) -> list[float]:
    powers = [math.exp(z / tau) for z in row]
    return [power / sum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def cross_entropy(model: list[list[float]] = STUDENT) -> float:
    return -sum(math.log(softmax(row)[y]) for row, y in zip(model, TARGET, strict=True)) / 4


def distilled(mentor: list[list[float]], student: list[list[float]], tau: float) -> float:
    pairs = zip(mentor, student, strict=True)
    return tau**2 * sum(divergence(softmax(m, tau), softmax(s, tau)) for m, s in pairs) / 4


def mean(x: torch.Tensor) -> float:
    return x.mean().item()


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(STUDENT), torch.tensor(TEACHER), torch.tensor(TARGET)


def test_dkd_weighs_its_parts_and_hears_the_teacher_alone():
    target_class, others = losses.dkd_loss(*tensors(), tau=4.0)
    hand = {"hard": cross_entropy(), "target_class": mean(target_class), "other_classes": 8 * mean(others)}
    assert terms("dkd", warmup=0) == near(hand)
    assert terms("dkd", lesson(peers=False), warmup=0) == terms("dkd", warmup=0)
    target_class, others = losses.dkd_loss(*tensors(), tau=2.0)
    hand = {
        "hard": 0.5 * cross_entropy(),
        "target_class": 3 * mean(target_class),
        "other_classes": 2 * mean(others),
    }
    assert terms("dkd", warmup=0, tau=2, alpha=3, beta=2, ce_weight=0.5) == near(hand)


@pytest.mark.parametrize("name", ["dkd", "dtkd"])
def test_a_warm_up_counts_epochs_from_1(name):
    whole = terms(name, warmup=0)
    for epoch, share in ((0.0, 1 / 20), (0.9, 1 / 20), (1.0, 2 / 20), (18.99, 19 / 20), (19.0, 1), (200.0, 1)):
        found = terms(name, lesson(epoch))
        assert found == near({key: value * (1 if key == "hard" else share) for key, value in whole.items()})
    assert not methods.build(name, {}).capturable
    assert methods.build(name, {"warmup": 0}).capturable


def test_nkd_weighs_its_parts():
    target_class, others = losses.nkd_loss(*tensors(), tau=1.0)
    hand = {"hard": cross_entropy(), "target_class": mean(target_class), "other_classes": 1.5 * mean(others)}
    assert terms("nkd") == near(hand)
    target_class, others = losses.nkd_loss(*tensors(), tau=2.0)
    assert terms("nkd", tau=2, gamma=0.5)["other_classes"] == pytest.approx(0.5 * mean(others))


def test_dist_weighs_its_parts():
    inter, intra = losses.dist_loss(*tensors()[:2], tau=4.0)
    assert terms("dist") == near({"hard": cross_entropy(), "inter": 2 * inter.item(), "intra": 2 * intra.item()})
    found = terms("dist", beta=2, gamma=3, kd_weight=0.5, ce_weight=0)
    assert found == near({"hard": 0, "inter": inter.item(), "intra": 1.5 * intra.item()})
    assert methods.build("dist", {}).needs == {"full_batches", "pairs"}


def test_wsld_weighs_its_parts():
    soft = losses.wsld_loss(*tensors(), tau=2.0)
    assert terms("wsld") == near({"hard": cross_entropy(), "teacher": 2.5 * mean(soft)})


# --- temperatures -----------------------------------------------------------------------------------------------------


def test_ctkd_distils_at_a_temperature_of_its_own():
    tau = 1 + 20 / (1 + math.exp(-1))
    given = lesson()
    hand = {"hard": 0.1 * cross_entropy(), "teacher": 0.9 * distilled(TEACHER, STUDENT, tau)}
    assert terms("ctkd", given) == near(hand)
    assert given.notes["temperature"].item() == pytest.approx(tau)
    tau = 2 + 5 / (1 + math.exp(-1))
    assert terms("ctkd", t_start=2, t_end=5)["teacher"] == pytest.approx(0.9 * distilled(TEACHER, STUDENT, tau), 1e-3)


@pytest.mark.parametrize("epoch", [0.0, 3.5, 9.0, 100.0])
def test_ctkd_turns_the_temperatures_gradient_and_no_other(epoch):
    method, given = methods.build("ctkd", {}), lesson(epoch)
    (r,) = method.parameters()
    found = torch.autograd.grad(sum(method.loss(given, PHASE).values()), (r, given.student.out))  # pyright: ignore
    e = min(int(epoch) + 1, 10)
    factor = 0.5 * (math.cos(math.pi * e / 10) + 1) - 1
    free = torch.ones((), requires_grad=True)
    tau = 1 + 20 * free.sigmoid()
    loss = 0.1 * given.task.hard(given.student.out, given.target).mean()
    loss = loss + 0.9 * given.task.soft(given.student.out, given.mentors_out[0], tau).mean()
    plain = torch.autograd.grad(loss, (free, given.student.out))
    assert plain[0] != 0
    torch.testing.assert_close(found[0], factor * plain[0])
    torch.testing.assert_close(found[1], plain[1])


def test_ctkd_makes_the_students_task_harder():
    """Descending along the turned gradient, the temperature goes where the loss is larger."""
    method = methods.build("ctkd", {"alpha": 0.0})
    (r,) = method.parameters()
    at = []
    for _ in range(30):
        loss = sum(method.loss(lesson(50.0), PHASE).values())
        (grad,) = torch.autograd.grad(loss, r)  # pyright: ignore
        at.append(loss.item())  # pyright: ignore
        with torch.no_grad():
            r -= 5 * grad
    assert at[-1] > at[0]


def test_dtkd_weighs_its_parts():
    given = lesson()
    hand = {"hard": cross_entropy(), "dynamic": 0.0, "teacher": distilled(TEACHER, STUDENT, 4.0)}
    temperatures = [0.0, 0.0]
    for s, t in zip(STUDENT, TEACHER, strict=True):
        t_s, t_t = 8 * max(s) / (max(s) + max(t)), 8 * max(t) / (max(s) + max(t))
        hand["dynamic"] += 3 * t_s * t_t * divergence(softmax(t, t_t), softmax(s, t_s)) / 4
        temperatures = [temperatures[0] + t_s / 4, temperatures[1] + t_t / 4]
    assert terms("dtkd", given, warmup=0) == near(hand)
    assert given.notes["student_temperature"].item() == pytest.approx(temperatures[0])
    assert given.notes["temperature"].item() == pytest.approx(temperatures[1])
    weighed = {"hard": 1, "dynamic": 1 / 3, "teacher": 0.5}
    found = terms("dtkd", warmup=0, alpha=1, beta=0.5)
    assert found == near({key: value * weighed[key] for key, value in hand.items()})


@pytest.mark.parametrize("ranking", ["batch", "sample"])
@pytest.mark.parametrize("tau", [4.0, 12.0])
def test_a_classroom_with_dtkds_temperatures(ranking, tau):
    """Table 5: the filter and the ranks stay, each sample's temperatures are DTKD's, the student's with each mentor."""
    given = lesson()
    found = terms("classroom", given, mentoring="dtkd", tau=tau, ranking=ranking)
    plain = lesson()
    terms("classroom", plain, ranking=ranking)
    for key in ("rank", "mark", "active"):
        assert given.notes[key].equal(plain.notes[key])
    models = [STUDENT, TEACHER, PEER]
    marks = [[math.log(softmax(m[b])[TARGET[b]]) for b in SAMPLES] for m in models]
    taught, noted = 0.0, [0.0, 0.0]
    for b in SAMPLES:
        w = [math.exp(m[b] if ranking == "sample" else sum(m) / 4) for m in marks]
        r = [2 * one / sum(w) for one in w]
        for m in (1, 2):
            a, c = max(STUDENT[b]), max(models[m][b])
            t_s, t_m = 2 * a / (a + c) * tau, 2 * c / (a + c) * tau
            noted[m - 1] += t_m / 4
            if r[m] > r[0]:
                taught += r[m] * t_s * t_m * divergence(softmax(models[m][b], t_m), softmax(STUDENT[b], t_s)) / 4
    assert taught > 0
    assert found["mentors"] == pytest.approx(taught, rel=1e-3)
    assert found["hard"] == pytest.approx(terms("classroom", ranking=ranking)["hard"])
    assert given.notes["temperature"].tolist() == pytest.approx(noted)
    assert not given.notes["temperature"].requires_grad


def test_dtkd_alone_and_in_a_classroom_are_one_equation():
    here, there = lesson(peers=False), lesson(peers=False)
    alone = methods.build("dtkd", {"warmup": 0, "alpha": 1.0, "beta": 0.0}).loss(here, PHASE)["dynamic"]
    options = {"mentoring": "dtkd", "tau": 4.0, "filter": "none"}
    within = methods.build("classroom", options).loss(there, PHASE)["mentors"]
    rank = there.notes["rank"][1]
    torch.testing.assert_close(within, rank * alone)
    wanted, found = torch.autograd.grad(alone, here.student.out)[0], torch.autograd.grad(within, there.student.out)[0]
    torch.testing.assert_close(found, rank * wanted)


# --- MLKD -------------------------------------------------------------------------------------------------------------


def levels(student: list[list[float]], teacher: list[list[float]], tau: float) -> tuple[float, float, float]:
    s, t = torch.tensor(student), torch.tensor(teacher)
    batch, classes = losses.batch_level_loss(s, t, tau=tau), losses.class_level_loss(s, t, tau=tau)
    return distilled(teacher, student, tau), batch.item(), classes.item()


def test_mlkd_sums_three_levels_over_views_and_temperatures():
    hand = {"hard": 0.1 * (cross_entropy() + cross_entropy(STRONG)), "instance": 0.0, "batch": 0.0, "class": 0.0}
    for tau in (2, 3, 4, 5, 6):
        for view in ((STUDENT, TEACHER), (STRONG, STRONG_TEACHER)):
            for key, value in zip(("instance", "batch", "class"), levels(*view, tau), strict=True):
                hand[key] += 0.9 * value
    assert terms("mlkd", lesson(strong=True)) == near(hand)


def test_mlkd_as_the_authors_code_has_it():
    sure = [max(softmax(row)) for row in TEACHER]
    mass = [sum(softmax(row)[k] for row in TEACHER) for k in CLASSES]

    def share(values: list[float]) -> float:
        middle = sum(sorted(values)[1:3]) / 2
        return sum(value <= middle for value in values) / 4

    hand = {"hard": 0.1 * (cross_entropy() + cross_entropy(STRONG)), "instance": 0.0, "batch": 0.0, "class": 0.0}
    for tau in (2, 3, 4, 5, 6):
        instance, batch, classes = levels(STUDENT, TEACHER, tau)
        again = levels(STRONG, STRONG_TEACHER, tau)[0] if tau in (3, 4, 5) else instance
        hand["instance"] += 0.9 * (share(sure) * instance + again)
        hand["batch"] += 0.9 * share(sure) * batch
        hand["class"] += 0.9 * share(mass) * classes
    assert terms("mlkd", lesson(strong=True), variant="official") == near(hand)


def test_mlkds_masks_are_half_but_for_ties_and_odd_numbers():
    assert [x.item() for x in masks(torch.tensor(TEACHER))] == [0.5, 0.5]
    assert [x.item() for x in masks(torch.zeros(6, 4))] == [1.0, 1.0]
    odd = torch.tensor(TEACHER)[:3]
    assert masks(odd)[0].item() == pytest.approx(2 / 3)


def test_mlkds_temperatures_are_an_option():
    one = terms("mlkd", lesson(strong=True), temperatures=[4])
    assert one["instance"] == pytest.approx(
        0.9 * (distilled(TEACHER, STUDENT, 4) + distilled(STRONG_TEACHER, STRONG, 4)), rel=1e-3
    )
    with pytest.raises(RecipeError, match=r"method\.temperatures"):
        methods.build("mlkd", {"temperatures": []})
    with pytest.raises(RecipeError, match=r"method\.temperatures\.1"):
        methods.build("mlkd", {"temperatures": [4, 0]})


def test_mlkd_teaches_both_views():
    given = lesson(strong=True)
    assert given.student.strong is not None
    loss = sum(methods.build("mlkd", {}).loss(given, PHASE).values())
    grads = torch.autograd.grad(loss, (given.student.out, given.student.strong.out))  # pyright: ignore
    assert all(grad.abs().max() > 0 for grad in grads)


# --- all --------------------------------------------------------------------------------------------------------------

SETS: list[tuple[str, dict[str, Any]]] = [
    ("dkd", {}),
    ("nkd", {}),
    ("dist", {}),
    ("wsld", {}),
    ("ctkd", {}),
    ("dtkd", {}),
    ("mlkd", {}),
    ("mlkd", {"variant": "official"}),
    ("classroom", {"mentoring": "dtkd"}),
]


@pytest.mark.parametrize(("name", "options"), SETS, ids=str)
def test_nothing_is_read_back_to_the_host(name, options):
    method = methods.build(name, options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        student = Output(torch.randn(4, 4, requires_grad=True))
        student.strong = Output(torch.randn(4, 4, requires_grad=True))
        mentors = kit.each(torch.randn(2, 4, 4), torch.randn(2, 4, 4))
        target = torch.zeros(4, dtype=torch.int64)
        given = Lesson(target, target, 3.0, 9, Classify(4), torch.Generator(), student, {"student": student}, mentors)
        assert all(value.shape == () for value in method.loss(given, PHASE).values())


@pytest.mark.parametrize(("name", "options"), SETS, ids=str)
def test_half_precision_answers_are_computed_in_float32(name, options):
    low, exact = lesson(30.0, strong=True), lesson(30.0, strong=True)
    for given, dtype in ((low, torch.bfloat16), (exact, torch.float32)):
        for view in (given.student, *given.mentors):
            assert view.strong is not None
            view.out = view.out.detach().bfloat16().to(dtype)
            view.strong.out = view.strong.out.detach().bfloat16().to(dtype)
    method = methods.build(name, options)
    wanted = method.loss(exact, PHASE)
    for key, value in method.loss(low, PHASE).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted[key])
