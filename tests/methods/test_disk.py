"""DiSK as a method: turns, what each learns, schedules, budget, temperature, forms, and whole runs."""

import itertools
import math
import signal
from pathlib import Path
from typing import Any

import engine_kit as kit
import heads_kit
import pytest
import torch
import torch.nn.functional as F
from heads_kit import Class
from torch import Tensor, nn

from kdcli import methods
from kdcli.errors import InterruptedRun, RecipeError
from kdcli.losses import disk
from kdcli.methods.disk import DiSK
from kdcli.recipe import TrainConfig
from kdcli.training import learner
from kdcli.training.session import EpochEnd
from kdcli.workflows import groups


def room(batch: int = 6, epochs: int = 4, student: str = "zoo", teacher: Any = "wide", **options: Any) -> Class:
    return Class(methods.build("disk", options), student, teacher, batch, epochs=epochs)


def states(*modules: nn.Module) -> list[dict[str, Tensor]]:
    return [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "options", "expected"),
    [
        (6, {}, "guide 3, student 3, guide 3, student 3"),
        (7, {}, "guide 3, student 3, guide 3, student 3, guide 3, student 1"),
        (2, {"inner_epochs": 1}, "guide 1, student 1, guide 1, student 1"),
        (2, {"inner_epochs": 2, "warm_epochs": 4, "rounds": 1}, "warm 4, guide 2, student 2"),
        (4, {"inner_epochs": 2, "variant": "official"}, "guide 5, student 2, guide 2, student 2"),
    ],
)
def test_guide_and_student_take_turns(epochs, options, expected):
    method = methods.build("disk", options)
    assert isinstance(method, DiSK)
    phases = method.phases(TrainConfig(epochs=epochs))
    assert ", ".join(f"{phase.name} {phase.epochs}" for phase in phases) == expected
    assert {phase.name: phase.learners for phase in phases}["guide"] == ("guide",)
    assert {phase.name: phase.learners for phase in phases}["student"] == ("student",)
    assert sum(phase.epochs for phase in phases if phase.name == "student") == epochs
    assert [name for name, _, _ in method.plan] == [phase.name for phase in phases for _ in range(phase.epochs)]


