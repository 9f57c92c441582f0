"""TeKAP against plain Python; TeKAP around other methods; both in real runs."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import feature_kit as kit
import pytest
import torch
from engine_kit import home, recipe, session, trained
from torch import Tensor, nn

from kdcli import methods
from kdcli.errors import RecipeError
from kdcli.losses.classroom_kd import soft_loss
from kdcli.methods import METHODS, Lesson, Method, Need, Phase
from kdcli.methods.crd import Contrast
from kdcli.methods.tekap import Perspectives, TeKAP, noisy
from kdcli.models.outputs import Output
from kdcli.recipe import TrainConfig, from_dict
from kdcli.tasks import Classify

PHASE = Phase("main", 1, ("student",), TrainConfig())
B, K, M = 6, 5, 3


@pytest.fixture(autouse=True)
def _home(monkeypatch):
    monkeypatch.setenv("KDCLI_HOME", str(home()))


def lesson(seed: int = 0, strong: bool = False) -> Lesson:
    numbers = torch.Generator().manual_seed(3)
    student = Output(torch.randn(B, K, generator=numbers, requires_grad=True))
    outs, second = 2 * torch.randn(M, B, K, generator=numbers), None
    if strong:
        student.strong = Output(torch.randn(B, K, generator=numbers, requires_grad=True))
        second = 2 * torch.randn(M, B, K, generator=numbers)
    mentors = kit.each(outs, second)
    target = torch.arange(B) % K
    generator = torch.Generator().manual_seed(seed)
    return Lesson(target, torch.arange(B), 0.0, 0, Classify(K), generator, student, {"student": student}, mentors)


def kd(given: Lesson, teacher: Tensor, tau: float = 4.0) -> Tensor:
    return soft_loss(given.student.out, teacher, tau=tau).mean()


def augmented(given: Lesson, n: int, alpha: float) -> list[Tensor]:
    """Noisy mentors, drawn as a lesson's generator draws them."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(M, B, K, generator=generator) for _ in range(n)]
    return [alpha * eta + (1 - alpha) * given.mentors_out for eta in draws]


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "original", "more"),
    [
        ({}, 1.0, 0.8),
        ({"lambda_": 0.8}, 0.8, 0.2),
        ({"weight_original": 0.5, "weight_augmented": 2.0, "n": 1}, 0.5, 2.0),
        ({"noise_weight": 0.5, "tau": 2.0, "n": 5}, 1.0, 0.8),
    ],
)
def test_logits_are_distilled_from_the_teacher_and_from_noisy_copies(options, original, more):
    given = lesson()
    terms = methods.build("tekap", options).loss(given, PHASE)
    tau, n, alpha = options.get("tau", 4.0), options.get("n", 3), options.get("noise_weight", 0.1)
    hard = given.task.hard(given.student.out, given.target).mean()
    torch.testing.assert_close(terms["hard"], 0.1 * hard)
    torch.testing.assert_close(terms["teacher"], 0.9 * original * kd(given, given.mentors_out[0], tau))
    each = torch.stack([kd(given, z[0], tau) for z in augmented(given, n, alpha)])
    torch.testing.assert_close(terms["tekap"], 0.9 * more * each.sum())  # a sum, no mean
    assert set(terms) == {"hard", "teacher", "tekap"}


def test_outer_weights_are_the_papers_for_each_part_unless_given():
    found = {}
    for parts in ("logits", "features", "both"):
        method = methods.build("tekap", {"parts": parts})
        assert isinstance(method, TeKAP)
        terms = method.loss(lesson(), PHASE)
        plain = lesson()
        hard = plain.task.hard(plain.student.out, plain.target).mean()
        logit = terms["teacher"] / kd(plain, plain.mentors_out[0]) if "teacher" in terms else torch.zeros(())
        found[parts] = [round(x, 3) for x in ((terms["hard"] / hard).item(), logit.item(), method.outer[2])]
    assert found == {"logits": [0.1, 0.9, 0.0], "features": [1.0, 0.0, 0.8], "both": [1.0, 1.0, 0.8]}
    given = {"ce_weight": 0.3, "logit_weight": 0.0, "feature_weight": 2.0}
    method = methods.build("tekap", {"parts": "both", **given})
    assert isinstance(method, TeKAP)
    terms = method.loss(lesson(), PHASE)
    assert (terms["teacher"].item(), terms["tekap"].item(), method.outer[2]) == (0, 0, 2.0)


