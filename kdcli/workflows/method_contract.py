"""What every method must do (DESIGN section 8): checks that any method can be put to, on a classroom of toys.

A check is a function of (toy, method's name, options): it returns when the method keeps the rule, raises `Broken` when
it does not and `Idle` when the rule says nothing about this method. Long, for all rules stand in one place.
"""

import copy
import hashlib
import io
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_with_path

from kdcli import methods, recipe as recipes
from kdcli.data import Batch, Stream, open_data
from kdcli.errors import KdcliError, RecipeError
from kdcli.mentors.classroom import Classroom
from kdcli.mentors.mentors import Mentors, rows_of
from kdcli.methods import Lesson, Phase
from kdcli.models import registry
from kdcli.models.member import Member
from kdcli.models.outputs import Output
from kdcli.models.registry import ModelName
from kdcli.recipe import DataConfig, Recipe
from kdcli.system import user_code
from kdcli.training.learner import Learner
from kdcli.training.meters import EpochMeter
from kdcli.training.run import Run
from kdcli.training.student import save_student, student_of

Options = dict[str, Any]
Given = list[tuple[Batch, list[Output]]]
SIZE, BATCH, STEPS = 16, 20, 5  # pixels a side, images a batch, batches an epoch
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Broken(Exception):
    """A rule that the method breaks, and how."""


class Idle(Exception):
    """Why a rule says nothing about the method."""


def need(true: object, words: str) -> None:
    if not bool(true):
        raise Broken(words)


@dataclass
class Verdict:
    """One row of what `kdcli check` prints of a method."""

    check: str
    result: str  # passed | failed | not applicable
    reason: str


def examine(name: str, options: Options, device: torch.device) -> Iterator[Verdict]:
    """Put a method to every check, on the CPU, where equal means equal to the bit; on a GPU whether it is waited for.

    Raises RecipeError when the method cannot even be made with these options.
    """
    methods.build(name, options)
    toy = Toy(torch.device("cpu"))
    for words, check in CHECKS.items():
        try:
            there = Toy(device) if check is no_step_waits and device.type == "cuda" else toy
            there.put(check, name, options)
        except Idle as why:
            yield Verdict(words, "not applicable", str(why))
        except Broken as how:
            yield Verdict(words, "failed", str(how))
        else:
            yield Verdict(words, "passed", "")


# --- the toys ---------------------------------------------------------------------------------------------------------


class Seats(Classroom):
    """Seats a toy student where none but the toy is asked for."""

    def student(self, seed: int, arch: str | None = None) -> Member:
        if arch or self.student_name.arch != "toy":
            member = super().student(seed, arch)
            member.net.head_drop.p = 0.2  # pyright: ignore
            return member
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            body = [conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2)]
            return _member(nn.Sequential(*body, nn.Linear(128, 10)), self.student_name, self).to(self.device)


