"""Learners side by side: each ends as it would alone, and the table says what the differences mean."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM, raise_signal
from typing import Any

import engine_kit as kit
import pytest
import torch

from kdcli.errors import InterruptedRun, RecipeError
from kdcli.recipe import Expect, Recipe
from kdcli.tasks import Classify
from kdcli.training import run as runs
from kdcli.training.run import Run
from kdcli.training.session import EpochEnd, Session
from kdcli.workflows import compare, groups
from kdcli.workflows.compare import Comparison, Line

METHODS, SEEDS = ["kd", "aver", "classroom"], [0, 3]


@pytest.fixture(autouse=True)
def _zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_HOME", str(kit.home()))


def compared(
    config: Recipe, path: Path, methods: list[str], seeds: list[int], first: Callable[[Session], object] = print
) -> Session:
    """The session of a finished compare, which `first` may change before it is trained."""
    sessions = []

    def follow(_: Any, events: Any, label: str) -> None:
        sessions.append(kit.session_of(events))
        first(sessions[0])
        kit.drive(events)

    compare.compare(config, methods, seeds, kit.CPU, follow, out=str(path))
    assert len(sessions) == 1
    return sessions[0]


def alone(config: Recipe, method: str, seed: int, path: Path) -> Run:
    return kit.trained(config.with_method(method).with_(**{"train.seed": seed}), path)


def test_every_learner_ends_as_in_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, and with dropout, so that what the others draw may not change a learner."""
    from kdcli.models import registry

    create = registry.create

    def with_dropout(*args: Any, **options: Any) -> registry.Net:
        net = create(*args, **options)
        net.module.head_drop.p = 0.5  # pyright: ignore
        return net

    monkeypatch.setattr(registry, "create", with_dropout)
    config = kit.recipe("classroom", **{"method.tau": 4.0, "train.epochs": 1})
    session = compared(config, tmp_path / "all", METHODS, SEEDS)
    assert [learner.name for learner in session.learners] == [
        f"{method}-{seed}" for method in ["nokd", *METHODS] for seed in SEEDS
    ]
    states = []
    for learner in session.learners:
        method, _, seed = learner.name.partition("-")
        own = alone(config, method, int(seed), tmp_path / learner.name)
        together = Run(tmp_path / "all" / learner.name)
        assert kit.same(kit.student(own), kit.student(together)), learner.name
        assert own.metrics() == together.metrics(), learner.name
        assert own.provenance["recipe"] == together.provenance["recipe"]
        states.append(kit.student(own))
    assert not any(kit.same(a, b) for n, a in enumerate(states) for b in states[:n])


def test_learners_with_other_needs_change_nothing(tmp_path: Path) -> None:
    """Only some learners of a session need maps, pooled vectors, strong views or further students."""
    config = kit.recipe("kd", baselines={"ab": {"init_epochs": 1}})
    session = compared(config, tmp_path / "all", ["kd", "vid", "pkt", "mlkd", "dml", "ab"], [2])
    assert session.mentors.unfused is not None
    answers = session.mentors.answer(next(session.stream.epoch(0)))
    for learner in session.learners:  # taps that AB alone needs are not given to the others
        taps = [tap for one in learner._select(answers.of(learner.needs)) for tap in one.maps or {}]
        assert any(tap.endswith(".pre") for tap in taps) == (learner.name == "ab-2")
    for learner in session.learners:
        method, _, seed = learner.name.partition("-")
        own = alone(config, method, int(seed), tmp_path / learner.name)
        assert kit.same(kit.student(own), kit.student(Run(tmp_path / "all" / learner.name))), learner.name


def test_options_of_other_methods_are_the_baselines_alone(tmp_path: Path) -> None:
    config = kit.recipe("classroom", **{"method.tau": 4.0, "baselines": {"aver": {"tau": 1.0}}})
    made = compare.learners(config, ["aver", "kd", "classroom", "aver"], [5])
    assert list(made) == ["nokd-5", "aver-5", "kd-5", "classroom-5"]
    assert made["aver-5"].method.options == {"tau": 1.0}
    assert made["kd-5"].method.options == {}
    assert made["classroom-5"].method.options == {"tau": 4.0}
    assert {one.train.seed for one in made.values()} == {5}
    assert {one.data.seed for one in made.values()} == {0}