def test_noise_is_fresh_for_every_copy_and_step():
    generator = torch.Generator().manual_seed(1)
    z = torch.full((4, 1000), 5.0)
    one, two = noisy(z, 0.1, generator), noisy(z, 0.1, generator)
    assert not one.equal(two)
    assert one.mean().item() == pytest.approx(4.5, abs=0.01)  # scaled by 0.9
    assert one.std().item() == pytest.approx(0.1, rel=0.05)
    assert noisy(z, 0.1, generator, 0.1).std().item() == pytest.approx(0.01, rel=0.05)
    assert noisy(z, 0.0, generator).equal(z)
    first, same, other = (methods.build("tekap", {}).loss(lesson(seed), PHASE)["tekap"] for seed in (0, 0, 1))
    assert first == same
    assert first != other


# --- around another method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kd", "aver", "dkd", "dist", "classroom", "mlkd"])
def test_a_methods_terms_are_computed_again_on_noisy_mentors(name):
    given = lesson(strong=name == "mlkd")
    around = methods.build(name, {"tekap": {"n": 2, "weight_augmented": 0.7, "weight_original": 0.9}})
    terms, plain = around.loss(given, PHASE), methods.build(name, {})
    own = plain.loss(lesson(strong=name == "mlkd"), PHASE)
    assert set(terms) == {*own, "tekap"}
    for key, value in own.items():
        torch.testing.assert_close(terms[key], value if key == "hard" else 0.9 * value)
    generator = torch.Generator().manual_seed(0)
    hand = torch.zeros(())
    for _ in range(2):
        again = lesson(strong=name == "mlkd")
        for views in (again.mentors, [one.strong for one in again.mentors if one.strong]):  # each view has its noise
            noise = torch.randn(M, B, K, generator=generator) if views else []
            for view, eta in zip(views, noise, strict=True):
                view.out = 0.9 * view.out + 0.1 * eta
        hand = hand + sum(value for key, value in plain.loss(again, PHASE).items() if key != "hard")
    torch.testing.assert_close(terms["tekap"], 0.7 * hand)


def test_a_strong_view_for_another_learner_changes_nothing():
    for name, options in (("dkd", {"tekap": True}), ("tekap", {})):
        method = methods.build(name, options)
        here, there = method.loss(lesson(), PHASE), method.loss(beside_two_views(), PHASE)
        assert all(torch.equal(here[key], there[key]) for key in here)


def beside_two_views() -> Lesson:
    given, numbers = lesson(), torch.Generator().manual_seed(9)
    for mentor in given.mentors:
        mentor.strong = Output(torch.randn(B, K, generator=numbers))
    return given


def test_tekap_is_itself_around_kd():
    one, two = lesson(), lesson()
    here, there = methods.build("tekap", {}).loss(one, PHASE), methods.build("kd", {"tekap": True}).loss(two, PHASE)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in here)


def test_notes_are_those_of_the_mentors_as_they_are():
    given, plain = lesson(), lesson()
    methods.build("classroom", {"tekap": {"noise_weight": 0.9}}).loss(given, PHASE)
    methods.build("classroom", {}).loss(plain, PHASE)
    assert given.notes.keys() == plain.notes.keys()
    assert all(given.notes[key].equal(plain.notes[key]) for key in plain.notes)
    assert given.mentors_out.equal(plain.mentors_out)


