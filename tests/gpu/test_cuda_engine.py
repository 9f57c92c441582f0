"""The engine on CUDA: agrees with the CPU in float32, never waits for the device in a step, and trains in bfloat16."""

from pathlib import Path

import pytest
import torch

from kdcli.data import open_data
from kdcli.mentors.mentors import Mentors
from kdcli.models import cards, checkpoint
from kdcli.recipe import Recipe
from kdcli.system.cuda_graph import Captured
from kdcli.training import loop
from kdcli.training.learner import Learner
from kdcli.training.run import Run
from kdcli.training.student import card
from kdcli.workflows import groups

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def _recipe(**over: object) -> Recipe:
    keys = {
        "data.name": "digits", "data.image_size": 16, "data.per_class": 10, "train.batch_size": 20, "train.epochs": 1,
        "train.precision": "fp32", "classroom.precision": "fp32", "classroom.student": "cifar_resnet10_xxs",
        "classroom.teacher": "cifar_resnet8", "classroom.peers": ["cifar_resnet14"],
    }  # fmt: skip
    return Recipe().with_(**{**keys, **over})


@pytest.fixture
def _mentors(_own_home: object) -> None:
    """Untrained mentors with randomised norms, entered into the zoo for the digits."""
    data = open_data(_recipe().data)
    for name in ("cifar_resnet8", "cifar_resnet14"):
        solo = _recipe(**{"classroom.student": name}).with_method("nokd")
        room = groups.open_classroom(solo, torch.device("cpu"), mentors=False)
        member = room.student(0)
        for module in member.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        cards.add(
            member.net.state_dict(),
            card(member, data, task="classify", epoch=None, score={"top1": 50.0}, origin="test"),
        )
        assert checkpoint.digest(member.net)


def _trained(recipe: Recipe, device: str, folder: object) -> tuple[Learner, list[float]]:
    where = torch.device(device)
    room = groups.open_classroom(recipe, where)
    run = Run(folder / device)  # pyright: ignore
    session = groups.open_session({"classroom": recipe}, room, run, {"classroom": run})
    learner = session.learners[0]
    learner.begin_epoch(0, lambda: iter(()))
    for number, batch in enumerate(session.stream.epoch(0)):
        learner.step(batch, session.mentors.answer(batch).of(learner.needs), 0, number, number)
    learner.check()
    return learner, [float(p.detach().float().sum()) for p in learner.student.parameters()]


@pytest.mark.usefixtures("_mentors")
def test_cuda_agrees_with_the_cpu_in_float32(tmp_path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    _, on_cpu = _trained(_recipe(), "cpu", tmp_path)
    _, on_gpu = _trained(_recipe(), "cuda", tmp_path)
    torch.testing.assert_close(torch.tensor(on_gpu), torch.tensor(on_cpu), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("_mentors")
def test_a_step_never_waits_for_the_device(tmp_path) -> None:
    recipe, where = _recipe(), torch.device("cuda")
    room = groups.open_classroom(recipe, where)
    run = Run(tmp_path / "run")
    session = groups.open_session({"classroom": recipe}, room, run, {"classroom": run})
    learner = session.learners[0]
    learner.begin_epoch(0, lambda: iter(()))
    batches = list(session.stream.epoch(0))
    learner.step(batches[0], session.mentors.answer(batches[0]).of(learner.needs), 0, 0, 0)  # the first allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, batch in enumerate(batches[1:], start=1):
            learner.step(batch, session.mentors.answer(batch).of(learner.needs), 0, number, number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    learner.check()
    assert learner.meter.batches == len(batches)


@pytest.mark.usefixtures("_mentors")
def test_bfloat16_mentors_and_student_train(tmp_path) -> None:
    recipe = _recipe(**{"train.precision": "bf16", "classroom.precision": "bf16"})
    learner, _ = _trained(recipe, "cuda", tmp_path)
    assert isinstance(learner, Learner)
    assert learner.meter.means("term/")["hard"] > 0


@pytest.mark.usefixtures("_mentors")
def test_bfloat16_answers_are_near_float32(tmp_path) -> None:
    room = groups.open_classroom(_recipe(), torch.device("cuda"))
    batch = next(room.data.test.plain(64, "cuda"))
    exact = Mentors(room.mentors, "fp32", torch.device("cuda")).answer(batch)
    near = Mentors(room.mentors, "bf16", torch.device("cuda")).answer(batch)
    for a, b in zip(exact.outputs, near.outputs, strict=True):
        torch.testing.assert_close(b.out, a.out, rtol=0.1, atol=0.1 * float(a.out.abs().max()))


def _twenty(recipe: Recipe, folder: Path, methods: tuple[str, ...] = ("classroom",)) -> list[list[torch.Tensor]]:
    """The learners' parameters after twenty steps."""
    where = torch.device("cuda")
    room = groups.open_classroom(recipe, where)
    recipes = {name: recipe.with_method(name) for name in methods}
    run = Run(folder)
    session = groups.open_session(recipes, room, run, {name: Run(folder / name) for name in recipes})
    session.tune_mentors(0)
    for learner in session.learners:
        learner.begin_epoch(0, lambda: iter(()))
    step = 0
    while step < 20:
        for number, (batch, answers) in enumerate(session.mentors.answer_ahead(session.stream.epoch(step // 5))):
            loop._update(session.learners, batch, answers, 0, number, len(session.stream))
            step += 1
    torch.cuda.synchronize()
    for learner in session.learners:
        learner.check()
    return [[p.detach().float().cpu() for p in learner.student.parameters()] for learner in session.learners]


@pytest.mark.usefixtures("_mentors")
@pytest.mark.parametrize("way", ["train.cuda_graph", "train.compile", "classroom.compile", "classroom.ahead"])
def test_quick_ways_agree_with_eager_float32_over_twenty_steps(tmp_path: Path, way: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    recipe = _recipe(**{"train.lr": 0.005, "train.epochs": 4})
    eager = _twenty(recipe, tmp_path / "eager")[0]
    quick = _twenty(recipe.with_(**{way: 3 if way == "classroom.ahead" else True}), tmp_path / "quick")[0]
    for a, b in zip(eager, quick, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("_mentors")
def test_students_side_by_side_learn_as_alone(tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    recipe = _recipe(**{"train.lr": 0.005, "train.epochs": 4})
    together = _twenty(recipe, tmp_path / "together", ("classroom", "kd", "nokd"))
    for name, beside in zip(("classroom", "kd", "nokd"), together, strict=True):
        alone = _twenty(recipe, tmp_path / name, (name,))[0]
        for a, b in zip(alone, beside, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-3)


def test_a_recorded_computation_is_replayed_with_new_inputs_and_new_noise() -> None:
    generator = torch.Generator("cuda")

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return 2 * x + torch.randn(x.shape, generator=generator, device="cuda")

    recorded = Captured(noisy, (generator,))
    for n in range(6):
        x = torch.full((8,), float(n), device="cuda")
        generator.manual_seed(n)
        found = recorded(x).clone()
        generator.manual_seed(n)
        torch.testing.assert_close(found, noisy(x))
    assert recorded.graph is not None
    assert recorded(torch.ones(3, device="cuda")).shape == (3,)  # another size goes the plain way