def test_one_method_is_compared_in_several_forms(tmp_path: Path) -> None:
    forms = {"kd": {"tau": 1.0}, "kd-hot": {"name": "kd", "tau": 9.0}}
    expect = Expect(top1={"nokd": 60.0, "kd": 61.0, "kd-hot": 62.0})
    config = kit.recipe("classroom", baselines=forms, **{"train.epochs": 1}).model_copy(update={"expect": expect})
    session = compared(config, tmp_path / "all", ["kd", "kd-hot"], [3])
    told = {why for name, why, _ in session.learners[0].classroom.notes if name == "method kd"}
    assert len(told) == 2  # both forms' options are shown
    found = compare.summarise(session.run)
    assert [(one.method, one.published) for one in found.lines] == [("nokd", 60.0), ("kd", 61.0), ("kd-hot", 62.0)]
    hot = alone(config, "kd-hot", 3, tmp_path / "hot")
    assert kit.same(kit.student(hot), kit.student(Run(tmp_path / "all" / "kd-hot-3")))
    assert not kit.same(kit.student(hot), kit.student(Run(tmp_path / "all" / "kd-3")))


def test_a_batch_is_drawn_once_and_each_mentor_answers_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, int] = {}
    drawn = []

    def watch(session: Session) -> None:
        for one in session.mentors.frozen:
            calls[one.member.name] = 0
            one.net.register_forward_hook(lambda *_, name=one.member.name: calls.update({name: calls[name] + 1}))
        epoch = session.stream.epoch

        def watched(*args: int) -> Any:
            for batch in epoch(*args):
                drawn.append(batch.index)
                yield batch

        monkeypatch.setattr(session.stream, "epoch", watched)

    session = compared(kit.recipe("classroom"), tmp_path / "all", METHODS, SEEDS, watch)
    assert len(session.learners) == 8
    assert calls == dict.fromkeys([member.name for member in session.mentors.members], 2 * kit.STEPS)
    assert len(drawn) == 2 * kit.STEPS


def test_the_control_alone_needs_no_mentors(tmp_path: Path) -> None:
    session = compared(kit.recipe("nokd"), tmp_path / "all", [], [0])
    assert [learner.name for learner in session.learners] == ["nokd-0"]
    assert session.mentors.members == []
    assert [line.verdict for line in compare.summarise(session.run).lines] == ["control"]


def test_the_table_is_made_of_the_learners_own_scores(tmp_path: Path) -> None:
    expect = Expect(source="Table 9", epoch="best", top1={"nokd": 60.0, "classroom": 62.5, "dkd": 63.0})
    config = kit.recipe("classroom").model_copy(update={"expect": expect})
    session = compared(config, tmp_path / "all", ["classroom"], SEEDS)
    told = json.loads((tmp_path / "all" / "compare.json").read_text())
    found = compare.summarise(session.run)
    assert json.loads(found.json()) == told
    assert (told["run"], told["stands_for"]) == (str(tmp_path / "all"), "classroom-0")
    assert (told["source"], told["epoch"]) == ("Table 9", "best")
    assert [line["method"] for line in told["lines"]] == ["nokd", "classroom"]
    scores = {
        method: [Run(tmp_path / "all" / f"{method}-{seed}").metrics()[-1]["test/top1"] for seed in SEEDS]
        for method in ("nokd", "classroom")
    }
    line = found.line("classroom")
    assert line.values == scores["classroom"]
    assert told["lines"][1]["top1"] == scores["classroom"]
    assert line.seeds == SEEDS
    gains = [a - b for a, b in zip(scores["classroom"], scores["nokd"], strict=True)]
    assert line.gain == pytest.approx(sum(gains) / 2)
    assert (line.published, line.published_gain) == (62.5, 2.5)
    assert (found.line("nokd").published, found.line("nokd").published_gain) == (60.0, None)
    shown = compare.table(found)
    assert shown["columns"][-2:] == ["published", "its gain"]
    assert shown["rows"][1][-2:] == ["62.50", "+2.50"]
    assert shown["title"] == "2 seeds"
    assert Path(told["runs"]["classroom-3"]) == tmp_path / "all" / "classroom-3"


