"""The step and the loop against plain loops written out here, and what is kept, logged and refused along the way."""

import math
import signal
import sys
from pathlib import Path
from typing import Any

import engine_kit as kit
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli import methods
from kdcli.data import Batch
from kdcli.errors import DivergedError, InterruptedRun, RecipeError
from kdcli.models import cards as zoo, checkpoint, registry
from kdcli.models.outputs import Output
from kdcli.recipe import Recipe
from kdcli.tasks import Classify, Score
from kdcli.training import learner, loop, session as sessions
from kdcli.training.meters import EpochMeter
from kdcli.training.run import Run
from kdcli.training.session import EpochEnd, Notice, Session, Step
from kdcli.workflows import distill, groups


@pytest.fixture(autouse=True)
def _zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_HOME", str(kit.home()))


# --- against a plain loop ---------------------------------------------------------------------------------------------


def plain_loop(
    config: Recipe, *, parts: int = 1, clip: float | None = None, ema: float | None = None, smoothing: float = 0.0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The student of a control run as anybody would train it, and the moving average of its weights."""
    room = kit.classroom(config)
    member = room.student(config.train.seed)
    stream = groups.open_session({"x": config}, room, Run(Path("unused")), {}).stream
    train = config.train
    optimizer = torch.optim.SGD(member.parameters(), lr=train.lr, momentum=train.momentum, weight_decay=5e-4)
    average = {k: v.clone() for k, v in member.state_dict().items()}
    steps = 0
    for epoch in range(train.epochs):
        for batch in stream.epoch(epoch):
            optimizer.zero_grad()
            size = math.ceil(len(batch) / parts)
            for lo in range(0, len(batch), size):
                x, y = batch.images[lo : lo + size], batch.target[lo : lo + size]
                out = member(x)
                loss = F.cross_entropy(out, y, label_smoothing=0.0 if y.ndim == 2 else smoothing)
                (loss * len(x) / len(batch)).backward()
            if clip:
                norm = torch.stack([p.grad.norm() for p in member.parameters() if p.grad is not None]).norm()
                for p in member.parameters():
                    assert p.grad is not None
                    p.grad *= (clip / (norm + 1e-6)).clamp(max=1.0)
            optimizer.step()
            for k, v in member.state_dict().items():
                if not v.is_floating_point() or steps < 2:  # timm's average starts as a copy
                    average[k] = v.clone()
                elif ema:
                    average[k] = ema * average[k] + (1 - ema) * v
            steps += 1
    strip = lambda state: {k.removeprefix("net."): v.detach() for k, v in state.items()}  # noqa: E731
    return strip(member.state_dict()), strip(average)


def close(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 1e-5, "atol": 1e-6}), msg=name)


def test_the_control_is_a_plain_loop(tmp_path: Path) -> None:
    config = kit.recipe()
    run = kit.trained(config, tmp_path / "run")
    expected, _ = plain_loop(config)
    close(kit.student(run), expected)
    start = kit.classroom(config).student(0).net.state_dict()
    assert not torch.equal(start["fc.weight"], expected["fc.weight"])


def test_accumulated_parts_are_one_update(tmp_path: Path) -> None:
    config = kit.recipe(**{"train.accumulate": 4})
    expected, _ = plain_loop(config, parts=4)
    close(kit.student(kit.trained(config, tmp_path / "run")), expected)


def test_gradients_are_clipped_by_their_whole_norm(tmp_path: Path) -> None:
    config = kit.recipe(**{"train.clip_grad": 0.05})
    expected, _ = plain_loop(config, clip=0.05)
    found = kit.student(kit.trained(config, tmp_path / "run"))
    close(found, expected)
    free, _ = plain_loop(config)
    assert not torch.allclose(free["fc.weight"], found["fc.weight"], atol=1e-4)


def test_the_moving_average_is_what_ships(tmp_path: Path) -> None:
    config = kit.recipe(**{"train.ema": 0.9})
    last, average = plain_loop(config, ema=0.9)
    found = kit.student(kit.trained(config, tmp_path / "run"))
    close(found, average)
    assert not torch.allclose(found["fc.weight"], last["fc.weight"], atol=1e-5)


def test_label_smoothing_is_torchs(tmp_path: Path) -> None:
    config = kit.recipe(**{"train.label_smoothing": 0.2})
    expected, _ = plain_loop(config, smoothing=0.2)
    close(kit.student(kit.trained(config, tmp_path / "run")), expected)


def test_mixed_images_learn_from_shares_of_classes(tmp_path: Path) -> None:
    config = kit.recipe(**{"train.mixup": 0.4, "train.label_smoothing": 0.1})
    expected, _ = plain_loop(config)  # smoothing is in the shares already and must not come twice
    run = kit.trained(config, tmp_path / "run")
    close(kit.student(run), expected)
    assert all(0 <= row["train/top1"] <= 100 for row in run.metrics())


def test_the_training_figures_are_means_over_images(tmp_path: Path) -> None:
    """Top-1 counts images; a loss is the mean over batches."""
    config = kit.recipe(**{"train.lr": 0.0, "train.weight_decay": 0.0, "train.epochs": 1})
    room = kit.classroom(config)
    member, right, losses = room.student(0).train(), 0, []
    stream = groups.open_session({"x": config}, room, Run(tmp_path), {}).stream
    for batch in stream.epoch(0):
        out = member(batch.images)
        right += int((out.argmax(-1) == batch.target).sum())
        losses.append(F.cross_entropy(out, batch.target).item())
    row = kit.trained(config, tmp_path / "run").metrics()[0]
    assert row["train/top1"] == pytest.approx(100 * right / 30)
    assert row["train/loss"] == row["loss/hard"] == pytest.approx(sum(losses) / 4)


def test_bf16_students_have_float32_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for method in ("nokd", "kd", "aver", "classroom"):
        cls = methods.find(method)
        loss = cls.loss

        def watched(self, lesson, phase, loss=loss):
            terms = loss(self, lesson, phase)
            seen.extend((lesson.student.out.dtype, term.dtype) for term in terms.values())
            return terms

        monkeypatch.setattr(cls, "loss", watched)
        config = kit.recipe(method, **{"train.precision": "bf16", "train.epochs": 1})
        run = kit.trained(config, tmp_path / method)
        assert all(v.dtype in (torch.float32, torch.int64) for v in kit.student(run).values())
        assert math.isfinite(run.metrics()[0]["train/loss"])
    assert set(seen) == {(torch.bfloat16, torch.float32)}


def test_no_step_counts_on_the_global_generator(tmp_path: Path) -> None:
    """What other code drew before or in between changes nothing."""
    config = kit.recipe("classroom", **{"train.epochs": 1})
    quiet = kit.trained(config, tmp_path / "quiet")
    torch.manual_seed(99)
    noisy = kit.session(config, tmp_path / "noisy")
    kit.drive(groups.go(noisy), lambda event: torch.rand(3))
    assert kit.same(kit.student(quiet), kit.student(noisy.run))


# --- settings a method cannot mean ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "over", "says", "cure"),
    [
        ("classroom", {"train.mixup": 0.2}, "hard labels", "train.mixup=0"),
        ("classroom", {"train.accumulate": 2}, "couples the samples", "ranking=sample"),
        ("kd", {"classroom.teacher": None, "classroom.peers": []}, "needs 1 mentor", "--teacher"),
        ("nokd", {"train.batch_size": 64}, "training set of digits, 30 images", "train.batch_size=4"),
        ("nokd", {"train.optimizer": "admw"}, "admw", "adamw"),
    ],
)
def test_senseless_settings_are_refused_before_training(
    tmp_path: Path, method: str, over: dict[str, Any], says: str, cure: str
) -> None:
    config = kit.recipe(method)
    plain = config.model_dump(exclude_none=True)
    for key, value in over.items():
        table, _, name = key.partition(".")
        plain[table][name] = value
    with pytest.raises(RecipeError, match=says) as caught:
        kit.session(Recipe.model_validate(plain), tmp_path / "run")
    assert cure in caught.value.hint
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_ranking_by_sample_may_be_split(tmp_path: Path) -> None:
    config = kit.recipe("classroom", **{"method.ranking": "sample", "train.accumulate": 2, "train.epochs": 1})
    assert math.isfinite(kit.trained(config, tmp_path / "run").metrics()[0]["loss/mentors"])


# --- losses that are no numbers ---------------------------------------------------------------------------------------


def poison(event: Any) -> None:
    with torch.no_grad():
        next(event.learners[0].student.parameters()).fill_(math.nan)


def test_a_huge_rate_stops_the_run_and_says_where(tmp_path: Path) -> None:
    opened = kit.session(kit.recipe(**{"train.lr": 1e20}), tmp_path / "run")
    with pytest.raises(DivergedError, match=r"nokd: .*'hard'.* at step [123] \(epoch 1\)") as caught:
        kit.drive(groups.go(opened))
    assert caught.value.exit_code == 4
    assert "train.lr" in caught.value.hint
    assert not (tmp_path / "run" / "last.ckpt").exists()
    assert not opened.run.finished


def test_the_last_good_checkpoint_outlives_a_loss_that_is_no_number(tmp_path: Path) -> None:
    config = kit.recipe("classroom", **{"train.epochs": 3})
    straight = kit.trained(config, tmp_path / "straight")
    opened = kit.session(config, tmp_path / "run")
    with pytest.raises(DivergedError, match=r"classroom: .*'(hard|mentors)'.* at step 6 \(epoch 2\)"):
        kit.drive(groups.go(opened), kit.at(2, 1, poison))
    state = opened.run.load_checkpoint()
    assert (state["epoch"], state["batch"]) == (1, 0)
    assert all(bool(torch.isfinite(v).all()) for v in state["learners"]["classroom"]["learners"]["student"].values())
    again = kit.session(config, tmp_path / "run", resume=True)
    kit.drive(groups.go(again, resume=True))
    assert kit.same(kit.student(again.run), kit.student(straight))


def test_an_update_that_ends_in_no_number_is_not_checkpointed(tmp_path: Path) -> None:
    """The loss of the epoch's last batch was fine, its update not, and no score would have told."""
    config = kit.recipe(**{"train.epochs": 3, "train.eval_every": 3})
    opened = kit.session(config, tmp_path / "run")

    def break_next_update(event: Step) -> None:
        learner = event.learners[0]
        learner.optimizer.step = lambda *_: poison(event)  # pyright: ignore

    with pytest.raises(DivergedError, match="weights stopped being finite"):
        kit.drive(groups.go(opened), kit.at(2, 3, break_next_update))
    assert opened.run.load_checkpoint()["epoch"] == 1


# --- which epoch ships ------------------------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, opened: Session, test: list[float], held: list[float]) -> None:
    """Replace measuring by figures, one an epoch."""
    figures = {id(opened.data.test): iter(test), id(opened.data.holdout): iter(held)}

    def score(model: nn.Module, split: Any, task: Any, device: torch.device) -> Score:
        return Score({"top1": next(figures[id(split)]), "top5": 99.0, "loss": 1.0}, task.metrics[0], len(split))

    monkeypatch.setattr(loop, "score", score)


def test_the_held_out_slice_chooses_and_the_test_set_only_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kit.recipe(**{"data.holdout": 0.1, "train.epochs": 4})
    opened = kit.session(config, tmp_path / "run")
    assert opened.data.holdout is not None
    scripted(monkeypatch, opened, test=[80.0, 50.0, 60.0, 70.0], held=[10.0, 30.0, 30.0, 20.0])
    states: dict[int, dict[str, Tensor]] = {}

    def remember(event: Any) -> None:
        if isinstance(event, EpochEnd):
            states[event.epoch] = kit.state(opened.learners[0])

    kit.drive(groups.go(opened), remember)
    assert kit.same(kit.student(opened.run), states[2])  # the first of the best two
    outcome = distill.result("nokd", opened.run)
    assert (outcome.epoch, outcome.value) == (2, 50.0)
    assert (outcome.last, outcome.best, outcome.best_epoch) == (70.0, 80.0, 1)
    card = zoo.read_card(tmp_path / "run" / "student.toml")
    assert (card.epoch, card.value) == (2, 50.0)
    assert zoo.verify(card)[0] == "ok"
    assert [row["holdout/top1"] for row in opened.run.metrics()] == [10.0, 30.0, 30.0, 20.0]


def test_without_a_held_out_slice_the_last_epoch_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = kit.session(kit.recipe(), tmp_path / "run")
    scripted(monkeypatch, opened, test=[80.0, 50.0], held=[])
    kit.drive(groups.go(opened))
    assert kit.same(kit.student(opened.run), kit.state(opened.learners[0]))
    outcome = distill.result("nokd", opened.run)
    assert (outcome.epoch, outcome.value, outcome.last) == (2, 50.0, 50.0)
    assert (outcome.best, outcome.best_epoch) == (80.0, 1)
    assert "weights" not in opened.run.load_checkpoint()["learners"]["nokd"]["best"]


def test_scores_may_be_rarer_than_epochs(tmp_path: Path) -> None:
    run = kit.trained(kit.recipe(**{"train.epochs": 5, "train.eval_every": 2}), tmp_path / "run")
    assert [row["epoch"] for row in run.metrics()] == [1, 2, 3, 4, 5]
    assert [row["epoch"] for row in run.metrics() if "test/top1" in row] == [2, 4, 5]


def test_the_reported_score_is_the_shipped_files(tmp_path: Path) -> None:
    from kdcli.training.evaluate import score

    config = kit.recipe("aver")
    run = kit.trained(config, tmp_path / "run")
    room = kit.classroom(config.with_(**{"classroom.student": f"cifar_resnet10_xxs@{run.path}"}))
    found = score(room.student(5), room.data.test, Classify(10), kit.CPU)
    assert found.value == distill.result("aver", run).value == run.metrics()[-1]["test/top1"]
    assert found.images == 360


def test_kept_epochs_are_mentors_of_lesser_skill(tmp_path: Path) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    opened = kit.session(kit.recipe(**{"train.epochs": 3}), tmp_path / "run", keep={2})

    def remember(event: Any) -> None:
        if isinstance(event, EpochEnd):
            states[event.epoch] = kit.state(opened.learners[0])

    kit.drive(groups.go(opened), remember)
    card = zoo.read_card(tmp_path / "run" / "epoch-002.toml")
    assert (card.epoch, card.architecture) == (2, "zoo:cifar_resnet10_xxs")
    assert card.value == round(opened.run.metrics()[1]["test/top1"], 4)
    assert opened.run.provenance["keep"] == [2]
    spec = f"cifar_resnet10_xxs@{opened.run.path}"
    room = kit.classroom(kit.recipe("kd", **{"classroom.teacher": f"{spec}#2", "classroom.peers": [spec]}))
    assert kit.same(dict(room.mentors[0].net.state_dict()), states[2])
    assert kit.same(dict(room.mentors[1].net.state_dict()), states[3])
    assert [mentor.name for mentor in room.mentors] == ["cifar_resnet10_xxs", "cifar_resnet10_xxs#2"]


# --- what is written down ---------------------------------------------------------------------------------------------


def test_provenance_tells_where_a_result_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/kdcli", "distill", "--recipe", "mine.toml"])
    config = kit.recipe("classroom", **{"train.seed": 3, "data.seed": 4, "train.epochs": 1})
    opened = kit.session(config, tmp_path / "run")
    facts = opened.run.provenance
    assert facts["command"] == "kdcli distill --recipe mine.toml"
    assert facts["kind"] == "distill"
    assert facts["seeds"] == {"data": 4, "train": 3}
    assert facts["recipe"] == config.hash() == opened.run.recipe.hash()
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"kdcli", "python", "torchvision", "timm", "numpy", "onnxruntime"} <= facts["versions"].keys()
    assert facts["device"].endswith("threads")
    data = opened.data
    counts = {"image_size": 8, "train": 30, "test": 360}
    assert facts["data"] == {"name": "digits", "hash": data.hash, "pixels": data.hash, **counts}
    cards = {card.architecture: card for card in zoo.cards(shipped=False)}
    for arch in kit.MENTORS:
        path = zoo.weights_path(cards[f"zoo:{arch}"])
        assert path is not None
        assert facts["mentors"][arch] == {
            "architecture": f"zoo:{arch}",
            "sha256": checkpoint.digest(checkpoint.load_state(path)),
        }


