"""A recipe's stages: planned, trained in order, resumed after a stop, and compared."""

import json
from pathlib import Path
from typing import Any

import engine_kit as kit
import pytest
import torch
from cli_kit import kdcli

from kdcli import methods, recipe as recipes
from kdcli.errors import InterruptedRun, RecipeError
from kdcli.methods import Lesson, Phase
from kdcli.models import cards
from kdcli.models.outputs import Output
from kdcli.recipe import Recipe, TrainConfig
from kdcli.tasks import Classify
from kdcli.training.run import Run
from kdcli.training.session import EpochEnd, Step
from kdcli.training.student import student_of
from kdcli.workflows import compare, distill, groups, stages

BIG, MID = "cifar_resnet14", "cifar_resnet8"
TWO = {
    "stage": [
        {"name": "big", "student": BIG, "teacher": BIG, "peers": [], "method": {"name": "kd"}, "train": {"epochs": 1}},
        {"name": "idle", "student": BIG, "teacher": BIG, "peers": []},
        {"name": "mid", "student": MID, "teacher": "@stage:big", "peers": [BIG]},
    ],
    "classroom.teacher": "@stage:mid",
    "classroom.peers": ["@stage:big", MID],
}
TAKD = {"assistants": [BIG, MID], "tau": 2.0}


@pytest.fixture(autouse=True)
def _zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_HOME", str(kit.home()))


def assisted(method: str, **over: Any) -> Recipe:
    return kit.recipe(method, **{f"method.{key}": value for key, value in TAKD.items()}, **over)


def trained(config: Recipe, path: Path) -> Run:
    return distill.distill(config, kit.CPU, kit.follow, out=str(path)).run


def classroom(config: Recipe) -> tuple[str | None, str | None, list[str]]:
    return config.classroom.student, config.classroom.teacher, config.classroom.peers


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_a_stage_is_the_recipe_but_for_what_it_says(tmp_path: Path) -> None:
    config = kit.recipe("aver", **TWO, **{"method.tau": 2.0, "train.lr": 0.03})
    big, idle, mid = config.stages().values()
    assert classroom(big) == (BIG, BIG, [])
    assert (big.method.name, big.method.options, big.train.epochs, big.train.lr) == ("kd", {}, 1, 0.03)
    assert (mid.method.name, mid.method.options, mid.train.epochs) == ("aver", {"tau": 2.0}, 2)
    assert classroom(mid) == (MID, "@stage:big", [BIG])
    assert idle.data == config.data
    (tmp_path / "two.toml").write_text(config.toml())
    again = recipes.load(str(tmp_path / "two.toml"))
    assert again.hash() == config.hash()
    assert again.stages() == config.stages()


def test_a_recipe_without_stages_is_what_it_was() -> None:
    config = kit.recipe("kd")
    assert "stage" not in config.toml()
    assert stages.plan(config).parts == {stages.LAST: config}
    longer = kit.recipe("kd", stage=[{"name": "a", "student": BIG}])
    assert longer.hash() != config.hash()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classroom.teacher": "@stage:mod"}, "@stage:mod: no stage of that name comes before it"),
        ({"stage": TWO["stage"][1:]}, "stage mid: @stage:big: no stage of that name"),  # pyright: ignore
        ({"stage": TWO["stage"][:1] * 2, "classroom.teacher": BIG, "classroom.peers": []}, "two stages have one name"),  # pyright: ignore
        ({"stage": [{"name": "a", "student": BIG, "lr": 0.1}]}, r"stage.a.lr: no such key"),
        ({"stage": [{"name": "a", "student": BIG, "train": {"lrr": 1}}]}, r"stage a: train.lrr: no such key"),
        ({"stage": [{"name": "a/b", "student": BIG}]}, r"stage.0.name"),
        ({"stage": [{"name": "a"}]}, r"stage.0.student"),
    ],
)
def test_stages_that_make_no_sense_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        kit.recipe("aver", **{**TWO, **change})