def test_differences_are_paired_and_the_interval_is_students() -> None:
    """Three seeds: t(0.975, 2) = 4.3027."""
    top1, control = [71.0, 72.5, 70.5], [70.0, 71.0, 70.0]
    line = compare._line("x", [0, 1, 2], top1, [72.0, 73.0, 71.0], control)
    assert line.mean == pytest.approx(214 / 3)
    assert line.spread == pytest.approx(statistics.stdev(top1))
    assert line.gain == pytest.approx(1.0)  # of 1.0, 1.5, 0.5
    assert line.gain_spread == pytest.approx(0.5)
    half = 4.302652729911275 * 0.5 / 3**0.5
    assert line.interval == pytest.approx((1 - half, 1 + half))
    assert line.verdict == "within noise"  # half is 1.24


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 1.1, 0.9], "better"),
        ([-1.0, -1.1, -0.9], "worse"),
        ([1.0, -1.0, 0.2], "within noise"),
        ([0.0, 0.0], "within noise"),
        ([0.5, 0.6], "within noise"),  # t(0.975, 1) = 12.7: two seeds prove little
        ([0.5, 0.51], "better"),
        ([2.0], "one seed: no verdict"),
    ],
)
def test_the_verdict_respects_the_noise(differences: list[float], verdict: str) -> None:
    control = [50.0 + 10 * n for n in range(len(differences))]  # seeds differ far more than methods do
    top1 = [a + b for a, b in zip(control, differences, strict=True)]
    line = compare._line("x", list(range(len(top1))), top1, top1, control)
    assert line.verdict == verdict
    assert line.gain == pytest.approx(sum(differences) / len(differences))
    assert (line.interval is None) == (len(differences) == 1)


def test_the_control_is_not_compared_with_itself() -> None:
    line = compare._line("nokd", [0, 1], [50.0, 51.0], [52.0, 53.0], [50.0, 51.0])
    assert (line.verdict, line.gain, line.interval) == ("control", None, None)
    assert line.spread == pytest.approx(0.5**0.5)


def test_a_table_without_published_figures_has_no_columns_for_them() -> None:
    lines = [
        Line("nokd", [4], [50.0], [51.0], 50.0, None, None, None, None, "control"),
        Line("kd", [4], [51.0], [52.0], 51.0, None, 1.0, None, None, "one seed: no verdict"),
    ]
    shown = compare.table(Comparison(lines, Classify.metrics[0]))
    assert shown["columns"] == ["method", "top-1 %", "gain", "95 % interval", "verdict"]
    assert shown["rows"] == [["nokd", "50.00", "", "", "control"], ["kd", "51.00", "+1.00", "", "one seed: no verdict"]]
    assert shown["title"] == "1 seed"


def test_independent_seeds_have_streams_of_their_own(tmp_path: Path) -> None:
    config = kit.recipe("classroom", **{"train.epochs": 1})
    labels = []

    def follow(classroom: Any, events: Any, label: str) -> None:
        assert classroom.notes
        labels.append(label)
        kit.drive(events)

    run = Run(tmp_path / "all")
    found = compare.compare(config, ["classroom"], [0, 2], kit.CPU, follow, independent=True, out=str(run.path))
    assert labels == ["seed 0: 2 students", "seed 2: 2 students"]
    assert found == compare.summarise(run)
    assert run.finished
    assert run.provenance["independent"] is True
    assert not list(run.path.glob(".*"))
    for method in ("nokd", "classroom"):
        for seed in (0, 2):
            own = alone(config.with_(**{"data.seed": seed}), method, seed, tmp_path / f"{method}-{seed}")
            assert kit.same(kit.student(own), kit.student(Run(run.path / f"{method}-{seed}")))
            assert Run(run.path / f"{method}-{seed}").recipe.data.seed == seed