class Toy:
    """A hundred digits and three mentors, the teacher best, the last peer worse than a beginner.

    For methods that read logits alone the networks are linear, else small residual ones.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.data = open_data(DataConfig(name="digits", per_class=10, image_size=SIZE, augment="none"), device=device)
        self._mentors: dict[bool, list[Member]] = {}
        self._before: dict[bool, str] = {}
        self._given: dict[Any, Given] = {}
        self._subjects: dict[str, Subject] = {}

    def put(self, check: "Check", name: str, options: Options) -> None:
        """Put a method to a check, after which the mentors must be what they were. Raises Broken whatever it raised."""
        try:
            check(self, name, options)
        except (Broken, Idle):
            raise
        except Exception as error:
            raise Broken(error.message if isinstance(error, KdcliError) else user_code.words(error)) from error
        finally:
            for kind, mentors in list(self._mentors.items()):
                if fingerprint(mentors) != self._before[kind]:
                    del self._mentors[kind]
                    self._given.clear()
                    self._subjects.clear()
                    raise Broken("a mentor's weights, statistics or mode are not what they were")

    def mentors(self, needs: frozenset[str]) -> list[Member]:
        maps = deep(needs)
        if maps not in self._mentors:
            self._mentors[maps] = [self._mentor(maps, place, noise) for place, noise in enumerate((0.0, 0.3, 2.0))]
            self._before[maps] = fingerprint(self._mentors[maps])
        return self._mentors[maps]

    def _mentor(self, maps: bool, place: int, noise: float) -> Member:
        """A network that minds training mode: a linear one fitted to the digits, the worse for its noise, or a small
        residual one that has learned them for some steps."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(place)
            if maps:
                name = registry.resolve(("cifar_resnet8", "cifar_resnet10_xxs", "cifar_resnet8")[place])
                net = registry.create(name, 10).module
                for layer in net.modules():  # norms at rest would hide errors
                    if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
                        nn.init.uniform_(layer.weight, 0.5, 1.5)
                        nn.init.normal_(layer.bias, std=0.2)
                        layer.running_mean.normal_(std=0.2)
                net.head_drop.p = 0.5  # pyright: ignore
            else:
                name = ModelName("zoo", "linear", "none", "linear")
                net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 10))
            member = _member(net, name, self).to(self.device).requires_grad_(False).eval()
            batch = next(self.data.train.plain(len(self.data.train), self.device))
            if maps:
                _train(member, batch, (40, 15, 5)[place])
            else:
                _fit(member, batch, noise)
        member.name = f"mentor{place}"
        return member

    def learner(self, name: str, options: Options, *, student: str = "", mentors: int = 3, **train: Any) -> Learner:
        """A learner that has begun its first epoch."""
        settings = {"epochs": 30, "batch_size": BATCH, "lr": 0.02, "schedule": "constant", "precision": "fp32", **train}
        tables = {"data": {"name": "digits"}, "method": {"name": name, **options}, "train": settings}
        recipe = recipes.from_dict(tables, "toy")
        one = Learner(recipe.method.label, recipe, self.room(recipe, student, mentors), STEPS)
        one.begin_epoch(0, lambda: self.train_pass(one))
        return one

    def room(self, recipe: Recipe, student: str = "", mentors: int = 3) -> Seats:
        needs = methods.build(recipe.method.name, recipe.method.options).needs
        toy = "cifar_resnet10_xxs@none" if deep(needs) else ""
        seat = registry.resolve(student or toy) if student or toy else ModelName("zoo", "toy", None, "toy")
        return Seats(recipe, self.data, self.mentors(needs)[:mentors], self.device, seat)

    def train_pass(self, one: Learner) -> Iterator[Lesson]:
        mentors = self._answering(one.method.needs)
        for batch in map(self._strong(one), self.data.train.plain(BATCH, self.device)):
            yield one.lesson(batch, mentors.answer(batch).outputs if one.classroom.mentors else [], 0, 0)

    def _answering(self, needs: frozenset[str]) -> Mentors:
        return Mentors(self.mentors(needs), "fp32", self.device, needs=needs)

    def _strong(self, one: Learner) -> Callable[[Batch], Batch]:
        """Gives a batch a second view, its mirror image, where the method needs two."""
        two = "two_views" in one.method.needs
        return lambda batch: replace(batch, strong=batch.images.flip(-1)) if two else batch

    def batches(self, one: Learner, n: int, **mixing: float) -> Given:
        """The first `n` batches of the training stream with the mentors' answers, mixed where that is asked for."""
        needs = one.method.needs
        key = (needs, *mixing.items())
        known = self._given.setdefault(key, [])
        if len(known) < n:
            mentors = self._answering(needs)
            stream = Stream(self.data, BATCH, seed=0, device=self.device, **mixing)  # pyright: ignore[reportArgumentType]
            found = [batch for epoch in range(-(-n // len(stream))) for batch in stream.epoch(epoch)][:n]
            known += [(batch, mentors.answer(batch).outputs) for batch in map(self._strong(one), found[len(known) :])]
        return known[:n]

    def subject(self, name: str, options: Options) -> "Subject":
        """The method with one real lesson of every phase, made once for all checks that only ask for its loss."""
        key = json.dumps([name, options], sort_keys=True)
        if key not in self._subjects:
            self._subjects[key] = Subject(self, name, options)
        return self._subjects[key]


def _train(member: Member, batch: Batch, steps: int) -> None:
    optimizer = torch.optim.Adam(member.requires_grad_(True).train().parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(member(batch.images), batch.target).backward()
        optimizer.step()
    optimizer.zero_grad()
    member.requires_grad_(False).eval()


@torch.no_grad()
def _fit(member: Member, batch: Batch, noise: float) -> None:
    """Ridge regression of a linear network's last layer."""
    head = member.head
    x = member.net[:-1](member.read(batch.images)).double()  # pyright: ignore[reportIndexIssue]
    wanted = nn.functional.one_hot(batch.target, 10).double()
    wanted += noise * torch.randn(wanted.shape, dtype=torch.float64).to(wanted)
    mean, scale = x.mean(0), 1e-3 * x.square().sum(-1).mean()
    ridge = 5 * (x - mean).T @ torch.linalg.solve((x - mean) @ (x - mean).T + scale * torch.eye(len(x)).to(x), wanted)
    head.weight.copy_(ridge.T)
    assert head.bias is not None
    head.bias.copy_(-mean @ ridge)


def deep(needs: frozenset[str]) -> bool:
    """Whether linear toys will not do."""
    return bool(needs & {"maps", "pre", "pooled"})


def _member(net: nn.Module, name: ModelName, of: "Toy | Classroom") -> Member:
    return Member(
        net, name, mean=of.data.mean, std=of.data.std, input_size=(SIZE, SIZE), interpolation="bilinear", num_classes=10
    )  # fmt: skip


def fingerprint(modules: Any) -> str:
    """Of all weights, statistics and modes."""
    digest = hashlib.sha256()
    for module in modules:
        for key, value in module.state_dict().items():
            digest.update(key.encode() + value.detach().cpu().numpy().tobytes())
        digest.update(bytes(part.training for part in module.modules()))
    return digest.hexdigest()


def teach(one: Learner, given: Given, first: int = 0, epoch: int = 0) -> list[dict[str, float]]:
    """One step per batch; the terms of each."""
    out = []
    for step, (batch, view) in enumerate(given, first):
        one.meter = EpochMeter()
        one.step(batch, view, epoch, step % STEPS, step)
        out.append(one.meter.totals("term/"))
    return out


def stretches(one: Learner) -> list[tuple[Phase, int]]:
    """Each phase of another name with the epoch it first begins at."""
    found: dict[str, tuple[Phase, int]] = {}
    start = 0
    for phase in one.phases:
        if phase.epochs:
            found.setdefault(phase.name, (phase, start))
        start += phase.epochs
    return list(found.values())


def cross_entropy(one: Learner, batch: Batch) -> float:
    """Of what would be shipped, in eval mode."""
    graduate = one.graduate()
    modes = {part: part.training for part in graduate.modules()}
    with torch.no_grad():
        loss = nn.functional.cross_entropy(graduate.eval()(batch.images), batch.target).item()
    for part, mode in modes.items():
        part.training = mode
    return loss


def finite(terms: dict[str, float]) -> bool:
    return all(map(math.isfinite, terms.values()))


def alike(a: dict[str, float], b: dict[str, float], share: float = 1e-4) -> bool:
    return a.keys() == b.keys() and all(abs(a[k] - b[k]) <= share * max(abs(a[k]), abs(b[k])) + 1e-6 for k in a)


# --- a method's loss alone --------------------------------------------------------------------------------------------

Change = Callable[[str, Tensor], Tensor]
"""Another tensor for one of a lesson's: its place (`student.out`, `mentors.maps.stage1`, ...) and what is there."""


class Subject:
    """A method's learner, and what it was asked in each of its phases."""

    def __init__(self, toy: Toy, name: str, options: Options) -> None:
        self.learner = toy.learner(name, options)
        self.lessons: list[tuple[Phase, Lesson]] = []
        given = toy.batches(self.learner, 1)
        for phase, epoch in stretches(self.learner):
            self.learner.begin_epoch(epoch, lambda: toy.train_pass(self.learner))
            self.lessons.append((phase, _recorded(self.learner, given, epoch)))
        self.method = self.learner.method
        self.state = copy.deepcopy(self.learner.state())

    def terms(self, phase: Phase, lesson: Lesson) -> dict[str, Tensor]:
        """The method's answer to a lesson, the method being as it always was."""
        self.restore(phase)
        lesson.generator.manual_seed(0)
        torch.manual_seed(0)  # for dropout in networks of the method's own
        return self.method.loss(lesson, phase)

    def restore(self, phase: Phase) -> None:
        """The method and its learners as they always were, those learning whom the phase names."""
        self.method.load_state_dict(self.state["method"])
        for name, module in self.method.learners().items():
            module.load_state_dict(self.state["learners"][name])
            module.requires_grad_(name in phase.learners)

    def weights(self, phase: Phase) -> list[Tensor]:
        """What may learn in a phase."""
        learns = self.method.learners()
        parts = nn.ModuleList([self.method, *(learns[name] for name in phase.learners)])
        return [p for p in parts.parameters() if p.requires_grad]


def _recorded(one: Learner, given: Given, epoch: int) -> Lesson:
    """The lesson that a real step hands to the method."""
    seen: list[Lesson] = []
    loss = one.method.loss

    def watched(lesson: Lesson, phase: Phase) -> dict[str, Tensor]:
        seen.append(remade(lesson))
        return loss(lesson, phase)

    one.method.loss = watched  # pyright: ignore[reportAttributeAccessIssue]
    try:
        teach(one, given, epoch * STEPS, epoch)
    except Exception:
        if not seen:  # else there is a lesson, and a check that says what is wrong with the loss
            raise
    finally:
        del one.method.loss
    return seen[0]


def remade(lesson: Lesson, change: Change = lambda where, x: x, **facts: Any) -> Lesson:
    """The same lesson from fresh tensors, which on the learners' side take a gradient; `change` may put in others."""

    def fresh(where: str, output: Output) -> Output:
        def renew(path: Any, x: Any) -> Any:
            if x is None:
                return None
            new = change(where + keystr(path), x.detach()).clone()
            return new if where.startswith("mentors") else new.requires_grad_()

        return tree_map_with_path(renew, output)

    outputs = {name: fresh(name, old) for name, old in lesson.outputs.items()}
    mentors = [fresh(f"mentors[{m}]", old) for m, old in enumerate(lesson.mentors)]
    generator = torch.Generator(lesson.target.device).manual_seed(0)
    return replace(
        lesson, student=outputs["student"], outputs=outputs, mentors=mentors, generator=generator, notes={}, **facts
    )


def leaves(lesson: Lesson) -> dict[str, Tensor]:
    """The learners' outputs by place: what a gradient may come back to."""
    found = tree_flatten_with_path(lesson.outputs)[0]
    return {f"{path[0].key}{keystr(path[1:])}": x for path, x in found if x is not None}


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.float() for value in terms.values()]).sum()


def gradients(loss: Tensor, at: list[Tensor]) -> list[Tensor]:
    """The gradients that there are."""
    found = torch.autograd.grad(loss, [x for x in at if x.requires_grad], allow_unused=True)
    return [grad for grad in found if grad is not None]


def terms_are_sound(toy: Toy, name: str, options: Options) -> None:
    """Named scalars of float32, `hard` among them (at the latest in the last phase), with a gradient to those who
    learn; notes that can be logged."""
    subject = toy.subject(name, options)
    for phase, given in subject.lessons:
        lesson = remade(given)
        terms = subject.terms(phase, lesson)
        missing = f"loss gives {', '.join(terms) or 'nothing'}: the task's own term `hard` is missing"
        need("hard" in terms or (terms and phase is not subject.lessons[-1][0]), missing)
        for key, value in terms.items():
            shape = "x".join(map(str, value.shape))
            need(value.shape == (), f"the term {key!r} is no scalar but [{shape}]")
            need(value.dtype == torch.float32, f"the term {key!r} is {value.dtype}: losses are float32")
            need(torch.isfinite(value), f"the term {key!r} is {value.item()}")
        count = len(lesson.mentors)
        for key, note in lesson.notes.items():
            fits = f"the note {key!r} is {list(note.shape)}: [], [{count}] (mentors) or [{count + 1}] (student first)"
            need(note.shape in {(), (count,), (count + 1,)}, fits)
            need(not note.requires_grad, f"the note {key!r} keeps the graph: detach it")
            need(torch.isfinite(note).all(), f"the note {key!r} is not finite")
        loss = total(terms)
        need(loss.requires_grad, f"nothing learns from the loss of phase {phase.name}")
        found = gradients(loss, [*leaves(lesson).values(), *subject.weights(phase)])
        need(all(torch.isfinite(grad).all() for grad in found), "a gradient is not finite")
        need(any(grad.abs().max() > 0 for grad in found), f"the gradient of phase {phase.name} is zero everywhere")


def pattern(kind: str, target: Tensor) -> Tensor:
    """Logits [B, K] at the ends of what a half-precision network can say."""
    right = nn.functional.one_hot(target, 10).float()
    wrong = right.roll(1, -1)
    halves = torch.arange(len(target), device=target.device)[:, None] % 2 == 0
    return {
        "right": 2e4 * right - 1e4,
        "wrong": 2e4 * wrong - 1e4,
        "spike": 1e4 * wrong,
        "high": torch.full_like(right, 1e4),
        "low": torch.full_like(right, -1e4),
        "onehot": right,
        "mixed": torch.where(halves, 2e4 * right - 1e4, 2e4 * wrong - 1e4),
    }[kind]


EXTREMES = (
    ("wrong", ("right", "wrong", "right")),
    ("wrong", ("wrong", "spike", "wrong")),
    ("right", ("wrong", "wrong", "spike")),
    ("spike", ("right", "onehot", "low")),
    ("high", ("low", "wrong", "onehot")),
    ("onehot", ("mixed", "high", "wrong")),
    ("mixed", ("right", "mixed", "spike")),
    ("right", ("right", "right", "right")),
)


def extremes_stay_finite(toy: Toy, name: str, options: Options) -> None:
    """Logits up to 1e4 in float32, bfloat16 and float16, and features that are all zero or large: loss and gradient
    are finite."""
    subject = toy.subject(name, options)
    for phase, given in subject.lessons:
        target = torch.arange(len(given.target), device=toy.device) % 10

        def check(change: Change, what: str, phase: Phase = phase, given: Lesson = given, y: Tensor = target) -> None:
            lesson = remade(given, change, target=y)
            terms = subject.terms(phase, lesson)
            bad = [key for key, value in terms.items() if not torch.isfinite(value)]
            need(not bad, f"{what}: the term {' and '.join(bad)} is not finite")
            reached = [x for x in (*leaves(lesson).values(), *subject.weights(phase)) if x.requires_grad]
            if (loss := total(terms)).requires_grad:
                for x, grad in zip(reached, torch.autograd.grad(loss, reached, allow_unused=True), strict=True):
                    need(grad is None or torch.isfinite(grad).all(), f"{what}: a gradient is not finite")
                    need(grad is None or grad.dtype == x.dtype, f"{what}: a gradient is not {x.dtype}")
            need(all(torch.isfinite(note).all() for note in lesson.notes.values()), f"{what}: a note is not finite")

        pairs = [*itertools.product(EXTREMES, DTYPES)]  # every second one has all extremes and all types too
        for (student, mentors), dtype in pairs[::2] if deep(subject.method.needs) else pairs:
            patterns = {f"mentors[{m}]": pattern(kind, target) for m, kind in enumerate(mentors)}
            own = pattern(student, target)

            def logits(where: str, x: Tensor, patterns: Any = patterns, own: Tensor = own, dtype: Any = dtype) -> Any:
                if where.endswith(".out"):
                    x = patterns.get(where.partition(".")[0], own)
                return x.to(dtype)

            check(logits, f"student's logits {student!r}, mentors' {mentors} in {dtype}")
        if deep(subject.method.needs):
            for what, dtype in itertools.product(("zero", "large", "alike"), DTYPES):

                def features(where: str, x: Tensor, what: str = what, dtype: Any = dtype) -> Tensor:
                    if not where.endswith(".out"):
                        x = {"zero": 0 * x, "large": x.clamp(-1, 1) * 1e4, "alike": x[:1].expand_as(x)}[what]
                    return x.to(dtype)

                check(features, f"features {what} in {dtype}")


def half_is_float(toy: Toy, name: str, options: Options) -> None:
    """The loss of answers in bfloat16 is the loss of their values in float32."""
    subject, share = toy.subject(name, options), 1.3e-6
    if subject.method.runs_networks:
        share = 1e-2
    for phase, given in subject.lessons:
        low = subject.terms(phase, remade(given, lambda _, x: x.bfloat16()))
        exact = subject.terms(phase, remade(given, lambda _, x: x.bfloat16().float()))
        for key, value in exact.items():
            off = abs(low[key].item() - value.item())
            need(
                off <= share * abs(value.item()) + 1e-5,
                f"{key}: {low[key].item():.6g} in bfloat16, {value.item():.6g} in float32 from the same numbers: "
                "compute in .float()",
            )


def nothing_is_read_back(toy: Toy, name: str, options: Options) -> None:
    """`loss` and `after` never wait for a number (`.item()`, `if tensor`, a mask as index): fake tensors have none."""
    subject = toy.subject(name, options)
    for phase, given in subject.lessons:
        subject.restore(phase)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                lesson = remade(given, lambda _, x: mode.from_tensor(x))
                lesson = replace(
                    lesson, target=mode.from_tensor(lesson.target), index=mode.from_tensor(lesson.index)
                )  # fmt: skip
                terms = subject.method.loss(lesson, phase)
                need(all(value.shape == () for value in terms.values()), "a term is no scalar")
                subject.method.after(lesson)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            where = user_code.blame(error) or f"phase {phase.name}: "
            raise Broken(f"{where}a value is read back to the host, or decides a shape ({error.func})") from error
        finally:
            subject.restore(phase)


def no_step_waits(toy: Toy, name: str, options: Options) -> None:
    """On a GPU neither loss, nor backward, nor `after` makes the host wait."""
    if toy.device.type != "cuda":
        raise Idle("for CUDA alone")
    subject = toy.subject(name, options)
    for phase, given in subject.lessons:
        total(subject.terms(phase, remade(given))).backward()  # once before: lazily made handles are not to blame
        subject.restore(phase)
        lesson = remade(given)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            total(subject.method.loss(lesson, phase)).backward()
            subject.method.after(lesson)
        except RuntimeError as error:
            raise Broken(f"phase {phase.name}: {user_code.words(error)}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")
            subject.method.zero_grad()


def peers_may_be_swapped(toy: Toy, name: str, options: Options) -> None:
    """The loss is the same with two peers in each other's place."""
    subject = toy.subject(name, options)
    if deep(subject.method.needs):
        raise Idle("features of several networks are not exchanged")
    order = [0, 2, 1]
    for phase, given in subject.lessons:
        here, there = remade(given), remade(given)
        there = replace(there, mentors=[there.mentors[m] for m in order])
        losses, grads = [], []
        for lesson in (here, there):
            loss, reached = total(subject.terms(phase, lesson)), list(leaves(lesson).values())
            losses.append(loss.item())
            grads.append(torch.autograd.grad(loss, reached, allow_unused=True, materialize_grads=True))
        same = abs(losses[0] - losses[1]) <= 1e-5 * abs(losses[0]) + 1e-5
        same = same and all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads, strict=True))
        need(same or not subject.method.symmetric, "swapping two peers changes the loss or its gradient")
        if not same:
            raise Idle("its equation tells its mentors apart")