def test_only_what_is_needed_is_planned() -> None:
    config = kit.recipe("aver", **TWO)
    assert list(stages.plan(config).stages) == ["big", "mid"]
    assert stages.plan(config.with_method("nokd")).stages == {}  # the control needs no mentors
    assert list(stages.plan(config.with_(**{"classroom.student": "@stage:idle"}).with_method("nokd")).stages) == [
        "idle"
    ]
    assert list(stages.plan(config.with_(**{"classroom.teacher": "@stage:big"})).stages) == ["big"]


def test_takd_is_a_chain_and_dgkd_learns_from_all() -> None:
    chain = stages.plan(assisted("takd"))
    one, two = chain.stages.values()
    assert classroom(one) == (BIG, BIG, [])
    assert classroom(two) == (MID, "@stage:assistant1", [])
    assert classroom(chain.last)[1:] == ("@stage:assistant2", [])
    assert one.method.options == {"tau": 2.0}
    dense = stages.plan(assisted("dgkd"))
    assert classroom(dense.stages["assistant2"]) == (MID, BIG, ["@stage:assistant1"])
    assert classroom(dense.last)[1:] == (BIG, ["@stage:assistant1", "@stage:assistant2"])
    assert stages.plan(kit.recipe("dgkd")).stages == {}  # the classroom's own mentors teach


def test_a_stage_has_no_stages() -> None:
    config = assisted("takd", **TWO)
    with pytest.raises(RecipeError, match=r"stage mid: method\.assistants"):
        stages.plan(config.with_(**{"classroom.teacher": "@stage:mid"}))


# --- the equations ----------------------------------------------------------------------------------------------------


def lesson(m: int = 3, b: int = 40) -> Lesson:
    torch.manual_seed(0)
    output, target = Output(torch.randn(b, 5)), torch.arange(b) % 5
    generator = torch.Generator().manual_seed(1)
    mentors = [Output(logits) for logits in 2 * torch.randn(m, b, 5)]
    return Lesson(target, torch.arange(b), 0.0, 0, Classify(5), generator, output, {"student": output}, mentors)


def terms(name: str, given: Lesson, **options: Any) -> dict[str, float]:
    found = methods.build(name, options).loss(given, Phase("main", 1, ("student",), TrainConfig()))
    return {key: value.item() for key, value in found.items()}


@pytest.mark.parametrize(("variant", "share"), [("paper", 1.0), ("official", 1 / 5)])
def test_takd_and_dgkd_are_their_equation(variant: str, share: float) -> None:
    given = lesson()
    each = given.task.soft(given.student.out, given.mentors_out, 5.0)
    hard = given.task.hard(given.student.out, given.target).mean().item()
    found = terms("takd", given, lambda_=0.3, variant=variant)
    assert found == pytest.approx({"hard": 0.7 * hard, "mentors": 0.3 * share * each[0].mean().item()}, rel=1e-5)
    found = terms("dgkd", given, lambda_=0.3, drop_num=0, variant=variant)
    assert found["mentors"] == pytest.approx(0.3 * share * each.sum(0).mean().item(), rel=1e-5)


def test_dgkd_drops_one_mentor_of_every_sample_or_of_the_batch() -> None:
    given = lesson()
    each = given.task.soft(given.student.out, given.mentors_out, 5.0)
    whole = terms("dgkd", given, variant="official")["mentors"] * 2 * 5 * 40
    left_out = [(each.sum() - each[m].sum()).item() for m in range(3)]
    assert any(whole == pytest.approx(total, rel=1e-4) for total in left_out)
    found = [terms("dgkd", given)["mentors"] for _ in range(300)]  # the generator goes on
    mean = 0.5 * each.sum(0).mean().item() * 2 / 3
    assert sum(found) / 300 == pytest.approx(mean, rel=0.02)
    lo, hi = (0.5 * x.mean().item() for x in (each.sum(0) - each.amax(0), each.sum(0) - each.amin(0)))
    assert all(lo <= one <= hi for one in found)
    assert len({round(one, 4) for one in found}) > 100  # not one mentor for all samples
    assert terms("dgkd", lesson(1)) == terms("dgkd", lesson(1), drop_num=0)  # the only one always stays
    assert terms("dgkd", lesson(2), drop_num=9)["mentors"] > 0


