"""A classroom of small networks on a hundred digits, and a method's lessons in it, for checks of the contract.

The file is long because the checks share every part of the classroom.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_with_path

from kdcli import methods, recipe as recipes
from kdcli.data import Batch, Stream, open_data
from kdcli.errors import KdcliError
from kdcli.mentors.classroom import Classroom
from kdcli.mentors.mentors import Mentors
from kdcli.methods import Lesson, Need, Phase
from kdcli.models import registry
from kdcli.models.member import Member
from kdcli.models.outputs import Output
from kdcli.models.registry import ModelName
from kdcli.recipe import DataConfig, Recipe
from kdcli.system import user_code
from kdcli.tasks import TASKS
from kdcli.training.learner import Learner
from kdcli.training.meters import EpochMeter

Options = dict[str, Any]
Given = list[tuple[Batch, list[Output]]]
"""Batches with the mentors' outputs."""
SIZE, BATCH, STEPS, CLASSES = 16, 20, 5, 10  # pixels a side, images a batch, batches an epoch
FEATURES = {Need.MAPS, Need.PRE, Need.POOLED}
"""Needs for which the networks are convolutional."""
Change = Callable[[str, Tensor], Tensor]
"""Replaces a tensor of a lesson, given its place (`student.out`, `mentors[0].maps['stage1']`) and its value."""
Check = Callable[["Toy", str, Options], None]
"""A rule of the contract: (toy, the method's name, its options)."""


class Broken(Exception):
    """How the method breaks the rule."""


class Idle(Exception):
    """Why the rule does not apply to the method."""


def need(true: object, words: str) -> None:
    if not bool(true):
        raise Broken(words)


class ToyClassroom(Classroom):
    """A classroom whose student is a small convolutional network, unless an architecture is named."""

    def student(self, seed: int, arch: str | None = None) -> Member:
        if arch or self.student_name.arch != "toy":
            member = super().student(seed, arch)
            member.net.head_drop.p = 0.2  # pyright: ignore
            return member
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            body = [conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2)]
            return _member(nn.Sequential(*body, nn.Linear(128, CLASSES)), self.student_name, self).to(self.device)


