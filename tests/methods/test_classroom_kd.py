"""ClassroomKD against its equations, worked out one sample and one mentor at a time in plain Python."""

import itertools
import math
from typing import Any

import feature_kit as kit
import pytest
import torch

from kdcli import methods
from kdcli.losses.classroom_kd import soft_loss
from kdcli.methods import Lesson, Phase
from kdcli.models.outputs import Output
from kdcli.recipe import TrainConfig
from kdcli.tasks import Classify

# teacher good, one peer a little better than the student, one worse; no two marks are alike
STUDENT = [[1.0, 0.5, -0.5], [0.2, 0.1, 0.6], [-1.0, 0.4, 1.0], [0.0, 0.3, 0.1]]
TEACHER = [[3.0, 0.0, -1.0], [-1.0, 0.5, 2.0], [0.0, 2.5, -0.5], [2.0, 0.3, 0.5]]
BETTER = [[1.5, 0.4, -0.5], [0.0, 0.7, 0.5], [0.0, 0.6, 0.0], [0.8, 0.1, 0.6]]
WORSE = [[0.0, 1.0, 0.5], [0.5, 0.0, 0.2], [1.0, 0.0, 0.9], [0.0, 2.0, 0.0]]
MENTORS = [TEACHER, BETTER, WORSE]
TARGET = [0, 2, 1, 0]
PHASE = Phase("main", 1, ("student",), TrainConfig())

CHOICES: dict[str, list[Any]] = {
    "ranking": ["batch", "sample", "position"],
    "mark_mean": ["geometric", "arithmetic"],
    "filter": ["rank", "none"],
    "mentoring": ["adaptive", "fixed"],
    "gap": ["max", "mentor", "student"],
    "alpha": ["rank", "mark"],
}
PAPER = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
OFFICIAL = [
    {"variant": "official"},
    {"variant": "official", "alpha": "rank", "mentoring": "fixed"},
    {"variant": "official", "filter": "none", "mark_mean": "arithmetic"},
]
EXTRA = [{"delta": 1.0}, {"delta": 0.5, "beta": 2.5, "tau": 4.0}, {"ranking": "position", "lambda_": 0.25}]


def softmax(row: list[float], tau: float = 1.0) -> list[float]:
    powers = [math.exp(z / tau) for z in row]
    return [power / sum(powers) for power in powers]


def divergence(mentor: list[float], student: list[float], tau: float) -> float:
    p, q = softmax(mentor, tau), softmax(student, tau)
    return tau**2 * sum(p[k] * (math.log(p[k]) - math.log(q[k])) for k in range(len(p)))