# --- trainings --------------------------------------------------------------------------------------------------------


def test_two_stages_and_the_last_part(tmp_path: Path) -> None:
    run = trained(kit.recipe("aver", **TWO), tmp_path / "run")
    assert run.finished
    facts = run.provenance
    assert list(facts["stages"]) == ["big", "mid"]
    assert not (run.path / "stages" / "idle").exists()
    for name, arch in (("big", BIG), ("mid", MID)):
        stage = Run(run.path / "stages" / name)
        assert stage.finished
        assert student_of(stage).architecture.arch == arch
        assert facts["stages"][name]["score"] == stage.score
        assert facts["stages"][name]["recipe"] == stage.provenance["recipe"]
    assert list(facts["mentors"]) == [MID, BIG, f"{MID}#2"]
    mid = Run(run.path / "stages" / "mid")
    assert facts["mentors"][MID]["sha256"] != facts["mentors"][f"{MID}#2"]["sha256"]
    assert mid.provenance["mentors"][BIG] == facts["mentors"][BIG]  # what the first stage trained
    card = cards.read_card(run.path / "stages" / "big" / "student.toml")
    assert (card.epoch, len(Run(run.path / "stages" / "big").metrics())) == (1, 1)
    assert run.recipe.hash() == kit.recipe("aver", **TWO).hash()

    alone = mid.recipe  # a stage is an ordinary run of an ordinary recipe
    assert alone.stage == []
    again = kit.trained(alone, tmp_path / "again")
    assert kit.same(kit.student(mid), kit.student(again))


@pytest.mark.parametrize(
    ("label", "epoch", "batch"), [("stage mid", 1, 2), ("stage mid", 2, 0), ("aver", 2, 3), ("aver", 1, 0)]
)
def test_a_stopped_run_goes_on_in_its_unfinished_stage(tmp_path: Path, label: str, epoch: int, batch: int) -> None:
    config = kit.recipe("aver", **TWO)
    whole = trained(config, tmp_path / "whole")
    labels = []

    def breaks(_: Any, events: Any, now: str) -> None:
        labels.append(now)
        for event in events:
            here = (event.epoch, getattr(event, "batch", 0)) if isinstance(event, Step | EpochEnd) else None
            if now == label and here == (epoch, batch):
                events.close()
                raise InterruptedRun("stopped")

    run = Run(tmp_path / "stopped")
    with pytest.raises(InterruptedRun) as caught:
        distill.distill(config, kit.CPU, breaks, out=str(run.path))
    assert f"kdcli distill --resume {run.path}" in caught.value.hint
    assert not run.finished
    gone = labels[:]

    def goes_on(_: Any, events: Any, now: str) -> None:
        labels.append(now)
        kit.drive(events)

    distill.resume(run, kit.CPU, goes_on)
    assert labels[len(gone) :] == ["stage big", "stage mid", "aver"][len(gone) - 1 :]  # nothing finished is done again
    assert kit.same(kit.student(whole), kit.student(run))
    for stage in ("big", "mid"):
        one, other = (Run(path / "stages" / stage) for path in (whole.path, run.path))
        assert kit.same(kit.student(one), kit.student(other))
    assert run.metrics() == whole.metrics()