def test_every_mentor_is_logged_by_name_even_twice_the_same(tmp_path: Path) -> None:
    same = kit.MENTORS[0]
    config = kit.recipe("classroom", **{"classroom.teacher": same, "classroom.peers": [same, kit.MENTORS[1]]})
    rows = kit.trained(config, tmp_path / "run").metrics()
    who = [same, f"{same}#2", kit.MENTORS[1]]
    for row in rows:
        for mentor in who:
            assert 0 <= row[f"active/{mentor}"] <= 1
            assert 1 <= row[f"temperature/{mentor}"] <= 13
            assert 0 < row[f"mark/{mentor}"] <= 1
        assert sum(row[f"rank/{name}"] for name in ["student", *who]) == pytest.approx(len(who), rel=1e-5)  # Eq. 5
        assert 0 < row["mark/student"] <= 1
        assert "active/student" not in row
        assert row[f"rank/{same}"] == pytest.approx(row[f"rank/{same}#2"])  # the same weights, the same answers
        assert row[f"rank/{same}"] != row[f"rank/{kit.MENTORS[1]}"]


def test_the_card_says_how_the_student_reads(tmp_path: Path) -> None:
    run = kit.trained(kit.recipe(), tmp_path / "run")
    card, room = zoo.read_card(run.path / "student.toml"), kit.classroom(kit.recipe())
    assert card.mean == room.data.mean
    assert card.std == room.data.std
    assert (card.image_size, card.num_classes, card.data_hash) == (8, 10, room.data.hash)
    assert card.classes == room.data.classes
    assert card.params == sum(p.numel() for p in room.student(0).net.parameters())
    assert registry.resolve(card.architecture).arch == "cifar_resnet10_xxs"