class Toy:
    """A hundred digits and three mentors: the teacher is the best, the last peer is worse than an untrained network.

    For methods that read only logits the networks are linear, else small residual ones. For `multilabel` each image has
    a second class in addition to its digit.
    """

    def __init__(self, device: torch.device, task: str = "classify") -> None:
        self.device, self.task = device, TASKS[task](CLASSES)
        self.data = open_data(DataConfig(name="digits", per_class=10, image_size=SIZE, augment="none"), device=device)
        if task == "multilabel":
            digit = self.data.train.targets
            self.data.train.targets = (
                F.one_hot(digit, CLASSES) | F.one_hot((3 * digit + 1) % CLASSES, CLASSES)
            ).float()
        self._mentors: dict[bool, list[Member]] = {}
        self._before: dict[bool, str] = {}
        self._given: dict[Any, Given] = {}
        self._subjects: dict[str, Subject] = {}

    def put(self, check: Check, name: str, options: Options) -> None:
        """Run a check, after which the mentors must be unchanged. Raises Broken for whatever error occurred."""
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
                    raise Broken("the weights, statistics or mode of a mentor have changed")

    def mentors(self, needs: frozenset[Need]) -> list[Member]:
        maps = bool(needs & FEATURES)
        if maps not in self._mentors:
            self._mentors[maps] = [self._mentor(maps, place, noise) for place, noise in enumerate((0.0, 0.3, 2.0))]
            self._before[maps] = fingerprint(self._mentors[maps])
        return self._mentors[maps]

    def _mentor(self, maps: bool, place: int, noise: float) -> Member:
        """A network whose output depends on training mode: a linear one fitted to noisy labels, or a small residual one
        trained for some steps."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(place)
            if maps:
                name = registry.resolve(("cifar_resnet8", "cifar_resnet10_xxs", "cifar_resnet8")[place])
                net = registry.create(name, CLASSES).module
                for layer in net.modules():  # norms at their initial values would hide errors
                    if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
                        nn.init.uniform_(layer.weight, 0.5, 1.5)
                        nn.init.normal_(layer.bias, std=0.2)
                        layer.running_mean.normal_(std=0.2)
                net.head_drop.p = 0.5  # pyright: ignore
            else:
                name, head = ModelName("zoo", "linear", "none", "linear"), nn.Linear(3 * SIZE * SIZE, CLASSES)
                net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), head)
            member = _member(net, name, self).to(self.device).requires_grad_(False).eval()
            batch = next(self.data.train.plain(len(self.data.train), self.device))
            if maps:
                self._train(member, batch, (40, 15, 5)[place])
            else:
                _fit(member, batch, noise)
        member.name = f"mentor{place}"
        return member

    def _train(self, member: Member, batch: Batch, steps: int) -> None:
        optimizer = torch.optim.Adam(member.requires_grad_(True).train().parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            self.task.hard(member(batch.images), batch.target).mean().backward()
            optimizer.step()
        optimizer.zero_grad()
        member.requires_grad_(False).eval()

    def learner(self, name: str, options: Options, *, student: str = "", mentors: int = 3, **train: Any) -> Learner:
        """A learner that has begun its first epoch."""
        settings = {"epochs": 30, "batch_size": BATCH, "lr": 0.02, "schedule": "constant", "precision": "fp32", **train}
        tables = {"data": {"name": "digits"}, "method": {"name": name, **options}, "train": settings}
        recipe = recipes.from_dict({**tables, "task": self.task.name}, "toy")
        one = Learner(recipe.method.label, recipe, self.classroom(recipe, student, mentors), STEPS)
        one.begin_epoch(0, lambda: self.train_pass(one))
        return one

    def classroom(self, recipe: Recipe, student: str = "", mentors: int = 3) -> ToyClassroom:
        needs = methods.build(recipe.method.name, recipe.method.options).needs
        student = student or ("cifar_resnet10_xxs@none" if needs & FEATURES else "")
        name = registry.resolve(student) if student else ModelName("zoo", "toy", None, "toy")
        return ToyClassroom(recipe, self.data, self.mentors(needs)[:mentors], self.device, name)

    def train_pass(self, one: Learner) -> Iterator[Lesson]:
        for batch in self.data.train.plain(BATCH, self.device):
            batch, outputs = self._answered(one.method.needs, batch)
            yield one.lesson(batch, outputs if one.classroom.mentors else [], 0, 0)

    def _answered(self, needs: frozenset[Need], batch: Batch) -> tuple[Batch, list[Output]]:
        """A batch with the mentors' outputs, and with its mirror image as second view if the method needs two."""
        if Need.TWO_VIEWS in needs:
            batch = replace(batch, strong=batch.images.flip(-1))
        return batch, Mentors(self.mentors(needs), "fp32", self.device, needs=needs).answer(batch).outputs

    def batches(self, one: Learner, n: int, **mixing: float) -> Given:
        """The first `n` batches of the training stream with the mentors' outputs, mixed by `mixing`."""
        needs = one.method.needs
        known = self._given.setdefault((needs, *mixing.items()), [])
        if len(known) < n:
            stream = Stream(self.data, BATCH, seed=0, device=self.device, **mixing)  # pyright: ignore[reportArgumentType]
            found = [batch for epoch in range(-(-n // len(stream))) for batch in stream.epoch(epoch)][:n]
            known += [self._answered(needs, batch) for batch in found[len(known) :]]
        return known[:n]

    def phases(self, *learners: Learner) -> Iterator[tuple[Phase, int]]:
        """Each phase with a new name and its first epoch, which all of the learners have begun."""
        found: dict[str, tuple[Phase, int]] = {}
        start = 0
        for phase in learners[0].phases:
            if phase.epochs:
                found.setdefault(phase.name, (phase, start))
            start += phase.epochs
        for phase, epoch in found.values():
            for one in learners:
                one.begin_epoch(epoch, lambda one=one: self.train_pass(one))
            yield phase, epoch

    def subject(self, name: str, options: Options) -> "Subject":
        """The method with one real lesson of every phase, shared by all checks that only call its loss."""
        key = json.dumps([name, options], sort_keys=True)
        if key not in self._subjects:
            self._subjects[key] = Subject(self, name, options)
        return self._subjects[key]


@torch.no_grad()
def _fit(member: Member, batch: Batch, noise: float) -> None:
    """Ridge regression of a linear network's last layer."""
    head = member.head
    x = member.net[:-1](member.read(batch.images)).double()  # pyright: ignore[reportIndexIssue]
    wanted = (F.one_hot(batch.target, CLASSES) if batch.target.ndim == 1 else batch.target).double()
    wanted = wanted + noise * torch.randn(wanted.shape, dtype=torch.float64).to(wanted)
    mean, scale = x.mean(0), 1e-3 * x.square().sum(-1).mean()
    ridge = 5 * (x - mean).T @ torch.linalg.solve((x - mean) @ (x - mean).T + scale * torch.eye(len(x)).to(x), wanted)
    head.weight.copy_(ridge.T)
    assert head.bias is not None
    head.bias.copy_(-mean @ ridge)


def _member(net: nn.Module, name: ModelName, of: "Toy | Classroom") -> Member:
    return Member(
        net, name, mean=of.data.mean, std=of.data.std, input_size=(SIZE, SIZE), interpolation="bilinear",
        num_classes=CLASSES,
    )  # fmt: skip


def fingerprint(modules: Any) -> str:
    """A digest of all weights, statistics and modes."""
    digest = hashlib.sha256()
    for module in modules:
        for key, value in module.state_dict().items():
            digest.update(key.encode() + value.detach().cpu().numpy().tobytes())
        digest.update(bytes(part.training for part in module.modules()))
    return digest.hexdigest()


def train(one: Learner, given: Given, epoch: int = 0, first: int = 0) -> list[dict[str, float]]:
    """One step per batch, the first of them being step `first` of the epoch; the terms of each."""
    out = []
    for step, (batch, outputs) in enumerate(given, epoch * STEPS + first):
        one.meter = EpochMeter()
        one.step(batch, outputs, epoch, step % STEPS, step)
        out.append(one.meter.totals("term/"))
    return out


class Subject:
    """A method's learner, and a recorded lesson of each of its phases."""

    def __init__(self, toy: Toy, name: str, options: Options) -> None:
        self.learner = toy.learner(name, options)
        given = toy.batches(self.learner, 1)
        self.lessons = [(phase, _recorded(self.learner, given, epoch)) for phase, epoch in toy.phases(self.learner)]
        self.method = self.learner.method
        self.state = copy.deepcopy(self.learner.state())

    def terms(self, phase: Phase, lesson: Lesson) -> dict[str, Tensor]:
        """The terms of a lesson, always from the same state of the method."""
        self.restore(phase)
        lesson.generator.manual_seed(0)
        torch.manual_seed(0)  # for dropout in the method's own networks
        return self.method.loss(lesson, phase)

    def restore(self, phase: Phase) -> None:
        """Reset the method and its learners; only those that the phase names require gradients."""
        self.method.load_state_dict(self.state["method"])
        for name, module in self.method.learners().items():
            module.load_state_dict(self.state["learners"][name])
            module.requires_grad_(name in phase.learners)

    def weights(self, phase: Phase) -> list[Tensor]:
        """The parameters that may be trained in a phase."""
        learners = self.method.learners()
        parts = nn.ModuleList([self.method, *(learners[name] for name in phase.learners)])
        return [p for p in parts.parameters() if p.requires_grad]


def _recorded(one: Learner, given: Given, epoch: int) -> Lesson:
    """The lesson that a real step gives to the method."""
    seen: list[Lesson] = []
    loss = one.method.loss

    def recording(lesson: Lesson, phase: Phase) -> dict[str, Tensor]:
        seen.append(remade(lesson))
        return loss(lesson, phase)

    one.method.loss = recording  # pyright: ignore[reportAttributeAccessIssue]
    try:
        train(one, given, epoch)
    except Exception:
        if not seen:  # else there is a lesson, and a check that reports what is wrong with the loss
            raise
    finally:
        del one.method.loss
    return seen[0]


def remade(lesson: Lesson, change: Change = lambda where, x: x, **facts: Any) -> Lesson:
    """The same lesson from new tensors, those of the learners requiring gradients; `change` may replace them."""

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
    """The learners' outputs by place: the tensors that a gradient may reach."""
    return {
        f"{who}{keystr(path)}": x
        for who, output in lesson.outputs.items()
        for path, x in tree_flatten_with_path(output)[0]
        if x is not None
    }