def by_hand(student, mentors, target, **given: Any) -> dict[str, Any]:
    """The terms, and ranks [sample][model], gates and temperatures [sample][mentor], of one batch."""
    official = given.get("variant") == "official"
    o: dict[str, Any] = {
        **{"tau": 12.0, "beta": 1.0, "delta": 0.0, "lambda_": 0.1, "ranking": "batch", "mark_mean": "geometric"},
        **{"filter": "rank", "mentoring": "adaptive", "gap": "max", "alpha": "mark" if official else "rank"},
        **given,
    }
    models, batch, count = [student, *mentors], len(target), len(mentors)
    p = [[softmax(model[b])[target[b]] for b in range(batch)] for model in models]  # Eq. 2-3
    terms = {"hard": 0.0, "mentors": 0.0, "teacher": 0.0}
    notes: dict[str, list[list[float]]] = {"rank": [], "mark": [], "active": [], "temperature": []}
    for b in range(batch):
        if o["ranking"] == "sample":
            w = [p[m][b] for m in range(count + 1)]
        elif o["mark_mean"] == "arithmetic":
            w = [sum(p[m]) / batch for m in range(count + 1)]  # Eq. 4
        else:
            w = [math.exp(sum(math.log(x) for x in p[m]) / batch) for m in range(count + 1)]  # Algorithm 1
        if o["ranking"] == "position":
            r = [o["lambda_"] * (1 + sorted(w).index(mark)) for mark in w]  # Eq. 13-14
        else:
            shares = [mark / sum(w) for mark in w]
            r = [count * (round(share, 2) if official else share) for share in shares]  # Eq. 5
        gates, temperatures = [], []
        for m in range(1, count + 1):
            gate = r[m] >= r[0] if official else r[m] > r[0]  # Eq. 6
            gate = gate or o["filter"] == "none"
            epsilon = {"max": max(r[m], r[0]), "mentor": r[m], "student": r[0]}[o["gap"]]
            tau = 1 + abs(r[m] - r[0]) / epsilon * o["tau"]  # Eq. 8-9
            if o["mentoring"] == "fixed":
                tau = 1.0 if official else o["tau"]
            gates.append(float(gate))
            temperatures.append(tau)
            if gate:
                taught = divergence(mentors[m - 1][b], student[b], tau)
                terms["mentors"] += o["beta"] * r[m] * taught / batch  # Eq. 10
        ce = -math.log(p[0][b])
        alpha = r[0] if o["alpha"] == "rank" else w[0]
        terms["hard"] += (alpha + o["delta"]) * ce / batch  # Eq. 10-11
        terms["teacher"] += o["delta"] * divergence(mentors[0][b], student[b], 1.0) / batch  # Eq. 11
        for key, value in {"rank": r, "mark": w, "active": gates, "temperature": temperatures}.items():
            notes[key].append(value)
    if not o["delta"]:
        del terms["teacher"]
    return {"terms": terms, "notes": {k: [sum(c) / batch for c in zip(*v, strict=True)] for k, v in notes.items()}}


def teach(student=STUDENT, mentors=MENTORS, target=TARGET, **options: Any) -> tuple[dict[str, torch.Tensor], Lesson]:
    view = Output(torch.tensor(student, requires_grad=True))
    batch = torch.arange(len(target))
    lesson = Lesson(
        torch.tensor(target),
        batch,
        0.0,
        0,
        Classify(3),
        torch.Generator(),
        view,
        {"student": view},
        kit.each(mentors),
    )
    return methods.build("classroom", options).loss(lesson, PHASE), lesson


def numbers(terms: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in terms.items()}


def approx(terms: dict[str, float]) -> dict[str, Any]:
    return {name: pytest.approx(value, rel=3e-4, abs=1e-5) for name, value in terms.items()}


@pytest.mark.parametrize("options", [*PAPER, *OFFICIAL, *EXTRA], ids=lambda o: "-".join(map(str, o.values())))
def test_terms_and_notes_are_those_of_the_equations(options):
    expected = by_hand(STUDENT, MENTORS, TARGET, **options)
    terms, lesson = teach(**options)
    assert numbers(terms) == approx(expected["terms"])
    assert {k: v.tolist() for k, v in lesson.notes.items()} == {
        k: pytest.approx(v, rel=1e-4) for k, v in expected["notes"].items()
    }


def test_defaults_are_the_papers():
    terms, lesson = teach()
    same, _ = teach(tau=12.0, beta=1.0, delta=0.0, **PAPER[0])
    assert numbers(terms) == numbers(same)
    assert list(terms) == ["hard", "mentors"]
    assert lesson.notes["active"].tolist() == [1.0, 1.0, 0.0]  # the worse peer is silent


def test_the_options_matter():
    """No two of these may compute the same loss on a classroom where all of it is at play."""
    kinds = [
        {},
        {"mark_mean": "arithmetic"},
        {"ranking": "sample"},
        {"ranking": "position"},
        {"filter": "none"},
        {"mentoring": "fixed"},
        {"gap": "student"},
        {"alpha": "mark"},
        {"delta": 1.0},
        {"variant": "official"},
    ]
    totals = [sum(numbers(teach(**kind)[0]).values()) for kind in kinds]
    gaps = [abs(a - b) for a, b in itertools.combinations(totals, 2)]
    assert min(gaps) > 1e-4