def test_what_a_later_stage_cannot_do_is_refused_before_the_first(tmp_path: Path) -> None:
    for change, words in (
        ({"method.taux": 1}, "method.taux"),
        ({"classroom.peers": ["@stage:big", "cifar_vgg8"]}, "cifar_vgg8"),
        ({"classroom.student": "cifar_resnet10_xss"}, "cifar_resnet10_xss"),
    ):
        with pytest.raises(Exception, match=words):
            trained(kit.recipe("aver", **{**TWO, **change}), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_student_may_begin_as_a_stages_graduate(tmp_path: Path) -> None:
    stage = {"name": "warm", "student": "cifar_resnet10_xxs", "method": {"name": "nokd"}}
    config = kit.recipe("kd", stage=[stage], **{"classroom.student": "@stage:warm", "train.lr": 0.0})
    run = trained(config, tmp_path / "run")
    warm, ended = (kit.student(one) for one in (Run(run.path / "stages" / "warm"), run))
    assert torch.equal(warm["fc.weight"], ended["fc.weight"])  # nothing was learned at a rate of 0
    with pytest.raises(RecipeError, match="a compare's control would have to wait"):
        compare.check(config, ["kd"], [0], kit.CPU)


# --- compare ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("independent", [False, True])
def test_a_compared_takd_is_its_own_distill(tmp_path: Path, independent: bool) -> None:
    config = kit.recipe("kd", **{"train.epochs": 1, "baselines": {"takd": TAKD}})
    run, labels = Run(tmp_path / "all"), []

    def follow(_: Any, events: Any, label: str) -> None:
        assert not run.finished
        labels.append(label)
        kit.drive(events)

    found = compare.compare(config, ["takd", "kd"], [0, 3], kit.CPU, follow, independent=independent, out=str(run.path))
    assert labels[0] == ("seed 0: 2 students" if independent else "4 students")
    assert labels[-3:] == ["takd-3: stage assistant1", "takd-3: stage assistant2", "takd-3: takd"]
    assert run.finished
    assert [line.method for line in found.lines] == ["nokd", "takd", "kd"]
    own = config.with_method("takd").with_(**{"train.seed": 3, "data.seed": 3 if independent else 0})
    alone = trained(own, tmp_path / "alone")
    together = Run(run.path / "takd-3")
    assert kit.same(kit.student(alone), kit.student(together))
    assert alone.metrics() == together.metrics()
    assert alone.provenance["recipe"] == together.provenance["recipe"]
    assert [*together.provenance["stages"]] == ["assistant1", "assistant2"]


def test_a_recipe_whose_mentors_come_of_stages_is_compared_too(tmp_path: Path) -> None:
    config = kit.recipe("aver", **TWO, **{"train.epochs": 1})
    run, mentors = Run(tmp_path / "all"), {}

    def follow(classroom: Any, events: Any, label: str) -> None:
        mentors[label] = [member.name for member in classroom.mentors]
        kit.drive(events)

    compare.compare(config, ["aver"], [0], kit.CPU, follow, out=str(run.path))
    assert mentors == {
        "1 student": [], "aver-0: stage big": [BIG], "aver-0: stage mid": [BIG, f"{BIG}#2"],
        "aver-0: aver": [MID, BIG, f"{MID}#2"],
    }  # fmt: skip
    assert run.finished
    alone = trained(config, tmp_path / "alone")
    assert kit.same(kit.student(alone), kit.student(Run(run.path / "aver-0")))


def test_a_stopped_compare_goes_on_with_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As typed: stopped in an assistant's training, resumed, and the same in the end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(assisted("takd").toml())
    typed = ("compare", "--recipe", "mine.toml", "--methods", "takd", "--seeds", "1", "--device", "cpu", "--json")
    whole = kdcli(*typed, "--out", "whole").json
    go, left = groups.go, [3]

    def stops(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        for event in go(*args, **options):
            yield event
            if left[0] == 0 and isinstance(event, Step) and event.batch == 2:
                raise InterruptedRun("stopped")

    monkeypatch.setattr(groups, "go", stops)
    said = kdcli(*typed, "--out", "runs/stopped", code=130)
    assert "kdcli compare --resume runs/stopped" in said.err
    monkeypatch.setattr(groups, "go", go)
    assert Run(Path("runs/stopped/takd-0/stages/assistant1")).finished
    assert not Run(Path("runs/stopped/takd-0/stages/assistant2")).finished
    part = kdcli("distill", "--resume", "runs/stopped/takd-0/stages/assistant2", code=2)
    assert "is a part of runs/stopped" in part.err
    assert "kdcli compare --resume runs/stopped" in part.err
    again = kdcli("compare", "--resume", "stopped", "--device", "cpu", "--json").json
    assert [line["top1"] for line in again["lines"]] == [line["top1"] for line in whole["lines"]]
    assert kit.same(kit.student(Run(Path("whole/takd-0"))), kit.student(Run(Path("runs/stopped/takd-0"))))


# --- as typed ---------------------------------------------------------------------------------------------------------


def test_distill_check_show_and_evaluate_know_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.toml").write_text(kit.recipe("aver", **TWO).toml())
    looked = kdcli("check", "--recipe", "two.toml", "--device", "cpu")
    assert f"stage big: {BIG} learns from {BIG} (kd), 1 epoch," in looked.out
    assert f"stage mid: {MID} learns from {BIG}, {BIG}#2 (aver), 2 epochs" in looked.out
    found = kdcli("check", "--recipe", "two.toml", "--device", "cpu", "--json").json
    assert [seat["top1"] is None for seat in found["seats"]] == [True, True, True, False]
    assert found["seats"][1]["origin"] == "trained first, in a stage"
    assert not (tmp_path / "runs").exists()

    typed = ("distill", "--recipe", "two.toml", "--device", "cpu", "--out", "runs/two")
    said = kdcli(*typed)
    assert "now stage mid" in said.out
    run = Run(Path("runs/two"))
    assert f"stage big % {run.provenance['stages']['big']['score']['top1']:.2f}" in " ".join(said.out.split())
    shown = " ".join(kdcli("runs", "show", "two").out.split())
    assert f"stage mid {run.provenance['stages']['mid']['score']['top1']:.2f}" in shown
    assert json.dumps(kdcli("runs", "ls", "--json").json).count("two") == 1  # a stage is no run of its own in the list
    agreement = kdcli("evaluate", "two", "--mentors", "--json", "--device", "cpu").json["agreement"]
    assert list(agreement) == [MID, BIG, f"{MID}#2"]
    again = kdcli("distill", "--resume", "two", code=2)
    assert "is finished" in again.err
    bank = kdcli("bank", "build", "--recipe", "two.toml", "--device", "cpu", code=2)
    assert "@stage:mid is trained by distill and compare only" in bank.err


def test_a_stopped_distill_is_resumed_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.toml").write_text(kit.recipe("aver", **TWO).toml())
    typed = ("distill", "--recipe", "two.toml", "--device", "cpu", "--json")
    whole = kdcli(*typed, "--out", "runs/whole").json
    go, left = groups.go, [2]

    def stops(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        for event in go(*args, **options):
            yield event
            if left[0] == 0 and isinstance(event, Step) and event.batch == 2:
                raise InterruptedRun("stopped")

    monkeypatch.setattr(groups, "go", stops)
    said = kdcli(*typed, "--out", "runs/stopped", code=130)
    assert "kdcli distill --resume runs/stopped" in said.err
    monkeypatch.setattr(groups, "go", go)
    assert "not finished" in kdcli("runs", "show", "stopped").out
    part = kdcli("distill", "--resume", "runs/stopped/stages/mid", code=2)
    assert "kdcli distill --resume runs/stopped" in part.err
    again = kdcli("distill", "--resume", "stopped", "--device", "cpu", "--json").json
    assert again["top1"] == whole["top1"]
    assert again["stages"] == {
        **whole["stages"],
        "mid": {**whole["stages"]["mid"], "recipe": again["stages"]["mid"]["recipe"]},
    }
    assert kit.same(kit.student(Run(Path("runs/whole"))), kit.student(Run(Path("runs/stopped"))))