def test_rounds_that_are_not_the_epochs_are_refused():
    method = methods.build("disk", {"rounds": 200})
    with pytest.raises(
        RecipeError, match=r"method\.rounds = 200 .* make 600 epochs, but train\.epochs = 200"
    ) as caught:
        method.phases(TrainConfig(epochs=200))
    assert "train.epochs=600" in caught.value.hint
    assert len(method.phases(TrainConfig(epochs=600))) == 400


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget_min": 0.4}, r"method\.budget_min"),
        ({"average": 0.99, "distance": "simkd"}, r"method\.average.*simkd"),
        ({"alpha": 1.5}, r"method\.alpha: .*less than or equal to 1"),
        ({"K": 0}, r"method\.K: .*greater than or equal to 1"),
        ({"tau_s": "find"}, r"method\.tau_s"),
        ({"average": 1.0}, r"method\.average: .*less than 1"),
        ({"distance": "maps"}, r"method\.distance: .*'logits', 'features' or 'simkd'"),
        ({"teacher_target": "half"}, r"method\.teacher_target: .*'full', 'minimum' or 'zero'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(RecipeError, match=words):
        methods.build("disk", options)


def test_each_round_has_its_lambda_and_budget():
    it = room(epochs=8, inner_epochs=2, period=3, lambda_min=1.0, lambda_max=9.0, budget=0.6, budget_min=0.4,
                  budget_period=2, budget_decay=0.5)  # fmt: skip
    method = it.method
    assert isinstance(method, DiSK)
    found = []
    for epoch, (name, r, _) in enumerate(method.plan):
        method.begin_epoch(epoch, lambda: iter([]))
        found.append((name, r, method.lambda_.item(), method.delta.item()))
    each = [(1.0, 0.6), (1 + 4 * (1 - math.cos(math.pi / 3)), 0.5), (1 + 4 * (1 - math.cos(2 * math.pi / 3)), 0.3),
            (9.0, 0.35)]  # fmt: skip
    expected = [(name, r, *each[r]) for r in range(4) for name in ("guide", "guide", "student", "student")]
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    assert [x for one in found for x in one[2:]] == pytest.approx([x for one in expected for x in one[2:]])


def test_official_lambda_starts_its_last_period_like_any_other():
    method = room(epochs=5, inner_epochs=1, period=4, variant="official").method
    assert isinstance(method, DiSK)
    method.begin_epoch(len(method.plan) - 2, lambda: iter([]))
    assert method.plan[-2] == ("guide", 4, True)
    assert method.lambda_.item() == pytest.approx(0.1)


# --- a pass over the training set ------------------------------------------------------------------------------------


def test_the_budget_is_the_students_error_before_the_first_round():
    it = room()
    method = it.method
    assert isinstance(method, DiSK)
    lessons = [it.lesson(6), it.lesson(4)]
    wrong = sum(int((one.student.out.argmax(-1) != one.target).sum()) for one in lessons)
    method.begin_epoch(0, lambda: iter(lessons))
    assert method.delta.item() == pytest.approx(wrong / 10)
    assert method.student_tau.item() == 4.0
    second = next(epoch for epoch, (_, r, begins) in enumerate(method.plan) if r == 1 and begins)
    method.begin_epoch(second, lambda: pytest.fail("passes again"))  # pyright: ignore


def test_the_students_temperature_is_searched_every_round():
    teacher = heads_kit.member("zoo", 1)  # the student itself, three times as sure
    with torch.no_grad():
        teacher.head.weight.mul_(3)
        assert teacher.head.bias is not None
        teacher.head.bias.mul_(3)
    it = room(tau_s="search", budget=0.3, teacher=teacher)
    it.student.eval()
    method, passes = it.method, []
    assert isinstance(method, DiSK)

    def train_pass():
        passes.append(1)
        with torch.no_grad():
            return iter([it.lesson(), it.lesson(4)])

    for epoch in range(len(method.plan)):
        method.begin_epoch(epoch, train_pass)
    assert len(passes) == 2
    assert method.delta.item() == pytest.approx(0.3)
    assert method.student_tau.item() == pytest.approx(4 / 3, rel=1e-3)


# --- the loss of each phase -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"K": 3, "tau": 2.0, "tau_s": 3.0, "alpha": 0.5, "label_in_mask": True, "normaliser": "batch", "max_ce": 1.0},
        {"variant": "official", "K": 3},
        {"variant": "official", "teacher_target": "zero", "budget_against": "label", "log_term": False},
    ],
)
def test_terms_are_eq_5(options):
    it = room(budget=0.05, lambda_min=3.0, **options)
    method, lesson = it.method, it.lesson()
    official = options.get("variant") == "official"
    with torch.no_grad():
        method.eval()
        z = method.learners()["guide"](torch.cat([lesson.teacher.vectors, lesson.teacher.out], -1))[:, 0]
        found = {phase.name: method.loss(it.lesson(), phase) for phase in it.phases}
    lesson.student.out = lesson.student.out.detach()
    k, tau, alpha = options.get("K", 20), options.get("tau", 4.0), options.get("alpha", 0.1)
    tau_s, g, total = options.get("tau_s", tau), torch.sigmoid(z), 0.0
    for i in range(6):
        out, teacher, y = lesson.student.out[i], lesson.teacher.out[i], int(lesson.target[i])
        mask = torch.zeros(10).index_fill(0, teacher.topk(min(k, 10)).indices, 1)
        if official or options.get("label_in_mask"):
            mask[y] = 1
        q = (teacher / tau).softmax(0)
        if official:
            floor = teacher.min() if "teacher_target" not in options else torch.tensor(0.0)
            q = torch.where(mask > 0, teacher / tau, floor).softmax(0) * mask
        total -= tau * tau_s * float((q * ((out / tau_s).softmax(0) + mask * g[i]).log()).sum()) / 6
    ce = F.cross_entropy(lesson.student.out, lesson.target)
    against = lesson.teacher.out.argmax(-1) if official and "budget_against" not in options else lesson.target
    each = F.cross_entropy(lesson.student.out, against, reduction="none")
    each = each.clamp(max=options.get("max_ce") or (5.0 if official else math.inf))
    wrong = 6 if options.get("normaliser") == "batch" else int((lesson.student.out.argmax(-1) != lesson.target).sum())
    expected = {"hard": alpha * float(ce), "teacher": (1 - alpha) * total}
    assert found["student"] == {key: pytest.approx(value, rel=1e-4) for key, value in expected.items()}
    expected["budget"] = 3.0 * max(float((g * each).sum()) / wrong - 0.05, 0)
    assert expected["budget"] > 0
    if official and "log_term" not in options:
        expected["log_term"] = (1 - alpha) * float((1 + k * g).log().mean())
    assert found["guide"] == {key: pytest.approx(value, rel=1e-4) for key, value in expected.items()}