# --- phases and sweeps ------------------------------------------------------------------------------------------------

TOY = '''
import torch
import torch.nn.functional as F
from torch import nn
from kdcli.methods.base import Method, Phase


class TwoPhases(Method):
    """A guide learns on the student's answers, then the student learns from the guide."""

    needs = frozenset({"pooled"})
    teachers = 0

    def __init__(self):
        super().__init__()

    def setup(self, room, lesson):
        self.guide = nn.Sequential(nn.Linear(lesson.student.out.shape[-1], 10), nn.BatchNorm1d(10))

    def learners(self):
        return {"student": self.context.student, "guide": self.guide}

    def phases(self, train):
        quick = train.model_copy(update={"optimizer": "adamw", "lr": 0.01})
        return [Phase("guide", 1, ("guide",), train), Phase("student", 2, ("student",), quick)]

    def loss(self, lesson, phase):
        out = self.guide(lesson.student.out)
        if phase.name == "guide":
            return {"guide": F.cross_entropy(out, lesson.target)}
        hard = lesson.task.hard(lesson.student.out, lesson.target).mean()
        return {"hard": hard, "guide": F.mse_loss(lesson.student.out, out.detach())}


class Turns(TwoPhases):
    """Guide and student in turns: two trainings in four pieces."""

    def phases(self, train):
        quick = train.model_copy(update={"optimizer": "adamw", "lr": 0.01, "decay_epochs": [1]})
        quick = quick.model_copy(update={"schedule": "multistep"})
        guide, student = Phase("guide", 1, ("guide",), train), Phase("student", 1, ("student",), quick)
        return [guide, student, guide, student]


class Sweeper(Method):
    """The control, after a look at the whole training set before every epoch."""

    teachers = 0

    def __init__(self):
        super().__init__()
        self.seen = []

    def begin_epoch(self, epoch, train_pass):
        lessons = list(train_pass())
        self.seen.append((sum(len(l.index) for l in lessons), any(l.student.out.requires_grad for l in lessons)))
        assert self.context.student.training
        assert torch.is_grad_enabled()

    def loss(self, lesson, phase):
        return {"hard": lesson.task.hard(lesson.student.out, lesson.target).mean()}
'''


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kdcli_toys.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "kdcli_toys", raising=False)
    monkeypatch.setitem(methods.METHODS, "toy", "kdcli_toys:TwoPhases")
    monkeypatch.setitem(methods.METHODS, "turns", "kdcli_toys:Turns")
    monkeypatch.setitem(methods.METHODS, "sweeper", "kdcli_toys:Sweeper")