def peers_targets_are_detached(toy: Toy, name: str, options: Options) -> None:
    """Where learners teach each other, none learns through what it is to the others: a term's gradient to one answer
    does not depend, in the graph, on another's."""
    subject = toy.subject(name, options)
    if len(subject.lessons[0][1].outputs) == 1:
        raise Idle("only one learner reads pictures")
    for phase, given in subject.lessons:
        lesson = remade(given)
        for key, value in subject.terms(phase, lesson).items():
            for who in lesson.outputs:
                places = leaves(lesson)
                mine = [x for place, x in places.items() if place.startswith(f"{who}.")]
                others = {place: x for place, x in places.items() if not place.startswith(f"{who}.")}
                first = (
                    torch.autograd.grad(value, mine, create_graph=True, allow_unused=True)
                    if value.requires_grad
                    else ()
                )
                found = [(grad * torch.rand_like(grad)).sum() for grad in first if grad is not None]
                if not found or not (mixed := torch.stack(found).sum()).requires_grad:
                    continue
                back = torch.autograd.grad(mixed, list(others.values()), retain_graph=True, allow_unused=True)
                for place, grad in zip(others, back, strict=True):
                    need(
                        grad is None or grad.abs().max() == 0,
                        f"the term {key!r}, in which {who} learns, sends a gradient to {place} too: detach the target",
                    )