def test_a_stopped_independent_compare_goes_on_where_it_was(tmp_path: Path) -> None:
    config = kit.recipe("classroom", **{"train.epochs": 2})

    def breaks(_: Any, events: Any, label: str) -> None:
        if not label.startswith("seed 1"):
            return kit.drive(events)
        for event in events:
            if isinstance(event, EpochEnd):
                events.close()
                raise InterruptedRun("stopped")
        return None

    def independent(follow: Any, name: str) -> compare.Comparison:
        seeds, out = [0, 1, 2], str(tmp_path / name)
        return compare.compare(config, ["classroom"], seeds, kit.CPU, follow, independent=True, out=out)

    whole = independent(kit.follow, "whole")
    run = Run(tmp_path / "stopped")
    with pytest.raises(InterruptedRun) as caught:
        independent(breaks, "stopped")
    assert f"kdcli compare --resume {run.path}" in caught.value.hint
    assert not run.finished
    labels = []

    def goes_on(_: Any, events: Any, label: str) -> None:
        labels.append(label)
        kit.drive(events)

    found = compare.resume(run, kit.CPU, goes_on)
    assert labels == ["seed 1: 2 students", "seed 2: 2 students"]  # what has finished is not trained again
    assert [line.values for line in found.lines] == [line.values for line in whole.lines]
    assert run.finished
    assert not list(run.path.glob(".*"))
    for seed in range(3):
        one, other = (Run(tmp_path / name / f"classroom-{seed}") for name in ("whole", "stopped"))
        assert kit.same(kit.student(one), kit.student(other))


def test_a_compare_stands_for_its_recipes_method_and_first_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compared(kit.recipe("classroom", **{"train.epochs": 1}), Path("runs/both"), ["classroom", "aver"], [3, 1])
    assert runs.find(None).path == Path("runs/both/classroom-3")
    assert runs.find("both").path == Path("runs/both/classroom-3")
    assert runs.find("runs/both", learner=False).path == Path("runs/both")
    assert runs.find(None, learner=False).kind == "compare"
    assert Run(Path("runs/both/aver-1")).kind == "distill"
    assert [run.name for run in runs.every()] == ["both"]
    other = compared(kit.recipe("kd", **{"train.epochs": 1}), Path("runs/other"), ["aver"], [7])
    assert other.run.provenance["stands_for"] == "aver-7"  # kd was not among the methods


def test_a_resumed_compare_must_know_its_learners(tmp_path: Path) -> None:
    config = kit.recipe("aver", **{"train.epochs": 1})
    with pytest.raises(InterruptedRun):
        kit.compared(config, tmp_path / "all", ["aver"], [0], kit.at(1, 2, lambda _: raise_signal(SIGTERM)))
    run = Run(tmp_path / "all")
    run.amend(train_seeds=[0, 1])
    with pytest.raises(RecipeError, match="has no learner nokd-1") as caught:
        compare.resume(run, kit.CPU, kit.follow)
    assert "--seeds" in caught.value.hint


def test_students_start_alike_for_a_seed_whatever_their_method(tmp_path: Path) -> None:
    states = {}

    def remember(session: Session) -> None:
        states.update({learner.name: kit.state(learner) for learner in session.learners})

    config = kit.recipe("classroom", **{"train.epochs": 1})
    session = compared(config, tmp_path / "all", ["aver", "classroom"], [0, 1], remember)
    for method in ("aver", "classroom"):
        assert kit.same(states[f"{method}-0"], states["nokd-0"])
        assert kit.same(states[f"{method}-1"], states["nokd-1"])
    assert not torch.equal(states["nokd-0"]["fc.weight"], states["nokd-1"]["fc.weight"])
    assert groups.facts_of(session.learners[0].classroom)["data"]["train"] == 30