@pytest.mark.usefixtures("toys")
def test_a_phase_teaches_only_its_own_learners(tmp_path: Path) -> None:
    opened = kit.session(kit.recipe("toy"), tmp_path / "run")
    learner = opened.learners[0]
    guide: nn.Module = learner.method.learners()["guide"]
    assert learner.epochs == opened.epochs == 3
    states = {0: (kit.state(learner), {k: v.clone() for k, v in guide.state_dict().items()})}
    optimizers = {}

    def remember(event: Any) -> None:
        if isinstance(event, EpochEnd):
            states[event.epoch] = (kit.state(learner), {k: v.clone() for k, v in guide.state_dict().items()})
            optimizers[event.epoch] = (type(learner.optimizer), learner.optimizer.param_groups[0]["lr"])

    kit.drive(groups.go(opened), remember)
    assert kit.same(states[1][0], states[0][0])  # the student waited, its batch statistics too
    assert not torch.equal(states[1][1]["0.weight"], states[0][1]["0.weight"])
    assert kit.same(states[3][1], states[1][1])  # then the guide did
    assert not torch.equal(states[2][0]["fc.weight"], states[1][0]["fc.weight"])
    assert optimizers == {1: (torch.optim.SGD, 0.05), 2: (torch.optim.AdamW, 0.01), 3: (torch.optim.AdamW, 0.01)}
    assert "loss/hard" not in opened.run.metrics()[0]
    assert "loss/hard" in opened.run.metrics()[1]


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("where", [(1, 2), (1, 4), (2, 3), (3, 0)])
def test_a_run_stopped_in_any_phase_ends_the_same(tmp_path: Path, where: tuple[int, int]) -> None:
    whole = kit.trained(kit.recipe("toy"), tmp_path / "whole")
    opened = kit.session(kit.recipe("toy"), tmp_path / "run")
    saved = kit.at(*where, lambda _: opened.checkpoint(where[0] - 1, where[1]) if where[1] else None)
    events = groups.go(opened)
    for event in events:
        saved(event)
        if event.epoch == where[0] and (event.batch if isinstance(event, Step) else 0) == where[1]:
            events.close()
            break
    again = kit.session(kit.recipe("toy"), tmp_path / "run", resume=True)
    kit.drive(groups.go(again, resume=True))
    assert kit.same(kit.student(again.run), kit.student(whole))
    assert again.run.metrics() == whole.metrics()