def test_one_vectorised_step_is_a_loop_over_mentors():
    """Eq. 10's sum, mentor by mentor, with the ranks of the whole classroom."""
    terms, lesson = teach()
    notes, student = lesson.notes, torch.tensor(STUDENT)
    total = 0.0
    for m, mentor in enumerate(MENTORS):
        if notes["active"][m]:
            kl = soft_loss(student, torch.tensor(mentor), tau=notes["temperature"][m].item()).mean()
            total += (notes["rank"][m + 1] * kl).item()
    assert terms["mentors"].item() == pytest.approx(total, rel=1e-5)


def test_when_all_mentors_are_worse_only_the_task_remains():
    worse = [WORSE, [[0.0, 1.1, 0.4], [0.5, 0.0, 0.1], [1.0, -0.1, 0.9], [0.0, 2.1, 0.0]]]
    terms, lesson = teach(TEACHER, worse)
    expected = by_hand(TEACHER, worse, TARGET)
    assert terms["mentors"].item() == 0
    assert lesson.notes["active"].tolist() == [0, 0]
    assert terms["hard"].item() == pytest.approx(expected["terms"]["hard"], rel=1e-5)
    total = terms["hard"] + terms["mentors"]
    (grad,) = torch.autograd.grad(total, lesson.student.out)
    ce = [[(q - (k == y)) / 4 for k, q in enumerate(softmax(s))] for s, y in zip(TEACHER, TARGET, strict=True)]
    alpha = expected["notes"]["rank"][0]
    torch.testing.assert_close(grad, alpha * torch.tensor(ce, dtype=torch.float32))


def test_the_teacher_is_gated_like_a_peer():
    terms, lesson = teach(mentors=[WORSE, TEACHER])
    assert lesson.notes["active"].tolist() == [0, 1]
    silent, _ = teach(mentors=[WORSE, TEACHER], delta=1.0)
    assert silent["teacher"].item() > 0  # Eq. 11 alone asks no rank
    assert silent["mentors"].item() == terms["mentors"].item()


def test_the_gate_is_strict_in_the_paper_and_lets_a_tie_pass_in_the_code():
    for variant, active in (("paper", 0.0), ("official", 1.0)):
        _, lesson = teach(mentors=[TEACHER, STUDENT], variant=variant)
        assert lesson.notes["active"].tolist() == [1.0, active]
        assert lesson.notes["temperature"][1].item() == 1.0


def test_official_ties_after_rounding():
    """Marks that differ by less than a rounded share are level, so the lower of the two teaches."""
    nearly = [[z - 0.004 * (k == y) for k, z in enumerate(row)] for row, y in zip(STUDENT, TARGET, strict=True)]
    _, official = teach(mentors=[TEACHER, nearly], variant="official")
    _, paper = teach(mentors=[TEACHER, nearly])
    assert official.notes["mark"][2] < official.notes["mark"][0]
    assert official.notes["rank"][2] == official.notes["rank"][0]
    assert official.notes["active"][1] == 1
    assert paper.notes["active"][1] == 0
    shares = official.notes["rank"] / 2
    torch.testing.assert_close(shares, (shares * 100).round() / 100)


def test_official_weighs_the_task_by_the_students_mark():
    terms, lesson = teach(variant="official")
    ce = -sum(math.log(softmax(s)[y]) for s, y in zip(STUDENT, TARGET, strict=True)) / 4
    assert terms["hard"].item() == pytest.approx(math.exp(-ce) * ce, rel=1e-5)
    assert lesson.notes["mark"][0].item() == pytest.approx(math.exp(-ce), rel=1e-5)


@pytest.mark.parametrize(("variant", "tau"), [("paper", 7.0), ("official", 1.0)])
def test_fixed_temperature(variant, tau):
    _, lesson = teach(mentoring="fixed", variant=variant, tau=7.0)
    assert lesson.notes["temperature"].tolist() == [tau] * 3


