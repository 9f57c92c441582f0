"""EBKD, CA-MKD and AEKD with real networks as student and teachers, against their equations written out."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from heads_kit import CPU, SIZE, K, member, reached
from torch import Tensor

from kdcli import methods
from kdcli.errors import RecipeError
from kdcli.methods import Lesson, Phase, SetupContext
from kdcli.methods.multi_teacher import CAMKD
from kdcli.recipe import TrainConfig
from kdcli.tasks import Classify

B = 6
PHASE = Phase("main", 1, ("student",), TrainConfig())
TEACHERS = ("wide", "torchvision", "wrn")  # of other widths and map sizes than each other


class Several:
    """A method with a student and several teachers, and a lesson for it."""

    def __init__(self, name: str, student: str = "zoo", teachers: tuple[str, ...] = TEACHERS, **options: Any) -> None:
        self.method = methods.build(name, options)
        self.student = member(student, 1)
        seeds = {kind: seed for seed, kind in enumerate(TEACHERS, 2)}  # a teacher is the same in every order
        self.teachers = [member(kind, seeds.get(kind, 9)).requires_grad_(False).eval() for kind in teachers]
        self.task, self.target = Classify(K), torch.arange(B) % K
        self.pixels = torch.rand(B, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
        room = SetupContext(
            self.student, self.teachers, cast(Any, SimpleNamespace()), self.task, PHASE.train, CPU, cast(Any, 0)
        )
        self.method.context = room
        with torch.no_grad():
            self.method.setup(room, self.lesson())

    def lesson(self) -> Lesson:
        needs = self.method.needs
        with torch.no_grad():
            seen = [teacher.see(self.pixels, needs) for teacher in self.teachers]
        view = self.student.see(self.pixels, needs)
        generator = torch.Generator().manual_seed(0)
        return Lesson(self.target, torch.arange(B), 0.0, 0, self.task, generator, view, {"student": view}, seen)

    def terms(self, lesson: Lesson | None = None) -> dict[str, Tensor]:
        return self.method.loss(lesson or self.lesson(), PHASE)


def test_ebkd_is_its_equation():
    room = Several("ebkd", alpha=2, beta=3)
    lesson = room.lesson()
    out = lesson.mentors_out
    h = -(out.softmax(-1) * out.log_softmax(-1)).sum(-1)
    w = 1 - h / h.sum(0)
    soft = room.task.soft(lesson.student.out, out, 4.0)
    terms = room.terms(lesson)
    torch.testing.assert_close(terms["mentors"], 3 * (w * soft).sum() / (len(TEACHERS) * B))
    torch.testing.assert_close(terms["hard"], 2 * room.task.hard(lesson.student.out, room.target).mean())


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("wide", [False, True])
def test_camkd_is_its_equations(variant, wide):
    room = Several("camkd", variant=variant, wide=wide)
    lesson, m = room.lesson(), len(TEACHERS)
    share = 1 / m if variant == "official" else 1.0
    assert isinstance(room.method, CAMKD)

    def weights(outs: list[Tensor]) -> Tensor:
        ce = torch.stack([F.cross_entropy(out, room.target, reduction="none") for out in outs])
        return (1 - ce.softmax(0)) / (m - 1)

    student, mentors = lesson.student, lesson.mentors
    soft = room.task.soft(student.out, lesson.mentors_out, 4.0)
    terms = room.terms(lesson)
    torch.testing.assert_close(terms["mentors"], share * (weights([one.out for one in mentors]) * soft).sum() / B)

    ours, errors, probes = [*student.stages.values()][-1], [], []
    for n, (project, teacher) in enumerate(zip(room.method.projectors, room.teachers, strict=True)):
        theirs = [*mentors[n].stages.values()][-1]
        assert ours.shape[2:] != theirs.shape[2:] or n != 1  # one of them is of another size
        x = F.interpolate(ours, theirs.shape[2:], mode="bilinear") if theirs.shape[2] > ours.shape[2] else ours
        x = F.adaptive_avg_pool2d(x, (theirs.shape[2], theirs.shape[3]))
        x = project(x)
        errors.append((x - theirs).square().mean((1, 2, 3)))
        net, head = teacher.net, teacher.head
        assert head.bias is not None
        x = net.tail(x) if hasattr(net, "tail") else x  # pyright: ignore  # the wide nets' last norm and activation
        probes.append(x.mean((2, 3)) @ head.weight.T + head.bias)
    expected = 50 * share * (weights(probes) * torch.stack(errors)).sum() / B
    torch.testing.assert_close(terms["feature"], expected, rtol=1e-4, atol=1e-4)


def test_camkds_weights_learn_only_in_the_official_form():
    """The gradient of the whole feature part less that through the errors alone is that through the weights."""
    grads = []
    for variant in ("paper", "official"):
        room = Several("camkd", variant=variant)
        room.terms()["feature"].backward()
        grads.append(torch.cat([p.grad.flatten() for p in room.method.parameters() if p.grad is not None]).clone())
    assert not torch.allclose(grads[0] / len(TEACHERS), grads[1], rtol=1e-3)


def test_camkd_does_not_depend_on_its_teachers_order():
    """The student's original map is resized for each: the larger teacher after the smaller sees no shrunk copy."""
    one = Several("camkd")
    losses = []
    for order in ([0, 1, 2], [2, 1, 0]):
        lesson = one.lesson()
        lesson.mentors = [lesson.mentors[m] for m in order]
        two = Several("camkd", teachers=tuple(TEACHERS[m] for m in order))
        assert isinstance(one.method, CAMKD)
        assert isinstance(two.method, CAMKD)
        two.method.projectors = torch.nn.ModuleList(one.method.projectors[m] for m in order)
        losses.append(two.terms(lesson)["feature"])
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("student", ["zoo", "torchvision", "timm", "vit", "swin"])
@pytest.mark.parametrize("name", ["ebkd", "camkd", "aekd"])
def test_gradient_reaches_student_and_projectors_and_no_teacher(name, student):
    room = Several(name, student)
    before = [{key: x.clone() for key, x in teacher.state_dict().items()} for teacher in room.teachers]
    terms = room.terms()
    assert all(value.isfinite() and value.shape == () for value in terms.values())
    torch.stack([*terms.values()]).sum().backward()
    assert reached(room.student) > 0.5
    assert all(reached(part) == 1 for part in room.method.children())
    for teacher, state in zip(room.teachers, before, strict=True):
        assert all(p.grad is None for p in teacher.parameters())
        assert all(torch.equal(x, state[key]) for key, x in teacher.state_dict().items())