@pytest.mark.usefixtures("toys")
def test_phases_of_one_name_go_on_with_their_optimiser_and_schedule(tmp_path: Path) -> None:
    opened = kit.session(kit.recipe("turns"), tmp_path / "run")
    learner = opened.learners[0]
    told: dict[int, tuple[Any, float, int]] = {}

    def remember(event: Any) -> None:
        if isinstance(event, EpochEnd):
            group = learner.optimizer.param_groups[0]
            state = learner.optimizer.state[group["params"][0]]
            told[event.epoch] = (learner.optimizer, group["lr"], int(state.get("step", -1)))

    kit.drive(groups.go(opened), remember)
    assert told[1][0] is told[3][0]
    assert told[2][0] is told[4][0] is not told[1][0]
    assert [rate for _, rate, _ in told.values()] == pytest.approx([0.05, 0.01, 0.05, 0.001])
    assert [steps for _, _, steps in told.values()] == [-1, kit.STEPS, -1, 2 * kit.STEPS]  # Adam counts on


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("at", [(1, 2), (2, 3), (3, 0), (4, 1)])
def test_turns_resume_with_the_same_bits(tmp_path: Path, at: tuple[int, int]) -> None:
    whole, config = kit.trained(kit.recipe("turns"), tmp_path / "whole"), kit.recipe("turns")
    opened = kit.session(config, tmp_path / "run")

    def stop(_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedRun):
        kit.drive(groups.go(opened), kit.at(*at, stop))
    kit.drive(groups.go(kit.session(config, opened.run.path, resume=True), resume=True))
    assert kit.same(kit.student(opened.run), kit.student(whole))