def steps_are_alike(toy: Toy, name: str, options: Options) -> None:
    """Unless `capturable` says otherwise, a loss reads neither epoch nor step and keeps no count outside of tensors."""
    subject = toy.subject(name, options)
    if not subject.method.capturable:
        raise Idle("capturable = False")
    for phase, given in subject.lessons:
        here = subject.terms(phase, remade(given))
        there = subject.terms(phase, remade(given, epoch=given.epoch + 7.5, step=given.step + 750))
        need(
            alike({k: v.item() for k, v in here.items()}, {k: v.item() for k, v in there.items()}, 1e-6),
            "the same lesson at another step has another loss: capturable = False is missing",
        )


# --- in training ------------------------------------------------------------------------------------------------------


def loss_falls(toy: Toy, name: str, options: Options) -> None:
    """In 20 steps on one batch the loss of every phase falls, in the last one by a tenth; so does what ships in
    cross-entropy, unless features teach, whose weights may drown the labels at first."""
    one = toy.learner(name, options)
    (batch, view) = toy.batches(one, 1)[0]
    before = cross_entropy(one, batch)
    for phase, epoch in stretches(one):
        one.begin_epoch(epoch, lambda one=one: toy.train_pass(one))
        terms = teach(one, [(batch, view)] * 21, epoch * STEPS, epoch)
        need(all(map(finite, terms)), f"phase {phase.name}: the loss is not finite")
        first, last = sum(terms[0].values()), sum(terms[-1].values())
        share = 0.1 if phase is stretches(one)[-1][0] else 0.01
        need(last < first - share * abs(first), f"phase {phase.name}: {first:.4g} at first, {last:.4g} after 20 steps")
    after = cross_entropy(one, batch)
    need(after < before or deep(one.method.needs), f"the student's cross-entropy goes from {before:.4g} to {after:.4g}")
    one.check()
    one.check_weights()


