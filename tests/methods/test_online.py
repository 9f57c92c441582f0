"""DML, ONE, OKDDip and FFL: against their equations, in both forms, and through whole trainings."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import engine_kit as kit
import pytest
import torch
from heads_kit import CPU, SIZE, K, member, reached
from torch import Tensor

from kdcli import methods
from kdcli.errors import InterruptedRun, RecipeError
from kdcli.losses.online import mutual_loss, peer_loss
from kdcli.methods import Lesson, Phase, SetupContext
from kdcli.methods.online import Cohort
from kdcli.models.member import Member
from kdcli.recipe import TrainConfig
from kdcli.tasks import Classify
from kdcli.training.evaluate import score
from kdcli.training.student import student_of
from kdcli.workflows import groups

B = 6
PHASE = Phase("main", 1, ("student",), TrainConfig())
FORMS = [
    ("dml", {}), ("dml", {"students": 3, "form": "ensemble"}), ("dml", {"variant": "official"}),
    ("dml", {"cohort": ["wide"]}), ("one", {}), ("okddip", {}), ("okddip", {"form": "networks"}), ("ffl", {}),
    ("ffl", {"form": "networks"}), ("ffl", {"form": "networks", "cohort": ["wide", "timm"]}),
]  # fmt: skip
EVERY = pytest.mark.parametrize(("name", "options"), FORMS, ids=lambda one: one if isinstance(one, str) else str(one))


class Together:
    """A method whose students are small networks, and a lesson for it."""

    def __init__(self, name: str, student: str = "zoo", **options: Any) -> None:
        built = methods.build(name, options)
        assert isinstance(built, Cohort)
        self.method, self.student = built, member(student, 1)
        self.task, self.target = Classify(K), torch.arange(B) % K
        self.pixels = torch.rand(B, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
        self.seeds: list[int] = []
        new = cast(Callable[[int, str | None], Member], lambda seed, kind: self._member(seed, kind or student))
        self.method.context = SetupContext(
            self.student, [], cast(Any, SimpleNamespace()), self.task, PHASE.train, CPU, new
        )
        with torch.no_grad():
            self.method.setup(self.method.context, self.lesson(first=True))
        self.method.train()

    def _member(self, seed: int, kind: str) -> Member:
        self.seeds.append(seed)
        return member(kind, seed % 1000)

    def lesson(self, epoch: float = 80.0, *, first: bool = False) -> Lesson:
        readers = {"student": self.student} if first else cast(dict[str, Member], self.method.learners())
        views = {name: one.see(self.pixels, self.method.needs) for name, one in readers.items()}
        generator = torch.Generator().manual_seed(0)
        student = views["student"]
        return Lesson(self.target, torch.arange(B), epoch, 0, self.task, generator, student, views, [])

    def ce(self, *outs: Tensor) -> Tensor:
        return torch.stack([self.task.hard(out, self.target).mean() for out in outs]).sum()

    def terms(self, lesson: Lesson) -> dict[str, Tensor]:
        return self.method.loss(lesson, PHASE)


@EVERY
def test_every_student_learns_and_no_two_start_equal(name, options):
    room = Together(name, **options)
    assert len(set(room.seeds)) == len(room.seeds) == room.method.count
    terms = room.terms(room.lesson())
    assert all(value.isfinite() and value.shape == () for value in terms.values())
    torch.stack([*terms.values()]).sum().backward()
    students = [room.student, *room.method.others.values()]
    assert all(reached(one) > 0.9 for one in students)
    own = [p for p in room.method.parameters() if not any(p is q for q in room.student.parameters())]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own if p.requires_grad)


def test_dml_is_the_mutual_loss_and_detaches_its_targets():
    room = Together("dml", students=3, tau=2.0, alpha=2, beta=3)
    lesson = room.lesson()
    outs = torch.stack([view.out for view in lesson.outputs.values()])
    terms = room.terms(lesson)
    torch.testing.assert_close(terms["hard"], 2 * room.ce(*outs))
    torch.testing.assert_close(terms["peers"], 3 * mutual_loss(outs, tau=2.0).mean())
    assert list(lesson.outputs) == ["student", "student2", "student3"]
    grads = []
    for variant in ("paper", "official"):
        one = Together("dml", variant=variant)
        given = one.lesson()
        grads.append(torch.autograd.grad(one.terms(given)["peers"], given.student.out)[0])
    q, p = ((given.outputs[who].out / 3).softmax(-1) for who in ("student", "student2"))
    assert torch.allclose(grads[0], 3 * (q - p) / B, atol=1e-5)
    assert not torch.allclose(grads[1], grads[0], atol=1e-3)


def test_one_is_its_equation():
    room = Together("one", branches=3, ramp_epochs=80)
    lesson = room.lesson(epoch=40.0)
    answers = room.method.answers(lesson)
    outs = torch.stack([answer.out for answer in answers])
    gate = cast(Any, room.method).gate(lesson.student.stages[room.method.tap].mean((2, 3)))
    assert torch.allclose(gate.sum(-1), torch.ones(B))
    ensemble = torch.stack([gate[:, n, None] * outs[n] for n in range(3)]).sum(0)
    terms = room.terms(lesson)
    torch.testing.assert_close(terms["hard"], room.ce(*outs, ensemble))
    taught = sum(peer_loss(out, ensemble.detach()).mean() for out in outs)
    torch.testing.assert_close(terms["ensemble"], 0.2865048 * taught, rtol=1e-5, atol=1e-6)  # exp(-1.25)
    assert torch.equal(answers[0].out, lesson.student.out)
    gates = [*cast(Any, room.method).gate.parameters()]
    assert all(
        grad is None for grad in torch.autograd.grad(terms["ensemble"], gates, retain_graph=True, allow_unused=True)
    )
    assert any(
        grad.abs().sum() > 0 for grad in torch.autograd.grad(terms["hard"], gates)
    )  # it learns by the ensemble's


@pytest.mark.parametrize("form", ["branches", "networks"])
def test_okddip_is_its_equation(form):
    room = Together("okddip", form=form, alpha=2.0)
    lesson, method = room.lesson(), cast(Any, room.method)
    leader, *peers = method.answers(lesson)
    z, h = torch.stack([peer.out for peer in peers]), torch.stack([peer.vectors for peer in peers])
    assert method.query.weight.shape == (h.shape[-1] // 8, h.shape[-1])
    w = torch.einsum("abi->iab", (method.query(h)[:, None] * method.key(h)[None]).sum(-1)).softmax(-1)
    aims = torch.einsum("iab,bik->aik", w, z)
    terms = room.terms(lesson)
    torch.testing.assert_close(terms["hard"], room.ce(leader.out, *z))
    torch.testing.assert_close(terms["peers"], 2 * sum(peer_loss(z[a], aims[a]).mean() for a in range(3)))
    torch.testing.assert_close(terms["leader"], 2 * peer_loss(leader.out, z.mean(0)).mean())
    assert method.graduate() is room.student
    torch.stack([*terms.values()]).sum().backward()
    assert method.query.weight.grad.abs().sum() > 0  # by the targets alone
    assert method.key.weight.grad.abs().sum() > 0


def test_okddips_leader_term_reaches_the_peers_too():
    room = Together("okddip", form="networks")
    lesson = room.lesson()
    outs = [lesson.outputs[name].out for name in ("student", "student2")]
    grads = torch.autograd.grad(room.terms(lesson)["leader"], outs)
    assert all(grad.abs().max() > 1e-5 for grad in grads)


@pytest.mark.parametrize("options", [{}, {"form": "networks", "cohort": ["wide"]}], ids=["branches", "networks"])
def test_ffl_is_its_equation(options):
    room = Together("ffl", beta=2.0, **options)
    lesson, method = room.lesson(), cast(Any, room.method)
    answers = method.answers(lesson)
    maps = [answer.last for answer in answers]
    smallest = min(x.shape[2] for x in maps)
    fused = method.fusion(torch.cat([torch.nn.functional.adaptive_avg_pool2d(x, smallest) for x in maps], 1))
    outs = [answer.out for answer in answers]
    terms = room.terms(lesson)
    torch.testing.assert_close(terms["hard"], room.ce(*outs, fused), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["fusion"], 2 * sum(peer_loss(o, fused.detach()).mean() for o in outs))
    mean = torch.stack(outs).detach().mean(0)
    torch.testing.assert_close(terms["mean"], 2 * peer_loss(fused, mean).mean())
    depthwise = method.fusion[0]
    assert depthwise.groups == depthwise.in_channels == sum(x.shape[1] for x in maps)


@pytest.mark.parametrize("student", ["zoo", "wrn", "mobile", "timm", "conv_head", "torchvision"])
@pytest.mark.parametrize(("name", "keep"), [("one", 0), ("one", 2), ("ffl", 1)])
def test_a_kept_branch_is_a_whole_network(name, keep, student):
    """What is scored is the branch that learned, with the beginning that all share, after an update too."""
    room = Together(name, student, keep=keep)
    sgd = torch.optim.SGD([*{*room.student.parameters(), *room.method.parameters()}], lr=0.01)
    torch.stack([*room.terms(room.lesson()).values()]).sum().backward()
    sgd.step()
    graduate = room.method.graduate()
    assert (graduate is room.student) == (keep == 0)
    assert graduate.net.state_dict().keys() == room.student.net.state_dict().keys()
    room.student.eval()
    room.method.eval()
    with torch.no_grad():
        branch = room.method.answers(room.lesson())[keep].out
        assert torch.allclose(graduate.eval()(room.pixels), branch, atol=1e-4)
        assert keep == 0 or not torch.allclose(branch, room.student(room.pixels), atol=1e-2)


@pytest.mark.parametrize("name", ["one", "okddip", "ffl"])
def test_a_transformer_has_no_branches(name):
    with pytest.raises(RecipeError, match="cannot be divided after stage3") as caught:
        Together(name, "vit")
    assert "--set method.form=networks" in caught.value.hint
    if name != "one":
        assert Together(name, "vit", form="networks").terms


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("one", {"keep": 3}, r"method.keep = 3: there are 3 students"),
        ("ffl", {"keep": 2}, r"method.keep = 2: there are 2 students"),
        ("ffl", {"cohort": ["wide"]}, "method.cohort: branches have the student's own architecture"),
        ("one", {"split": "stage9"}, r"method.split: the student has no tap 'stage9'"),
        ("one", {"branches": 1}, "method.branches"),
        ("okddip", {"students": 2}, "method.students"),
    ],
)
def test_what_makes_no_sense_is_refused(name, options, words):
    with pytest.raises(RecipeError, match=words):
        Together(name, **options)


def test_branches_part_at_the_chosen_stage():
    early, late = Together("one", split="stage1"), Together("one")
    assert (early.method.tap, late.method.tap) == ("stage1", "stage2")
    sizes = [len({*room.method.copies[0].parameters()} - {*room.student.parameters()}) for room in (early, late)]
    assert sizes[0] > sizes[1] > 0


# --- whole trainings --------------------------------------------------------------------------------------------------


@pytest.fixture
def _zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_HOME", str(kit.home()))


@pytest.mark.usefixtures("_zoo")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dml", {"students": 3}),
        ("one", {"keep": 1, "ramp_epochs": 1}),
        ("okddip", {"ramp_epochs": 0}),
        ("ffl", {"form": "networks", "cohort": ["cifar_resnet8"], "keep": 1}),
        ("camkd", {}),
    ],
    ids=["dml", "one", "okddip", "ffl", "camkd"],
)
def test_a_stopped_training_ends_as_a_whole_one_and_ships_what_it_scored(name, options, tmp_path: Path):
    config = kit.recipe(name, **{f"method.{key}": value for key, value in options.items()})
    whole = kit.trained(config, tmp_path / "whole")

    def stop(step: Any) -> None:
        raise KeyboardInterrupt

    stopped = kit.session(config, tmp_path / "stopped")
    events = groups.go(stopped)
    with pytest.raises((KeyboardInterrupt, InterruptedRun)):
        kit.drive(events, kit.at(2, 2, stop))
    again = kit.session(config, tmp_path / "stopped", resume=True)
    kit.drive(groups.go(again, resume=True))
    assert kit.same(kit.student(whole), kit.student(again.run))
    assert whole.metrics() == again.run.metrics()
    member = student_of(whole)
    assert score(member, again.data.test, again.learners[0].task, kit.CPU) == pytest.approx(whole.score)
    kept = "cifar_resnet8" if name == "ffl" else config.classroom.student
    assert member.architecture.arch == kept


@pytest.mark.usefixtures("_zoo")
def test_a_branch_that_ships_is_not_the_student(tmp_path: Path):
    """And its moving average is taken over the branch."""
    first, second, averaged = (
        kit.trained(kit.recipe("one", **over), tmp_path / str(n))
        for n, over in enumerate([{}, {"method.keep": 2}, {"method.keep": 2, "train.ema": 0.5}])
    )
    a, b, c = (kit.student(run) for run in (first, second, averaged))
    assert torch.equal(a["stem.conv.weight"], b["stem.conv.weight"])  # the same training, the shared beginning
    assert not torch.equal(a["fc.weight"], b["fc.weight"])
    assert not torch.equal(b["fc.weight"], c["fc.weight"])