@pytest.mark.parametrize("ranking", ["batch", "sample", "position"])
def test_temperature_stays_below_one_plus_tau(ranking):
    torch.manual_seed(0)
    for scale in (0.1, 1.0, 10.0):
        student, mentors = torch.randn(16, 3) * scale, torch.randn(4, 16, 3) * scale
        target = torch.randint(3, (16,)).tolist()
        _, lesson = teach(student.tolist(), mentors.tolist(), target, ranking=ranking)
        assert (lesson.notes["temperature"] >= 1).all()
        assert (lesson.notes["temperature"] < 13).all()


def test_rank_grows_temperature_with_the_gap():
    _, lesson = teach()
    teacher, better, _ = lesson.notes["temperature"].tolist()
    assert teacher > better > 1


def test_per_sample_ranking_is_the_mean_of_batches_of_one():
    terms, _ = teach(ranking="sample")
    alone = [
        numbers(teach(STUDENT[b : b + 1], [m[b : b + 1] for m in MENTORS], TARGET[b : b + 1])[0]) for b in range(4)
    ]
    for name in ("hard", "mentors"):
        assert terms[name].item() == pytest.approx(sum(one[name] for one in alone) / 4, rel=1e-5)


def test_position_ranks_are_even_steps():
    _, lesson = teach(ranking="position")
    assert lesson.notes["rank"].tolist() == pytest.approx([0.2, 0.4, 0.3, 0.1])
    _, lesson = teach(ranking="position", lambda_=1.0)
    assert lesson.notes["rank"].tolist() == pytest.approx([2, 4, 3, 1])


def test_beta_weighs_only_the_mentors():
    one, _ = teach()
    two, _ = teach(beta=2.5)
    assert two["mentors"].item() == pytest.approx(2.5 * one["mentors"].item())
    assert two["hard"].item() == one["hard"].item()


def test_micro_batches_are_for_per_sample_ranking_alone():
    needs = {kind: methods.build("classroom", {"ranking": kind}).needs for kind in ("batch", "sample", "position")}
    assert needs["batch"] == needs["position"] == {"hard_target", "full_batches"}
    assert needs["sample"] == {"hard_target"}


def with_constants(rows: list[int], **options: Any) -> torch.Tensor:
    """Eq. 10-11 of these samples, with every rank, gate and temperature put in as a number; its gradient [rows, K]."""
    target = [TARGET[b] for b in rows]
    student, mentors = [STUDENT[b] for b in rows], [[mentor[b] for b in rows] for mentor in MENTORS]
    notes = by_hand(student, mentors, target, **options)["notes"]
    y = torch.tensor(student, requires_grad=True)
    log_q = y.log_softmax(-1)
    official = options.get("variant") == "official"
    by_mark = options.get("alpha", "mark" if official else "rank") == "mark"
    delta = options.get("delta", 0.0)
    loss = (notes["mark" if by_mark else "rank"][0] + delta) * -log_q[range(len(rows)), target].mean()
    for m, mentor in enumerate(mentors):
        tau = notes["temperature"][m]
        p = (torch.tensor(mentor) / tau).softmax(-1)
        kl = (p * (p.log() - (y / tau).log_softmax(-1))).sum(-1).mean()
        loss = loss + options.get("beta", 1.0) * notes["active"][m] * notes["rank"][m + 1] * tau**2 * kl
    p = torch.tensor(mentors[0]).softmax(-1)
    loss = loss + delta * (p * (p.log() - log_q)).sum(-1).mean()
    return torch.autograd.grad(loss, y)[0]


@pytest.mark.parametrize("options", [*PAPER, *OFFICIAL, *EXTRA], ids=lambda o: "-".join(map(str, o.values())))
def test_ranks_gates_and_temperatures_are_constants_to_the_gradient(options):
    terms, lesson = teach(**options)
    (grad,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), lesson.student.out)
    if options.get("ranking") == "sample":  # notes hold means over the batch, so one sample at a time
        expected = torch.cat([with_constants([b], **options) for b in range(4)]) / 4
    else:
        expected = with_constants([0, 1, 2, 3], **options)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
    assert all(not note.requires_grad for note in lesson.notes.values())