def only_learners_learn(toy: Toy, name: str, options: Options) -> None:
    """In every phase: those it names are changed, the others and the mentors are left alone and get no gradient."""
    one = toy.learner(name, options)
    given = toy.batches(one, 1)
    view = given[0][1]
    need(not any(one.out.requires_grad for one in view), "mentors' outputs take a gradient")
    for phase, epoch in stretches(one):
        one.begin_epoch(epoch, lambda one=one: toy.train_pass(one))
        learns = one.method.learners()
        before = {key: copy.deepcopy(module.state_dict()) for key, module in learns.items()}
        idle = {key: fingerprint([module]) for key, module in learns.items() if key not in phase.learners}
        for module in learns.values():
            module.zero_grad()
        teach(one, given, epoch * STEPS, epoch)
        named = [one.method, *(learns[key] for key in phase.learners)]
        may = {id(p) for module in named for p in module.parameters() if p.requires_grad}
        optimised = {id(p) for group in one.optimizer.param_groups for p in group["params"]}
        need(optimised == may, f"phase {phase.name} optimises others than its learners")
        for key in phase.learners:
            now = learns[key].state_dict()
            need(
                any(not torch.equal(now[place], old) for place, old in before[key].items()),
                f"phase {phase.name}: {key} does not learn",
            )
            if not deep(one.method.needs):
                for parameter in learns[key].parameters():
                    need(parameter.grad is not None, f"phase {phase.name}: a part of {key} gets no gradient")
        for key, old in idle.items():
            quiet = all(p.grad is None for p in learns[key].parameters())
            need(
                quiet and fingerprint([learns[key]]) == old, f"phase {phase.name} changes {key}, whom it does not name"
            )
        for member in one.classroom.mentors:
            need(not any(part.training for part in member.modules()), f"{member.name} is not in eval mode")
            for parameter in member.parameters():
                need(parameter.grad is None and not parameter.requires_grad, f"{member.name} gets a gradient")
                need(id(parameter) not in optimised, f"{member.name} is optimised")