@pytest.mark.parametrize("teacher", ["vit", "swin"])
def test_camkd_refuses_a_teacher_whose_classifier_does_not_take_its_last_map(teacher):
    with pytest.raises(
        RecipeError, match=r"method\.feature: the classifier of .* reads more than its last map"
    ) as caught:
        Several("camkd", teachers=("wide", teacher))
    assert "--set method.feature=0" in caught.value.hint
    room = Several("camkd", teachers=("wide", teacher), feature=0)
    assert room.method.needs == frozenset()
    assert room.terms().keys() == {"hard", "mentors"}


def test_aekd_weighs_by_the_shortest_mean_gradient():
    room = Several("aekd", teachers=("wide", "wrn"), C=1.0)
    lesson = room.lesson()
    q, p = (lesson.student.out / 4).softmax(-1), (lesson.mentors_out / 4).softmax(-1)
    a, b = (q - p).mean(1)
    w = float(
        ((b - a) @ b / (b - a).square().sum()).clamp(0, 1).detach()
    )  # of the first: where w a + (1 - w) b is shortest
    each = room.task.soft(lesson.student.out, lesson.mentors_out, 4.0).mean(-1)
    terms = room.terms(lesson)
    torch.testing.assert_close(terms["mentors"], w * each[0] + (1 - w) * each[1], rtol=1e-4, atol=1e-5)
    assert lesson.notes["weight"].tolist() == pytest.approx([w, 1 - w], abs=1e-5)


def test_aekd_refuses_a_bound_that_no_weights_can_keep():
    with pytest.raises(RecipeError, match=r"method\.C = 0\.3: the weights of 3 teachers") as caught:
        Several("aekd", C=0.3)
    assert "--set method.C=0.33" in caught.value.hint
    assert Several("aekd", C=0.34).terms()["mentors"].isfinite()
