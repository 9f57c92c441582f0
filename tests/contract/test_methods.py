"""What every method must pass (DESIGN section 8), with every set of options that changes what it computes.

A method that is added to `kdcli.methods.METHODS` is tested here from then on; give it a line in OPTIONS when its
options select between equations, and in SYMMETRIC when its mentors may be swapped.
"""

import copy
import hashlib
import io
import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kdcli import learner as learners, methods, names
from kdcli.classroom import Classroom, Member
from kdcli.data import Batch, DataSet, Stream, open_data
from kdcli.errors import RecipeError
from kdcli.learner import Learner
from kdcli.mentors import Mentors
from kdcli.methods import METHODS, Lesson, Phase, View
from kdcli.names import ModelName
from kdcli.recipe import DataConfig, Recipe, TrainConfig, from_dict
from kdcli.tally import Tally
from kdcli.tasks import Classify

CHOICES: dict[str, list[Any]] = {
    "ranking": ["batch", "sample", "position"],
    "mark_mean": ["geometric", "arithmetic"],
    "filter": ["rank", "none"],
    "mentoring": ["adaptive", "fixed"],
    "gap": ["max", "mentor", "student"],
    "alpha": ["rank", "mark"],
}
CLASSROOM: list[dict[str, Any]] = [
    {},
    {"ranking": "sample"},
    {"ranking": "position"},
    {"mark_mean": "arithmetic", "delta": 1.0},
    {"filter": "none"},
    {"mentoring": "fixed", "tau": 4.0},
    {"gap": "student"},
    {"gap": "mentor", "filter": "none"},
    {"gap": "student", "ranking": "sample", "filter": "none", "delta": 1.0},
    {"alpha": "mark", "ranking": "sample"},
    {"variant": "official"},
    {"variant": "official", "mentoring": "fixed", "delta": 1.0},
]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "kd": [{}, {"tau": 1.0}],
    "aver": [{}, {"form": "mean"}, {"tau": 1.0}],
    "classroom": CLASSROOM,
}
GRID = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
EVERY = {  # for what costs next to nothing: all combinations but those that differ in an option that another makes idle
    **OPTIONS,
    "classroom": CLASSROOM
    + [
        one
        for one in GRID
        if (one["ranking"] != "sample" or one["mark_mean"] == "geometric")
        and (one["mentoring"] != "fixed" or one["gap"] == "max")
    ],
}
SYMMETRIC = {"nokd", "kd", "aver", "classroom"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
PHASE = Phase("main", 1, ("student",), TrainConfig())
K, M, B = 10, 3, 12


def cases(options: dict[str, list[dict[str, Any]]]) -> Any:
    """Every method with each of its option sets."""
    sets = [(name, one) for name in METHODS for one in options.get(name, [{}])]
    ids = ["-".join([name, *(str(v) for v in one.values())]) for name, one in sets]
    return pytest.mark.parametrize(("name", "options"), sets, ids=ids)


# --- on logits alone --------------------------------------------------------------------------------------------------


def lesson(student: Tensor, mentors: Tensor | None, target: Tensor) -> Lesson:
    view = View(student)
    generator = torch.Generator(student.device.type).manual_seed(0)
    taught = None if mentors is None else View(mentors)
    index = torch.arange(len(target), device=target.device)
    return Lesson(target, index, 0.5, 7, Classify(K), generator, view, {"student": view}, taught)


def answers(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """A student's and three mentors' logits, the teacher best, the last worse than the student; targets."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(K, (B,), generator=generator)
    right = nn.functional.one_hot(target, K)
    noise = torch.randn(1 + M, B, K, generator=generator)
    strength = torch.tensor([1.0, 4.0, 2.0, -1.0])[:, None, None]
    out = (noise + strength * right).to(device)
    return out[0].requires_grad_(), out[1:], target.to(device)


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


@cases(EVERY)
def test_terms_and_notes(name, options):
    given = lesson(*answers())
    method = methods.build(name, options)
    terms = method.loss(given, PHASE)
    assert "hard" in terms
    for value in terms.values():
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert torch.isfinite(value)
        assert value >= -1e-4  # none of these equations can be negative
    for note in given.notes.values():
        assert note.shape in {(), (M,), (M + 1,)}
        assert not note.requires_grad
        assert torch.isfinite(note).all()
    assert given.notes.keys() >= ({"rank", "mark", "active", "temperature"} if name == "classroom" else set())
    (grad,) = torch.autograd.grad(total(terms), given.student.out)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() > 0


def pattern(kind: str, target: Tensor) -> Tensor:
    """Logits [B, K] at the ends of what a half-precision network can say."""
    right = nn.functional.one_hot(target, K).float()
    wrong = right.roll(1, -1)
    halves = torch.arange(len(target))[:, None] % 2 == 0
    return {
        "right": 2e4 * right - 1e4,
        "wrong": 2e4 * wrong - 1e4,
        "spike": 1e4 * wrong,
        "high": torch.full_like(right, 1e4),
        "low": torch.full_like(right, -1e4),
        "onehot": right,
        "mixed": torch.where(halves, 2e4 * right - 1e4, 2e4 * wrong - 1e4),
    }[kind]


EXTREMES = [
    ("wrong", ("right", "wrong", "right")),
    ("wrong", ("wrong", "spike", "wrong")),
    ("right", ("wrong", "wrong", "spike")),
    ("spike", ("right", "onehot", "low")),
    ("high", ("low", "wrong", "onehot")),
    ("onehot", ("mixed", "high", "wrong")),
    ("mixed", ("right", "mixed", "spike")),
]


@cache
def extreme(student: str, mentors: tuple[str, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    target = torch.arange(B) % K
    taught = torch.stack([pattern(kind, target) for kind in mentors])
    return pattern(student, target).to(dtype).requires_grad_(), taught.to(dtype), target


@cases(EVERY)
def test_extreme_logits_stay_finite(name, options):
    method = methods.build(name, options)
    for (student, mentors), dtype in itertools.product(EXTREMES, DTYPES):
        given = lesson(*extreme(student, mentors, dtype))
        loss = total(method.loss(given, PHASE))
        (grad,) = torch.autograd.grad(loss, given.student.out)
        assert torch.isfinite(loss), (student, mentors, dtype)
        assert torch.isfinite(grad).all(), (student, mentors, dtype)
        assert grad.dtype == dtype
        assert all(torch.isfinite(note).all() for note in given.notes.values())


@cases(EVERY)
def test_nothing_is_read_back_to_the_host(name, options):
    """A fake tensor has no values: whoever reads one (`.item()`, `if tensor`) is told so."""
    method = methods.build(name, options)
    with FakeTensorMode():
        student = torch.randn(B, K, requires_grad=True)
        terms = method.loss(lesson(student, torch.randn(M, B, K), torch.zeros(B, dtype=torch.int64)), PHASE)
        assert all(value.shape == () and value.requires_grad for value in terms.values())


def test_the_test_above_would_notice():
    with FakeTensorMode(), pytest.raises(Exception, match=r"(?i)data.dependent|_local_scalar_dense"):
        torch.randn(2).sum().item()


@pytest.mark.gpu
@cases(EVERY)
def test_no_step_waits_for_the_gpu(name, options):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    method = methods.build(name, options).cuda()
    given = lesson(*answers("cuda"))
    total(method.loss(given, PHASE)).backward()  # once before, so that lazily made handles are not blamed
    given = lesson(*answers("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = total(method.loss(given, PHASE))
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


@cases({name: sets for name, sets in EVERY.items() if name in SYMMETRIC})
def test_swapping_two_peers_changes_nothing(name, options):
    if name not in SYMMETRIC:
        pytest.skip("its equation tells its mentors apart")
    student, mentors, target = answers()
    method = methods.build(name, options)
    here = total(method.loss(lesson(student, mentors, target), PHASE))
    there = total(method.loss(lesson(student, mentors[[0, 2, 1]], target), PHASE))
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (here, there)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@cases(OPTIONS)
def test_half_precision_answers_give_the_loss_of_their_float32_values(name, options):
    """Loss arithmetic is float32 whatever the precision of the networks."""
    student, mentors, target = answers()
    method = methods.build(name, options)
    low, taught = student.detach().bfloat16(), mentors.bfloat16()
    terms = method.loss(lesson(low, taught, target), PHASE)
    exact = method.loss(lesson(low.float(), taught.float(), target), PHASE)
    for key in exact:
        torch.testing.assert_close(terms[key], exact[key])


@cases(OPTIONS)
def test_shares_of_classes_as_targets(name, options):
    """After mixup a method either learns from [B, K] shares or is refused before anything is trained."""
    student, mentors, target = answers()
    method = methods.build(name, options)
    if "hard_target" in method.needs:
        with pytest.raises(RecipeError, match="mixup") as caught:
            learners.check_method(method, recipe(name, options, mixup=0.2, batch_size=50), room(recipe(name, options)))
        assert "train.mixup=0" in caught.value.hint
        return
    pure = method.loss(lesson(student, mentors, nn.functional.one_hot(target, K).float()), PHASE)
    plain = method.loss(lesson(student, mentors, target), PHASE)
    torch.testing.assert_close(total(pure), total(plain))
    mixed = 0.6 * nn.functional.one_hot(target, K) + 0.4 * nn.functional.one_hot(target.flip(0), K)
    terms = method.loss(lesson(student, mentors, mixed), PHASE)
    other = method.loss(lesson(student, mentors, target.flip(0)), PHASE)
    torch.testing.assert_close(terms["hard"], 0.6 * plain["hard"] + 0.4 * other["hard"])


# --- options ----------------------------------------------------------------------------------------------------------


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(RecipeError, match="classrom") as caught:
        methods.build("classrom", {})
    assert "classroom" in caught.value.hint


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_option_is_refused(name):
    with pytest.raises(RecipeError, match=r"there\.toml: method\.zzz: .*no such option"):
        methods.build(name, {"zzz": 1}, "there.toml")


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(RecipeError, match=r"method\.rankin") as caught:
        methods.build("classroom", {"rankin": "batch"})
    assert "ranking" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("kd", {"tau": "warm"}, r"method\.tau: .*number.*'warm'"),
        ("kd", {"tau": [4.0]}, r"method\.tau"),
        ("kd", {"tau": 0.0}, r"method\.tau: .*greater than 0"),
        ("aver", {"tau": -1.0}, r"method\.tau: .*greater than 0"),
        ("classroom", {"tau": float("nan")}, r"method\.tau: .*finite"),
        ("classroom", {"beta": float("inf")}, r"method\.beta: .*finite"),
        ("classroom", {"alpha": 0.5}, r"method\.alpha: .*'rank' or 'mark'"),
        ("classroom", {"ranking": "batches"}, r"method\.ranking: .*'batch', 'sample' or 'position'"),
        ("aver", {"form": "median"}, r"method\.form: .*'sum' or 'mean'"),
        ("classroom", {"variant": "official", "ranking": "sample"}, r"method\.variant: .*'sample'"),
        ("classroom", {"variant": "official", "ranking": "position"}, r"method\.variant: .*'position'"),
    ],
)
def test_an_option_that_cannot_be_is_refused(name, options, words):
    with pytest.raises(RecipeError, match=words):
        methods.build(name, options)


def test_a_whole_number_will_do_for_a_fraction():
    method = methods.build("kd", {"tau": 4})
    assert type(method.tau) is float
    assert methods.options("nokd") == {}
    assert set(methods.options("kd")) == {"tau", "alpha", "beta"}


# --- in a classroom ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return open_data(DataConfig(name="digits", per_class=10, image_size=16, augment="none"))


_DATA: list[DataSet] = []
_MENTORS: list[Member] = []


@pytest.fixture(autouse=True)
def _classroom(digits) -> Iterator[None]:
    """The data and mentors that `room` seats; mentors may not be changed by any test."""
    if not _MENTORS:
        _DATA.append(digits)
        _MENTORS.extend(_mentor(digits, place, noise) for place, noise in enumerate((0.0, 0.3, 2.0)))
    before = fingerprint(_MENTORS)
    yield
    assert fingerprint(_MENTORS) == before


def _member(net: nn.Module, arch: str, data: DataSet) -> Member:
    name = ModelName("zoo", arch, "none", arch)
    return Member(
        net, name, mean=data.mean, std=data.std, input_size=16, interpolation="bilinear", num_classes=K
    )  # fmt: skip


def _mentor(data: DataSet, place: int, noise: float) -> Member:
    """A linear classifier fitted to the digits, the worse for its noise, with layers that mind training mode."""
    head = nn.Linear(3 * 16 * 16, K)
    member = _member(nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), head), f"mentor{place}", data)
    generator = torch.Generator().manual_seed(place)
    batch = next(data.train.plain(len(data.train)))
    with torch.no_grad():
        x = member.read(batch.pixels).flatten(1)
        wanted = nn.functional.one_hot(batch.target, K).float()
        wanted = wanted + noise * torch.randn(wanted.shape, generator=generator)
        ridge = torch.linalg.solve(x @ x.T + 10 * torch.eye(len(x)), wanted)
        head.weight.copy_(5 * (x.T @ ridge).T)
        head.bias.zero_()
    return member.requires_grad_(False).eval()


class Toy(Classroom):
    """Seats a small convolutional student with batch norm and dropout, unless a real one is asked for."""

    def student(self, seed: int) -> Member:
        if self.student_name.arch != "toy":
            return super().student(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            body = [conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2)]
            return _member(nn.Sequential(*body, nn.Linear(128, K)), "toy", self.data)


def recipe(name: str, options: dict[str, Any], **train: Any) -> Recipe:
    settings = {"epochs": 30, "batch_size": 50, "lr": 0.02, "schedule": "constant", "precision": "fp32", **train}
    return from_dict({"data": {"name": "digits"}, "method": {"name": name, **options}, "train": settings}, "test")


def room(of: Recipe, student: str = "toy") -> Classroom:
    name = ModelName("zoo", "toy", None, "toy") if student == "toy" else names.resolve(student)
    return Toy(of, _DATA[0], _MENTORS, CPU, name)


def learner(name: str, options: dict[str, Any], student: str = "toy", **train: Any) -> Learner:
    of = recipe(name, options, **train)
    one = Learner(name, of, room(of, student), 2)
    one.begin_epoch(0, lambda _: iter(()))
    return one


def fingerprint(modules: list[Any]) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for key, value in module.state_dict().items():
            digest.update(key.encode() + value.detach().numpy().tobytes())
        digest.update(bytes(part.training for part in module.modules()))
    return digest.hexdigest()


def batches(n: int, same: bool = False, **mixing: float) -> list[tuple[Batch, View | None]]:
    """`n` batches of the training stream (or one of them again and again) with the mentors' answers."""
    stream = Stream(_DATA[0], 50, seed=0, **mixing)  # pyright: ignore[reportArgumentType]
    found = [batch for epoch in range(-(-n // len(stream))) for batch in stream.epoch(epoch)][:n]
    mentors = Mentors(_MENTORS, "fp32", CPU)
    return [(batch, mentors.answer(batch)) for batch in ([found[0]] * n if same else found)]


def teach(one: Learner, taught: list[tuple[Batch, View | None]], first: int = 0) -> list[dict[str, float]]:
    """One step per batch; the terms of each."""
    out = []
    for step, (batch, view) in enumerate(taught, first):
        one.tally = Tally()
        one.step(batch, view, 0, step % 2, step)
        sums = {key: value.item() for key, value in one.tally.sums.items() if key.startswith("term/")}
        out.append({key.removeprefix("term/"): value for key, value in sums.items()})
    return out


@cases(OPTIONS)
def test_the_loss_falls_in_20_steps(name, options):
    """On one batch: the loss with the ranks of the moment, and the task's part without its moving weight."""
    one = learner(name, options)
    given = batches(21, same=True)
    batch, _ = given[0]

    def cross_entropy() -> float:
        return nn.functional.cross_entropy(one.look(batch).out, batch.target).item()

    before = cross_entropy()
    losses = [sum(terms.values()) for terms in teach(one, given)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < 0.9 * losses[0]
    assert cross_entropy() < before
    one.check()
    one.check_weights()


@cases(OPTIONS)
def test_only_the_phases_learners_learn(name, options):
    one = learner(name, options)
    before, mentors = copy.deepcopy(one.student.state_dict()), fingerprint(_MENTORS)
    ((batch, taught),) = batches(1)
    assert taught is not None
    assert not taught.out.requires_grad
    assert taught.out.shape == (M, 50, K)
    teach(one, [(batch, taught)])
    learners = one.method.learners()
    learning = {id(p) for key in one.phase.learners for p in learners[key].parameters()}
    learning |= {id(p) for p in one.method.parameters()}
    optimised = {id(p) for group in one.optimizer.param_groups for p in group["params"]}
    assert optimised == learning
    for parameter in one.student.parameters():
        assert parameter.grad is not None
    assert any(not torch.equal(before[key], value) for key, value in one.student.state_dict().items())
    for member in _MENTORS:
        assert not any(part.training for part in member.modules())
        assert all(p.grad is None and not p.requires_grad and id(p) not in optimised for p in member.parameters())
    assert fingerprint(_MENTORS) == mentors


@cases(OPTIONS)
def test_saved_loaded_and_continued_it_is_the_same(name, options):
    given = batches(6)
    one = learner(name, options)
    teach(one, given[:3])
    file = io.BytesIO()
    torch.save(one.state(), file)
    there = teach(one, given[3:], 3)
    file.seek(0)
    two = learner(name, options)
    two.load(torch.load(file, weights_only=True))
    assert teach(two, given[3:], 3) == there
    assert fingerprint([two.student]) == fingerprint([one.student])


@pytest.mark.parametrize("name", METHODS)
def test_a_real_student_with_a_moving_average_continues_too(name):
    given, settings = batches(3), {"student": "cifar_resnet10_xxs", "ema": 0.9, "clip_grad": 1.0, "optimizer": "adamw"}
    one = learner(name, {}, **settings)
    teach(one, given[:2])
    file = io.BytesIO()
    torch.save(one.state(), file)
    there = teach(one, given[2:], 2)
    file.seek(0)
    two = learner(name, {}, **settings)
    two.load(torch.load(file, weights_only=True))
    assert teach(two, given[2:], 2) == there
    assert fingerprint([two.graduate()]) == fingerprint([one.graduate()])


@cases(OPTIONS)
def test_dropout_is_a_function_of_seed_and_step(name, options):
    given = batches(2)
    one, two = learner(name, options), learner(name, options)
    torch.manual_seed(999)
    here = teach(one, given)
    torch.manual_seed(5)
    torch.randn(77)
    there = teach(two, given[:1])
    torch.randn(3)
    there += teach(two, given[1:], 1)
    assert here == there
    other = teach(learner(name, options), given[:1], first=4)  # the same batch as another step drops other units
    assert other[0] != here[0]


@pytest.mark.parametrize("name", METHODS)
def test_learners_of_one_session_do_not_disturb_each_other(name):
    given = batches(4)
    alone = learner(name, {})
    expected = teach(alone, given)
    one, two = learner(name, {}), learner("nokd", {}, seed=3)
    found = []
    for step, lesson_ in enumerate(given):
        teach(two, [lesson_], step)
        found += teach(one, [lesson_], step)
    assert found == expected
    assert fingerprint([one.student]) == fingerprint([alone.student])


class Noisy(methods.Method):
    """Draws from its lesson's generator, as TeKAP's noisy mentors would."""

    def __init__(self) -> None:
        super().__init__()

    def loss(self, lesson: Lesson, phase: Phase) -> dict[str, Tensor]:
        hard = lesson.task.hard(lesson.student.out, lesson.target).mean()
        return {"hard": hard, "noise": torch.randn((), generator=lesson.generator)}


def test_noise_is_a_function_of_seed_and_step(monkeypatch):
    monkeypatch.setitem(METHODS, "noisy", f"{__name__}:Noisy")
    given = batches(3)
    here = [terms["noise"] for terms in teach(learner("noisy", {}), given)]
    assert len(set(here)) == 3
    torch.randn(9)
    late = learner("noisy", {})  # has drawn nothing before this step
    assert teach(late, given[2:], first=2)[0]["noise"] == here[2]
    assert teach(learner("noisy", {}, seed=1), given[:1])[0]["noise"] != here[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_learner_begins_where_its_seed_says(seed):
    one, two = learner("kd", {}, seed=seed), learner("aver", {}, seed=seed)
    assert fingerprint([one.student]) == fingerprint([two.student])
    assert fingerprint([one.student]) != fingerprint([learner("kd", {}, seed=seed + 1).student])


@cases(OPTIONS)
def test_mixup_trains_or_is_refused(name, options):
    if "hard_target" in methods.build(name, options).needs:
        with pytest.raises(RecipeError, match=f"method {name} .*mixup"):
            learner(name, options, mixup=0.2)
        with pytest.raises(RecipeError, match="cutmix"):
            learner(name, options, cutmix=1.0)
        return
    given = batches(2, mixup=0.2)
    assert given[0][0].target.shape == (50, K)
    for terms in teach(learner(name, options, mixup=0.2), given):
        assert torch.isfinite(torch.tensor(list(terms.values()))).all()


@cases(OPTIONS)
def test_micro_batches_add_up_or_are_refused(name, options):
    if "full_batches" in methods.build(name, options).needs:
        with pytest.raises(RecipeError, match=r"accumulate = 2.*micro-batches") as caught:
            learner(name, options, accumulate=2)
        assert "accumulate=1" in caught.value.hint
        return
    given = batches(1)
    whole, parts = learner(name, options), learner(name, options, accumulate=2)
    for one in (whole, parts):  # what the whole batch decides in the student is no business of the method's
        one.student.eval()
    (here,), (there,) = teach(whole, given), teach(parts, given)
    assert there == {key: pytest.approx(value, rel=1e-4) for key, value in here.items()}
    for a, b in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_how_many_mentors_it_needs(name):
    of = recipe(name, {})
    empty = Toy(of, _DATA[0], [], CPU, ModelName("zoo", "toy", None, "toy"))
    if methods.find(name).teachers:
        with pytest.raises(RecipeError, match=f"method {name} learns from mentors") as caught:
            Learner(name, of, empty, 2)
        assert "--teacher" in caught.value.hint
    else:
        one = Learner(name, of, empty, 2)
        one.begin_epoch(0, lambda _: iter(()))
        terms = teach(one, [(batch, None) for batch, _ in batches(1)])
        assert set(terms[0]) == {"hard"}


@cases(OPTIONS)
def test_what_is_logged_goes_by_the_models_names(name, options):
    one = learner(name, options)
    given = batches(2)
    for step, (batch, taught) in enumerate(given):
        one.step(batch, taught, 0, step, step)
    row = one.row(1, {})
    assert row["train/loss"] == pytest.approx(sum(value for key, value in row.items() if key.startswith("loss/")))
    if name == "classroom":
        whole, taught_by = ["student", *(m.name for m in _MENTORS)], [m.name for m in _MENTORS]
        assert {key for key in row if key.startswith("rank/")} == {f"rank/{who}" for who in whole}
        assert {key for key in row if key.startswith("active/")} == {f"active/{who}" for who in taught_by}
        assert row["active/mentor0"] == 1  # it is a classroom in which something is at play
        if options.get("ranking") != "sample" and options.get("filter") != "none" and "mark_mean" not in options:
            assert row["active/mentor2"] == 0
        if options.get("ranking") != "position" and options.get("variant") != "official":
            assert sum(row[f"rank/{who}"] for who in whole) == pytest.approx(M, rel=1e-4)  # Eq. 5