@pytest.mark.usefixtures("toys")
def test_a_sweep_reads_every_image_and_leaves_no_trace(tmp_path: Path) -> None:
    opened = kit.session(kit.recipe("sweeper"), tmp_path / "run")
    kit.drive(groups.go(opened))
    assert opened.learners[0].method.seen == [(30, False), (30, False)]  # pyright: ignore
    control = kit.trained(kit.recipe("nokd"), tmp_path / "control")
    assert kit.same(kit.student(opened.run), kit.student(control))


# --- small pieces -----------------------------------------------------------------------------------------------------


def test_a_tally_goes_on_from_its_state() -> None:
    one = EpochMeter()
    one.add({"a": torch.tensor(1.0), "b": torch.tensor([1.0, 2.0])})
    one.batches, one.images = 1, 5
    two = EpochMeter()
    two.load(one.state(), kit.CPU)
    two.add({"a": torch.tensor(2.0), "b": torch.tensor([3.0, 4.0])})
    two.batches += 1
    assert two.means("") == {"a": 1.5, "b": [2.0, 3.0]}
    assert one.means("") == {"a": 1.0, "b": [1.0, 2.0]}


def test_seeds_of_neighbouring_steps_do_not_meet() -> None:
    seeds = {learner._mix(seed, step) for seed in range(30) for step in range(300)}
    assert len(seeds) == 30 * 300
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert learner._mix(1, 2) != learner._mix(2, 1)