class Whole(Method):
    """Uses everything that a method may, and records its calls."""

    needs = frozenset({Need.INDEX, Need.FULL_BATCHES})
    teachers = 2
    capturable = False

    weight: float = 1.0
    """Weight of the labels."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls: list[Any] = []
        self.adapter = nn.Linear(2, 2)
        self.register_buffer("memory", torch.zeros(3))

    def setup(self, context: Any, lesson: Any) -> None:
        self.calls.append(("setup", context, lesson))

    def learners(self) -> dict[str, nn.Module]:
        return {"student": self.context.student, "adapter": self.adapter}

    def phases(self, train: TrainConfig) -> list[Phase]:
        return [Phase("first", 3, ("adapter",), train), Phase("main", 2, ("student",), train)]

    def begin_epoch(self, epoch: int, train_pass: Any) -> None:
        self.calls.append(("begin", epoch, train_pass))

    def loss(self, lesson: Lesson, phase: Phase) -> dict[str, Tensor]:
        self.last = lesson.mentors_out
        return {"hard": self.weight * lesson.student.out.mean(), "mentors": lesson.mentors_out.mean()}

    def after(self, lesson: Lesson) -> None:
        self.calls.append(("after", lesson))

    def graduate(self) -> Any:
        return "graduate"


def test_everything_of_the_method_goes_through(monkeypatch):
    monkeypatch.setitem(METHODS, "whole", f"{__name__}:Whole")
    around = methods.build("whole", {"weight": 2.0, "tekap": True})
    assert isinstance(around, Perspectives)
    inner = around.method
    assert isinstance(inner, Whole)
    assert (around.needs, around.teachers, around.capturable, inner.weight) == (Whole.needs, 2, False, 2.0)
    room: Any = SimpleNamespace(student=nn.Linear(1, 1))
    given, train = lesson(), TrainConfig()
    around.setup(room, given)
    assert inner.context is room
    assert around.learners() == {"student": room.student, "adapter": inner.adapter}
    assert around.phases(train) == inner.phases(train)
    around.begin_epoch(4, iter)  # pyright: ignore
    around.loss(given, PHASE)
    assert inner.last is given.mentors_out  # what it keeps for `after` is of the real mentors
    around.after(given)
    assert around.graduate() == "graduate"
    assert inner.calls == [("setup", room, given), ("begin", 4, iter), ("after", given)]
    inner.memory += 1  # pyright: ignore
    other = methods.build("whole", {"tekap": True})
    other.load_state_dict(around.state_dict())
    assert other.state_dict()["method.memory"].equal(torch.ones(3))
    assert other.state_dict()["method.adapter.weight"].equal(inner.adapter.weight)


@pytest.mark.parametrize(
    ("name", "given", "words", "hint"),
    [
        ("dkd", {"m": 3}, r"there: method\.tekap\.m: tekap has no such option", "Allowed: n, noise_weight, "),
        ("dkd", {"noise_wieght": 0.1}, r"method\.tekap\.noise_wieght", "noise_weight"),
        ("dkd", {"n": 0}, r"method\.tekap\.n: .*greater than or equal to 1", ""),
        ("dkd", {"noise_weight": 2}, r"method\.tekap\.noise_weight: .*less than or equal to 1", ""),
        ("dkd", {"method": 1}, r"method\.tekap\.method", ""),
        ("dkd", 3, r"method\.tekap: true, or a table.*3", "method.tekap.n=3"),
        ("nokd", True, r"method\.tekap: .*nokd has no mentors", "dkd"),
        ("fitnets", True, r"method\.tekap: .*fitnets learns from features alone", 'parts = "features"'),
        ("crd", {"n": 2}, r"method\.tekap: .*crd learns from features alone", 'name = "tekap"'),
        ("tekap", True, r"method\.tekap: method tekap is TeKAP already", "Leave it out"),
    ],
)
def test_what_cannot_be_is_refused(name, given, words, hint):
    with pytest.raises(RecipeError, match=words) as caught:
        methods.build(name, {"tekap": given}, "there")
    assert hint in (caught.value.hint or "")


def test_false_is_none():
    assert type(methods.build("kd", {"tekap": False})) is methods.find("kd")


def test_an_unknown_option_with_it_is_refused_as_ever():
    with pytest.raises(RecipeError, match=r"method\.zzz: method dkd has no such option"):
        methods.build("dkd", {"tekap": True, "zzz": 1})


@pytest.mark.parametrize("name", [name for name in METHODS if methods.find(name).teachers])
def test_a_method_reads_logits_as_it_declares(name, tmp_path):
    """Either some phase's loss depends on the mentors' logits, or `reads_logits` is False."""
    config = recipe(name, **{"method.nce_k": 8} if name == "crd" else {})
    one = session(config, tmp_path).learners[0]
    batch, answers = next(iter(one_batch(session(config, tmp_path / "b"))))
    reads = False
    for phase in one.phases:
        given = one.lesson(batch, answers.of(one.needs), 0.0, 0)
        outs = [mentor.out.detach().clone().requires_grad_() for mentor in given.mentors]
        mentors = [replace(mentor, out=out) for mentor, out in zip(given.mentors, outs, strict=True)]
        with torch.enable_grad():
            total = torch.stack(list(one.method.loss(replace(given, mentors=mentors), phase).values())).sum()
        if total.requires_grad:
            grads = torch.autograd.grad(total, outs, allow_unused=True)
            reads = reads or any(grad is not None for grad in grads)
    assert reads == one.method.reads_logits


def one_batch(opened: Any) -> Any:
    return opened.mentors.answer_ahead(itertools.islice(opened.stream.epoch(0), 1))


# --- features ---------------------------------------------------------------------------------------------------------


class Data:
    targets, index, full = torch.arange(40) % K, torch.arange(40), 40

    def __len__(self) -> int:
        return 40


def featured(options: dict[str, Any]) -> tuple[TeKAP, Lesson]:
    """A method with memories of 40 images, and a lesson of six of them with vectors."""
    torch.manual_seed(0)
    numbers = torch.Generator().manual_seed(8)
    given = lesson()
    given.student.pooled = torch.randn(B, 7, generator=numbers, requires_grad=True)
    for mentor, width in zip(given.mentors, (9, 8, 7), strict=True):
        mentor.pooled = torch.randn(B, width, generator=numbers)
    method = methods.build("tekap", {"parts": "features", "feat_dim": 4, "nce_k": 8, **options})
    assert isinstance(method, TeKAP)
    device = torch.device("cpu")
    room: Any = SimpleNamespace(train=TrainConfig(), task=given.task, device=device, data=SimpleNamespace(train=Data()))
    method.setup(room, given)
    given.index = torch.tensor([0, 6, 12, 18, 24, 5])
    given.target = Data.targets[given.index]
    return method, given


def by_hand(method: TeKAP, given: Lesson, noise: tuple[float, float], n: int, lambda_: float | None) -> Tensor:
    """CRD for the teacher, then for each noisy copy, one after another, with the memories moved in between or not."""
    contrast = method.contrast
    assert contrast is not None
    generator = torch.Generator().manual_seed(0)
    given = replace(given, generator=generator)
    a, b = contrast.embed(given.student.vectors, given.teacher.vectors)
    rows = contrast.rows(given)
    assert rows.shape == (B, 9)
    student, teacher = contrast.parts(a, b, rows)
    alone, others, memory = student + teacher, [], contrast.student_memory.clone()
    for _ in range(n):
        eta = torch.randn(given.teacher.vectors.shape, generator=generator)
        f = (1 - noise[0]) * given.teacher.vectors + noise[0] * noise[1] * eta
        b_i = nn.functional.normalize(contrast.teacher(f), dim=1)
        if lambda_ is None:
            mixed = 0.5 * memory[rows[:, 0]] + 0.5 * a.detach()
            memory[rows[:, 0]] = mixed / mixed.norm(dim=1, keepdim=True)
        part, z, c = torch.zeros(()), contrast.log_z[1].exp(), 8 / 40 + 1e-7
        for i in range(B):
            score = torch.exp(memory @ b_i[i] / 0.07) / z
            part = part - torch.log(score[rows[i, 0]] / (score[rows[i, 0]] + c)) / B
            part = part - torch.log((8 / 40) / (score[rows[i, 1:]] + c)).sum() / B
        others.append(student + part)
    summed = torch.stack(others).sum()
    return alone + summed if lambda_ is None else lambda_ * alone + (1 - lambda_) * summed


@pytest.mark.parametrize(
    ("options", "noise", "n", "lambda_"),
    [
        ({}, (0.1, 0.1), 1, None),
        ({"feature_n": 3, "feature_noise_weight": 0.5, "feature_noise_std": 1.0}, (0.5, 1.0), 3, None),
        ({"lambda_": 0.8, "feature_n": 2}, (0.1, 0.1), 2, 0.8),
    ],
)
def test_features_are_contrasted_with_the_teacher_and_with_noisy_copies(options, noise, n, lambda_):
    method, given = featured(options)
    for _ in range(2):  # the second time with memories that have met the batch
        wanted = by_hand(method, given, noise, n, lambda_)
        given.generator.manual_seed(0)
        terms = method.loss(given, PHASE)
        torch.testing.assert_close(terms["contrast"], 0.8 * wanted, rtol=1e-4, atol=1e-4)
        terms["contrast"].backward()
        assert given.student.pooled.grad.abs().max() > 0  # pyright: ignore
        method.after(given)


def test_memories_move_twice_as_the_code_has_it_once_in_the_slides_form():
    for options, times in (({}, 2), ({"lambda_": 0.8}, 1)):
        method, given = featured(options)
        assert isinstance(method.contrast, Contrast)
        before = method.contrast.student_memory.clone()
        method.loss(given, PHASE)
        assert method.contrast.student_memory.equal(before)  # not before the step is over
        method.after(given)
        a, _ = method.contrast.embed(given.student.vectors, given.teacher.vectors)
        rows = method.contrast.row_of[given.index]
        hand = before[rows]
        for _ in range(times):
            hand = nn.functional.normalize(0.5 * hand + 0.5 * a, dim=1)
        torch.testing.assert_close(method.contrast.student_memory[rows], hand)


# --- in runs ----------------------------------------------------------------------------------------------------------

RUNS: list[tuple[str, dict[str, Any]]] = [
    ("tekap", {"parts": "both", "nce_k": 8}),
    ("dkd", {"tekap": True}),
    ("mlkd", {"tekap": {"n": 2}}),
]


@pytest.mark.parametrize(("name", "options"), RUNS, ids=str)
def test_a_run_says_which_options_were_in_force(name, options, tmp_path):
    config = recipe(name, **{f"method.{key}": value for key, value in options.items()})
    run = trained(config, tmp_path / "run")
    chosen = {key: value for key, value, _ in run.provenance["chosen"]}[f"method {name}"]
    if "tekap" in options:
        n = 3 if options["tekap"] is True else options["tekap"]["n"]
        assert f"tekap.n = {n}, tekap.noise_weight = 0.1, " in chosen
        assert "tekap = " not in chosen
        assert "loss/tekap" in run.metrics()[-1]
    else:
        assert "parts = both" in chosen
        assert {"loss/contrast", "loss/tekap"} <= run.metrics()[-1].keys()
    assert run.recipe.hash() == config.hash() == run.provenance["recipe"]
    assert run.recipe.method.options == options


def test_the_recipes_hash_knows_it():
    def hashed(**method: Any) -> str:
        return from_dict({"method": {"name": "dkd", **method}}, "test").hash()

    assert len({hashed(), hashed(tekap=True), hashed(tekap={"n": 4}), hashed(tekap={"n": 5})}) == 4
    assert hashed(tekap={"noise_weight": 1}) == hashed(tekap={"noise_weight": 1.0})
    assert recipe("dkd", **{"method.tekap.n": 4}).method.options == {"tekap": {"n": 4}}


def test_a_baseline_may_have_it(tmp_path: Path):
    config = recipe("kd").with_(baselines={"dkd": {"tekap": {"n": 2}}}).with_method("dkd")
    method = session(config, tmp_path).learners[0].method
    assert isinstance(method, Perspectives)
    assert method.n == 2