def goes_on_as_it_was(toy: Toy, name: str, options: Options) -> None:
    """Saved after some steps of every phase, loaded and continued it has the same losses and weights."""
    _goes_on(toy, name, options, {})


def goes_on_averaged(toy: Toy, name: str, options: Options) -> None:
    """The same with a real network, its moving average, AdamW and clipped gradients."""
    _goes_on(toy, name, options, {"student": "cifar_resnet10_xxs", "ema": 0.9, "clip_grad": 1.0, "optimizer": "adamw"})


def _goes_on(toy: Toy, name: str, options: Options, settings: dict[str, Any]) -> None:
    one = toy.learner(name, options, **settings)
    given = toy.batches(one, 4)
    for phase, epoch in stretches(one):
        one.begin_epoch(epoch, lambda one=one: toy.train_pass(one))
        teach(one, given[:2], epoch * STEPS, epoch)
        file = io.BytesIO()
        torch.save(one.state(), file)
        two = toy.learner(name, options, **settings)
        two.load(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        two.begin_epoch(epoch, lambda two=two: toy.train_pass(two), again=True)
        here, there = (teach(each, given[2:], epoch * STEPS + 2, epoch) for each in (one, two))
        need(here == there, f"phase {phase.name}: loaded, it goes on with {there[0]} instead of {here[0]}")
        for key, module in one.method.learners().items():
            same = fingerprint([module]) == fingerprint([two.method.learners()[key]])
            need(same, f"phase {phase.name}: loaded and continued, {key} is another")
        need(
            fingerprint([one.graduate()]) == fingerprint([two.graduate()]),
            f"phase {phase.name}: the graduate is another",
        )
        need(
            fingerprint([one.method]) == fingerprint([two.method]),
            f"phase {phase.name}: the method's own tensors differ",
        )


def noise_follows_seed_and_step(toy: Toy, name: str, options: Options) -> None:
    """Dropout and noise are functions of (seed, step), whatever else draws numbers in between."""
    subject = toy.subject(name, options)
    one, two, other, seeded = (toy.learner(name, options, seed=seed) for seed in (0, 0, 0, 1))
    given = toy.batches(one, 2)
    for phase, epoch in stretches(one):
        for each in (one, two, other, seeded):
            each.begin_epoch(epoch, lambda each=each: toy.train_pass(each))
        first = epoch * STEPS
        start = copy.deepcopy(one.state())
        torch.manual_seed(999)
        here = teach(one, given, first, epoch)
        torch.manual_seed(5)
        torch.randn(77)
        there = teach(two, given[:1], first, epoch)
        torch.randn(3)
        there += teach(two, given[1:], first + 1, epoch)
        need(here == there, "drawing other numbers in between changes the loss: take noise from lesson.generator")
        need(teach(seeded, given[:1], first, epoch)[0] != here[0], "train.seed changes nothing")
        lesson = remade(next(lesson for of, lesson in subject.lessons if of.name == phase.name))
        (heard,) = torch.autograd.grad(total(subject.terms(phase, lesson)), lesson.student.out, allow_unused=True)
        if heard is not None and heard.any() and phase.learners == tuple(one.method.learners()):
            other.load(start)
            late = teach(other, given[:1], first + 4, epoch)
            need(late[0] != here[0], "the same batch as another step drops the same units")


def neighbours_do_not_matter(toy: Toy, name: str, options: Options) -> None:
    """Beside another learner it ends as alone."""
    alone, one, two = (toy.learner(*who) for who in ((name, options), (name, options), ("nokd", {})))
    given, plain = toy.batches(alone, 3), toy.batches(two, 3)
    expected = teach(alone, given)
    found = []
    for step, lesson in enumerate(given):
        teach(two, [plain[step]], step)
        found += teach(one, [lesson], step)
    need(found == expected, "a learner beside it changes its losses")
    need(fingerprint([one.student]) == fingerprint([alone.student]), "a learner beside it changes its student")


def mixup_trains_or_is_refused(toy: Toy, name: str, options: Options) -> None:
    """Targets that are shares of classes [B, K] mean what they say, or mixup and cutmix are refused beforehand."""
    label = user_code.label(name)
    refuses = methods.build(name, options).needs & {"hard_target", "index", "two_views"}
    if refuses:
        for key in ("mixup", "cutmix"):
            try:
                toy.learner(name, options, **{key: 0.2})  # pyright: ignore[reportArgumentType]
            except RecipeError as error:
                need(label in error.message and "mixup" in error.message, f"{key} is refused for something else")
                need("train.mixup=0" in error.hint, f"{key} is refused without the cure")
            else:
                raise Broken(f"needs {' and '.join(refuses)}, but {key} is not refused")
        return
    subject = toy.subject(name, options)
    for phase, given in subject.lessons:
        one_hot = nn.functional.one_hot(given.target, 10).float()
        other = given.target.flip(0)
        plain = subject.terms(phase, remade(given))
        pure = subject.terms(phase, remade(given, target=one_hot))
        off = abs(total(pure).item() - total(plain).item())
        need(off <= 1.3e-6 * abs(total(plain).item()) + 1e-5, "one-hot shares have another loss than class numbers")
        mixed = subject.terms(phase, remade(given, target=0.6 * one_hot + 0.4 * one_hot.flip(0)))
        if "hard" not in plain:
            continue
        wanted = 0.6 * plain["hard"] + 0.4 * subject.terms(phase, remade(given, target=other))["hard"]
        near = abs(mixed["hard"].item() - wanted.item()) <= 1.3e-6 * abs(wanted.item()) + 1e-5
        need(near, "`hard` of mixed targets is not the mixture")
    one = toy.learner(name, options, mixup=0.2)
    given = toy.batches(one, 2, mixup=0.2)
    assert given[0][0].target.ndim == 2
    need(all(map(finite, teach(one, given))), "the loss is not finite")


def micro_batches_add_up_or_are_refused(toy: Toy, name: str, options: Options) -> None:
    """Two halves of a batch make the update of the whole, or train.accumulate is refused beforehand."""
    if "full_batches" in methods.build(name, options).needs:
        try:
            toy.learner(name, options, accumulate=2)
        except RecipeError as error:
            need("micro-batches" in error.message, "train.accumulate is refused for something else")
            need("accumulate=1" in error.hint, "train.accumulate is refused without the cure")
            return
        raise Broken("needs full_batches, but train.accumulate = 2 is not refused")
    whole, parts = toy.learner(name, options), toy.learner(name, options, accumulate=2)
    given = toy.batches(whole, 1)
    for phase, epoch in stretches(whole):
        for one in (whole, parts):
            one.begin_epoch(epoch, lambda one=one: toy.train_pass(one))
            one.method.eval()  # what batch norm and dropout make of a half is no business of the equation's
            for module in one.method.learners().values():
                module.eval()
        (here,), (there,) = (teach(one, given, epoch * STEPS, epoch) for one in (whole, parts))
        if noisy(toy, name, options):
            need(finite(there), "the loss of micro-batches is not finite")
            raise Idle("it draws noise, which halves draw anew")
        need(
            alike(here, there), f"phase {phase.name}: {there} in halves, {here} whole: full_batches is missing in needs"
        )
        for key, module in whole.method.learners().items():
            for a, b in zip(module.parameters(), parts.method.learners()[key].parameters(), strict=True):
                need(torch.allclose(a, b, rtol=1e-4, atol=1e-5), f"phase {phase.name}: {key} is updated differently")


def noisy(toy: Toy, name: str, options: Options) -> bool:
    """Whether a loss draws from its lesson's generator."""
    subject = toy.subject(name, options)
    for phase, given in subject.lessons:
        lesson = remade(given)
        subject.terms(phase, lesson)
        if not torch.equal(lesson.generator.get_state(), remade(given).generator.get_state()):
            return True
    return False


def one_image_is_enough(toy: Toy, name: str, options: Options) -> None:
    """A batch of one image has a finite loss, or is declared not to (`pairs`)."""
    if "pairs" in methods.build(name, options).needs:
        try:
            toy.learner(name, options, batch_size=33)  # of a hundred images one is left
        except RecipeError as error:
            need("one image" in error.message, "a last batch of one image is refused for something else")
            return
        raise Broken("needs pairs, but a last batch of one image is not refused")
    one = toy.learner(name, options)
    batch, view = toy.batches(one, 1)[0]
    for phase, epoch in stretches(one):
        one.begin_epoch(epoch, lambda one=one: toy.train_pass(one))
        try:
            (terms,) = teach(one, [(batch.micro(0, 1), rows_of(view, slice(0, 1)))], epoch * STEPS, epoch)
        except Exception as error:
            raise Broken(f"phase {phase.name}: `pairs` is missing in needs: {user_code.words(error)}") from error
        need(finite(terms), f"phase {phase.name}: the loss of one image is {terms}: `pairs` is missing in needs")


def mentors_are_asked_for(toy: Toy, name: str, options: Options) -> None:
    """With the number of mentors it says it needs it trains; with fewer it is refused beforehand."""
    least = methods.build(name, options).teachers
    one = toy.learner(name, options, mentors=least)
    given = [(batch, outputs[:least]) for batch, outputs in toy.batches(one, 1)]
    need(all(map(finite, teach(one, given))), f"the loss with {least} mentors is not finite")
    if not least:
        return
    try:
        toy.learner(name, options, mentors=least - 1)
    except RecipeError as error:
        need(
            user_code.label(name) in error.message and "--teacher" in error.hint,
            "too few mentors are refused without a cure",
        )
        return
    raise Broken(f"says it needs {least} mentors, and is not refused with fewer")


def what_is_logged_is_the_loss(toy: Toy, name: str, options: Options) -> None:
    """An epoch's row is plain finite numbers under plain names; its terms add up to the loss."""
    one = toy.learner(name, options)
    for step, (batch, view) in enumerate(toy.batches(one, 2)):
        one.step(batch, view, 0, step, step)
    row = one.row(1, {})
    for key, value in row.items():
        need(isinstance(value, int | float) and math.isfinite(value), f"{key} is logged as {value!r}")
    parts = sum(value for key, value in row.items() if key.startswith("loss/"))
    need(abs(row["train/loss"] - parts) <= 1e-6 * abs(parts) + 1e-9, "the terms do not add up")


def graduate_is_what_ships(toy: Toy, name: str, options: Options) -> None:
    """The graduate answers logits of the data's classes, and read back from what a run keeps it answers the same."""
    one = toy.learner(name, options, student="cifar_resnet10_xxs")
    given = toy.batches(one, 2)
    teach(one, given)
    pixels = given[0][0].images
    graduate = one.graduate().eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        out = graduate(pixels)
        need(out.shape == (len(pixels), 10), f"the graduate answers {list(out.shape)}, not [{len(pixels)}, 10]")
        need(torch.isfinite(out).all(), "the graduate's answers are not finite")
        run = Run(Path(folder))
        save_student(
            run,
            "student",
            one.graduate(),
            one.classroom.data,
            task="classify",
            epoch=1,
            score={},
            weights=one.weights(),
        )
        again = student_of(run).to(toy.device)(pixels)
    need(torch.allclose(out, again, rtol=1e-4, atol=1e-4), "what is kept answers otherwise than what was scored")


PROBES: tuple[Any, ...] = ({"zzz": None}, "zzz", math.nan, [None])


def options_are_checked(toy: Toy, name: str, options: Options) -> None:
    """An option it does not have, or of a kind it cannot be, is refused by name."""
    allowed = methods.options(name)
    for key in ("zzz", *allowed):
        refused = 0
        for probe in PROBES:
            try:
                methods.build(name, {**options, key: probe}, "toy")
            except RecipeError as error:
                need(
                    f"method.{key}" in error.message, f"{key} = {probe!r} is refused without its name: {error.message}"
                )
                refused += 1
        need(refused == len(PROBES) or key != "zzz", "options that it does not have are taken")
        need(refused > 0, f"any value will do for {key}: give it a type")


Check = Callable[[Toy, str, Options], None]
CHECKS: dict[str, Check] = {
    "options are checked": options_are_checked,
    "terms are finite scalars": terms_are_sound,
    "extreme answers stay finite": extremes_stay_finite,
    "half precision is float32": half_is_float,
    "steps are alike": steps_are_alike,
    "nothing is read back to the host": nothing_is_read_back,
    "no step waits for the GPU": no_step_waits,
    "peers may be swapped": peers_may_be_swapped,
    "peers' targets are detached": peers_targets_are_detached,
    "the loss falls": loss_falls,
    "only learners learn": only_learners_learn,
    "it goes on as it was saved": goes_on_as_it_was,
    "so does its moving average": goes_on_averaged,
    "noise follows seed and step": noise_follows_seed_and_step,
    "neighbours do not matter": neighbours_do_not_matter,
    "mixup": mixup_trains_or_is_refused,
    "micro-batches": micro_batches_add_up_or_are_refused,
    "one image": one_image_is_enough,
    "mentors are asked for": mentors_are_asked_for,
    "what is logged": what_is_logged_is_the_loss,
    "the graduate is what ships": graduate_is_what_ships,
}
"""Every check by the words a table shows."""