def test_the_guide_is_the_papers():
    guide = list(room().method.learners()["guide"].children())
    assert [(m.in_features, m.out_features) for m in guide if isinstance(m, nn.Linear)] == [
        (40 + 10, 64),  # pooled vectors and logits of the teacher
        (64, 128),
        (128, 1),
    ]


@pytest.mark.parametrize("phase", ["warm", "guide", "student"])
@pytest.mark.parametrize("distance", ["logits", "features", "simkd"])
def test_a_phase_has_gradient_for_its_own(phase, distance):
    it = room(distance=distance, warm_epochs=1, budget=0.0)
    this = next(one for one in it.phases if one.name == phase)
    learners = it.method.learners()
    for name, module in learners.items():  # what the engine does at a phase's beginning
        module.requires_grad_(name in this.learners).train(name in this.learners)
    terms = it.loss(this)
    assert terms.keys() >= {"hard"}
    torch.stack(list(terms.values())).sum().backward()
    for name, module in learners.items():
        if name in this.learners:
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters()), name
        else:
            assert all(p.grad is None for p in module.parameters()), name
    assert all(p.grad is None for p in it.teacher.parameters())


def test_features_are_eq_6():
    it = room(distance="features", beta=0.5, alpha=0.2)
    method, lesson, this = it.method, it.lesson(), it.phases[1]
    method.eval()
    assert this.learners == ("student", "embed")
    with torch.no_grad():
        terms = method.loss(it.lesson(), this)
        g = torch.sigmoid(method.learners()["guide"](torch.cat([lesson.teacher.vectors, lesson.teacher.out], -1))[:, 0])
        apart = (method.learners()["embed"](lesson.student.vectors) - lesson.teacher.vectors).square().sum(1)
    assert terms["teacher"].item() == pytest.approx(0.8 * 0.5 * float(((1 - g) * apart).mean()), rel=1e-5)


def test_simkd_with_a_guide():
    """The student ends in the teacher's classifier; an open guide leaves SimKD's own mean squared error."""
    it, plain = room(distance="simkd", alpha=0.0), Class(methods.build("simkd", {}), batch=6)
    for one in (it, plain):
        one.student.eval()
        one.method.eval()
    student = it.student.state_dict()
    plain.student.load_state_dict(student)
    with torch.no_grad():
        weight, bias = list(it.method.learners()["guide"].parameters())[-2:]
        weight.zero_()
        bias.fill_(-100)
        terms = it.loss(it.main)
        assert terms["teacher"].item() == pytest.approx(plain.loss()["features"].item(), rel=1e-5)
        bias.fill_(0)
        assert it.loss(it.main)["teacher"].item() == pytest.approx(terms["teacher"].item() / 2, rel=1e-5)
    assert it.method.graduate() is it.student
    assert type(it.student.net).__name__ == "Graduate"


@pytest.mark.parametrize(("student", "teacher"), [("zoo", "vit"), ("vit", "torchvision"), ("torchvision", "timm")])
def test_any_two_families(student, teacher):
    it = room(student=student, teacher=teacher, distance="features")
    for phase in it.phases[:2]:
        heads_kit.check_isolated(it, phase)


def test_a_guide_learns_to_help_where_the_student_fails():
    """Free of its budget it helps with everything; held to it, with what is cheap: the easy images."""
    it = room(batch=20, lambda_min=0.0, budget=0.0, alpha=0.0)
    method, notes = it.method, []
    assert isinstance(method, DiSK)
    adam = torch.optim.Adam(method.guide.parameters(), 0.01)
    for weight in [0.0] * 40 + [1000.0] * 60:
        method.lambda_.fill_(weight)
        adam.zero_grad()
        lesson = it.lesson()
        torch.stack(list(method.loss(lesson, it.phases[0]).values())).sum().backward()
        adam.step()
        notes.append(lesson.notes["guide"].item())
    assert notes[39] > 0.8
    assert notes[-1] < 0.1


# --- in a session -----------------------------------------------------------------------------------------------------


def recipe(**method: Any) -> Any:
    options = {"budget": 0.4, **method}
    return kit.recipe("disk", **{f"method.{key}": value for key, value in options.items()}, **{"train.drop_last": True})


@pytest.fixture
def _zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_HOME", str(kit.home()))