def test_a_step_reports_where_the_loop_is(tmp_path: Path) -> None:
    events = kit.drive(groups.go(kit.session(kit.recipe(), tmp_path / "run")))
    steps = [event for event in events if isinstance(event, Step)]
    assert [(s.epoch, s.batch) for s in steps] == [(e, b) for e in (1, 2) for b in (1, 2, 3, 4)]
    assert {(s.epochs, s.batches) for s in steps} == {(2, 4)}
    assert [s.images for s in steps] == [8, 16, 24, 30, 38, 46, 54, 60]
    ends = [event for event in events if isinstance(event, EpochEnd)]
    assert [end.rows["nokd"]["epoch"] for end in ends] == [1, 2]


def test_parts_of_a_batch_keep_their_names() -> None:
    batch = Batch(torch.rand(6, 3, 8, 8), torch.arange(6), torch.arange(10, 16), torch.arange(20, 26))
    part = batch.micro(2, 4)
    assert part.index.tolist() == [12, 13]
    assert part.view.tolist() == [22, 23]
    assert torch.equal(part.images, batch.images[2:4])
    assert Output(part.images).pooled is None


def test_the_best_weights_travel_in_the_checkpoint(tmp_path: Path) -> None:
    """A file beside it could be of another epoch than the checkpoint that a run goes back to."""
    run = kit.trained(kit.recipe(**{"data.holdout": 0.1}), tmp_path / "run")
    best = run.load_checkpoint()["learners"]["nokd"]["best"]
    assert best["epoch"] == zoo.read_card(run.path / "student.toml").epoch
    assert kit.same(best["weights"], kit.student(run))
    assert not [path for path in run.path.iterdir() if path.name.startswith((".", "best"))]


# --- quicker ways to the same end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [2, 3])
def test_looking_ahead_changes_no_bit(tmp_path: Path, ahead: int) -> None:
    config = kit.recipe("classroom")
    one = kit.trained(config, tmp_path / "one")
    many = kit.trained(config.with_(**{"classroom.ahead": ahead}), tmp_path / "many")
    assert kit.same(kit.student(one), kit.student(many))
    assert one.metrics() == many.metrics()