@pytest.mark.usefixtures("_zoo")
@pytest.mark.parametrize("more", [{}, {"average": 0.5}, {"distance": "features"}], ids=str)
def test_turns_move_only_who_learns(tmp_path: Path, more: dict[str, Any]) -> None:
    opened = kit.session(recipe(inner_epochs=1, warm_epochs=1, **more), tmp_path / "run")
    one = opened.learners[0]
    method = one.method
    assert isinstance(method, DiSK)
    parts = method.learners()
    seen = {0: dict(zip(parts, states(*parts.values()), strict=True))}

    def remember(event: Any) -> None:
        if isinstance(event, EpochEnd):
            seen[event.epoch] = dict(zip(parts, states(*parts.values()), strict=True))

    kit.drive(groups.go(opened), remember)
    assert [name for name, _, _ in method.plan] == ["warm", "guide", "student", "guide", "student"]
    for epoch, (name, _, _) in enumerate(method.plan, 1):
        moved = {part for part in parts if not kit.same(seen[epoch][part], seen[epoch - 1][part])}
        expected = {"warm": {"student"}, "guide": {"guide"}, "student": {"student"}}[name]
        expected |= {"embed"} if name == "student" and "embed" in parts else set()
        expected |= {"average"} if name != "guide" and "average" in parts else set()
        assert moved == expected, (epoch, name)
    rows = opened.run.metrics()
    assert [row["lambda"] for row in rows[1:]] == pytest.approx([0.1, 0.1, 50.0, 50.0])
    assert all(0 < row["guide"] <= 1 and row["delta"] == pytest.approx(0.4) for row in rows[1:])
    assert ["loss/budget" in row for row in rows] == [False, True, False, True, False]


@pytest.mark.usefixtures("_zoo")
@pytest.mark.parametrize("at", [(1, 2), (2, 0), (3, 2), (5, 1)])
@pytest.mark.parametrize("more", [{"tau_s": "search", "budget": None}, {"average": 0.5}], ids=["search", "average"])
def test_turns_resume_to_the_bit(tmp_path: Path, at: tuple[int, int], more: dict[str, Any]) -> None:
    options = {key: value for key, value in more.items() if value is not None}
    config = recipe(inner_epochs=1, warm_epochs=1, **options)
    if "budget" in more:
        config.method.options.pop("budget")
    whole = kit.trained(config, tmp_path / "whole")
    opened = kit.session(config, tmp_path / "run")

    def stop(_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedRun):
        kit.drive(groups.go(opened), kit.at(*at, stop))
    kit.drive(groups.go(kit.session(config, opened.run.path, resume=True), resume=True))
    assert kit.same(kit.student(opened.run), kit.student(whole))
    assert opened.run.metrics() == whole.metrics()


@pytest.mark.usefixtures("_zoo")
def test_a_moving_average_teaches_without_a_mentor(tmp_path: Path) -> None:
    """Appendix A.8: after every update of the student the average follows it, by 1 - decay."""
    config = recipe(inner_epochs=1, average=0.75).with_(**{"classroom.teacher": None, "classroom.peers": []})
    opened = kit.session(config, tmp_path / "run")
    one = opened.learners[0]
    weights: list[tuple[Tensor, Tensor]] = []

    def remember(_: Any) -> None:
        nets = (one.student, one.method.learners()["average"])
        weights.append(tuple(net.get_parameter("net.fc.weight").detach().clone() for net in nets))  # pyright: ignore

    kit.drive(groups.go(opened), remember)
    assert torch.equal(*weights[0])  # the guide's first epoch
    changed = 0
    for (_, last), (student, average) in itertools.pairwise(weights):
        if not torch.equal(last, average):
            torch.testing.assert_close(average, 0.75 * last + 0.25 * student)
            changed += 1
    assert changed == 6  # two student epochs of three updates


@pytest.mark.usefixtures("_zoo")
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"train.accumulate": 2}, "accumulate = 2"),
        ({"train.mixup": 0.2}, "mixup"),
        ({"train.batch_size": 29, "train.drop_last": False}, "one image"),
        ({"classroom.teacher": None, "classroom.peers": []}, "needs 1 mentor"),
    ],
)
def test_what_its_equations_cannot_mean_is_refused(keys: dict[str, Any], words: str) -> None:
    config = recipe().with_(**keys)
    with pytest.raises(RecipeError, match=words):
        learner.Learner("disk", config, kit.classroom(config), 3)


def test_lambda_is_the_losses():
    assert disk.lambda_at(1, 4, lambda_min=0, lambda_max=2, period=4) == pytest.approx(0.5)