@pytest.mark.parametrize(("epoch", "batch"), [(1, 1), (1, 2), (2, 3)])
def test_a_run_stopped_between_batches_answered_together_ends_the_same(tmp_path: Path, epoch: int, batch: int) -> None:
    """It is resumed with the same batches together, whatever was answered of them before."""
    config = kit.recipe("classroom", **{"classroom.ahead": 3})
    whole = kit.trained(config, tmp_path / "whole")
    stopped = kit.session(config, tmp_path / "run")
    sizes = []

    def stop(_: Step) -> None:
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(InterruptedRun):
        kit.drive(groups.go(stopped), kit.at(epoch, batch, stop))
    again = kit.session(config, tmp_path / "run", resume=True)
    answer = again.mentors._live
    again.mentors._live = lambda pixels: (sizes.append(len(pixels)), answer(pixels))[1]
    kit.drive(groups.go(again, resume=True))
    assert set(sizes) <= {24, 6}  # three batches of eight, and the short one
    assert kit.same(kit.student(again.run), kit.student(whole))
    assert again.run.metrics() == whole.metrics()


def test_how_far_to_look_is_decided_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "LONG", 1)
    opened = kit.session(kit.recipe("kd"), tmp_path / "run")
    monkeypatch.setattr(opened.mentors, "measure_ahead", lambda batches: len(batches) // 2)
    kit.drive(groups.go(opened))
    assert opened.mentors.ahead == kit.STEPS // 2
    assert opened.run.load_checkpoint()["ahead"] == 2
    again = kit.session(kit.recipe("kd"), tmp_path / "run", resume=True)
    monkeypatch.setattr(again.mentors, "measure_ahead", lambda _: 1 / 0)
    kit.drive(groups.go(again, resume=True))
    assert again.mentors.ahead == 2


def test_a_short_training_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = kit.session(kit.recipe("kd"), tmp_path / "run")
    monkeypatch.setattr(opened.mentors, "measure_ahead", lambda _: 1 / 0)
    kit.drive(groups.go(opened))
    assert opened.mentors.ahead == 1


def test_mentors_worth_it_are_compiled_and_who_cannot_be_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_here(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", none_here)
    whole = kit.trained(kit.recipe("kd"), tmp_path / "whole")
    opened = kit.session(kit.recipe("kd", **{"classroom.compile": True}), tmp_path / "run")
    assert opened.compiled == ["cifar_resnet14", "cifar_resnet8"]
    heard = [event.text for event in kit.drive(groups.go(opened)) if isinstance(event, Notice)]
    assert heard == [f"{name} is not compiled: no compiler here" for name in ("cifar_resnet14", "cifar_resnet8")]
    assert kit.same(kit.student(opened.run), kit.student(whole))
    assert kit.session(kit.recipe("kd"), tmp_path / "other").compiled == []  # thirty small pictures


@pytest.mark.slow
def test_compiled_and_eager_students_agree_over_twenty_steps(tmp_path: Path) -> None:
    plain = kit.recipe("classroom", **{"train.epochs": 5, "train.lr": 0.002})
    one = kit.trained(plain, tmp_path / "eager")
    two = kit.trained(plain.with_(**{"train.compile": True, "classroom.compile": True}), tmp_path / "compiled")
    for a, b in zip(one.metrics(), two.metrics(), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-3)
    for key, value in kit.student(one).items():
        torch.testing.assert_close(kit.student(two)[key], value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({}, "cpu has no CUDA graphs"),
        ({"train.accumulate": 2}, r"train\.accumulate = 2"),
        ({"train.optimizer": "lamb"}, "'lamb' is not sgd, adam or adamw"),
    ],
)
def test_a_cuda_graph_is_refused_where_it_cannot_be(tmp_path: Path, over: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=rf"train\.cuda_graph: .*{says}") as caught:
        kit.session(kit.recipe("kd", **{"train.cuda_graph": True, **over}), tmp_path / "run")
    assert "train.cuda_graph=false" in caught.value.hint
