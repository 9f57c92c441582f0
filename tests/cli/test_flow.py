"""From a mentor to a timed file, command after command, as a user types them."""

import json
from pathlib import Path

import pytest
from cli_kit import CLASSROOM, PEER, STUDENT, TEACHER, TINY, add_mentors, kdcli

from kdcli import recipe as recipes
from kdcli.models import cards
from kdcli.training.session import Session


@pytest.fixture
def mentors():
    """Random mentors for the digits in the zoo."""
    add_mentors(TEACHER, PEER)


def test_train_keeps_epochs_that_teach_as_peers_and_fills_the_zoo(here):
    said = kdcli(
        "train", "--model", PEER, "--data", "digits", "--keep", "1,2", *TINY, "--epochs", "2", "--out", "runs/mentor"
    )
    assert "training recipe defaults/digits (no --recipe was given)" in said.out
    assert said.next == f"kdcli distill --teacher {PEER} --student NAME --data digits"
    kept = [line.removeprefix("kept ") for line in said.out.splitlines() if line.startswith("kept ")]
    assert kept == [f"{PEER}@runs/mentor#1", f"{PEER}@runs/mentor#2"]
    card = cards.cards(shipped=False)[0]
    assert (card.architecture, card.epoch) == (f"zoo:{PEER}", 2)
    said = kdcli(
        "distill", "--teacher", PEER, "--peers", f"{PEER}@mentor#1", "--student", STUDENT, "--data", "digits", *TINY
    )
    assert "epoch 1" in next(line for line in said.out.splitlines() if "run mentor" in line)
    mentors = kdcli("runs", "show", "--json").json["provenance"]["mentors"]
    assert mentors.keys() == {PEER, f"{PEER}#2"}
    assert mentors[PEER]["sha256"] != mentors[f"{PEER}#2"]["sha256"]


def test_distill_export_bench_and_evaluate_follow_the_newest_run(mentors, here):
    said = kdcli("distill", *CLASSROOM, *TINY)
    run = here / next(line for line in said.out.splitlines() if line.startswith("run ")).split()[1]
    assert run.parent.name == "runs"
    assert run.name.endswith(f"-{STUDENT}-classroom")
    assert said.next == "kdcli export --onnx"
    assert "top-1 %" in said.out
    said = kdcli("export", "--onnx")
    assert f"{run.name} (the newest)" in said.err
    assert (run / "student.onnx").is_file()
    assert said.next == f"kdcli bench runs/{run.name}/student.onnx"
    timed = kdcli("bench", "--calls", "5")
    assert {"p50", "p90", "p99", "images/s"} <= set(timed.out.split())
    assert timed.next == f"kdcli evaluate runs/{run.name}/student.onnx"
    named = kdcli("bench", run.name, run / "student.onnx", "--calls", "5", "--json").json
    assert {Path(one["name"]).name for one in named} == {"student.onnx"}
    ours = kdcli("evaluate", "--mentors", "--json").json
    assert ours["agreement"].keys() == {TEACHER, PEER}
    assert ours["top1"] == pytest.approx(json.loads((run / "provenance.json").read_text())["score"]["top1"])
    onnx = kdcli("evaluate", run / "student.onnx", "--json").json
    assert onnx["top1"] == pytest.approx(ours["top1"], abs=0.3)
    assert onnx["loss"] == pytest.approx(ours["loss"], abs=1e-4)
    assert kdcli("evaluate").next == "kdcli export --onnx"


def test_evaluate_a_name_with_weights(mentors):
    said = kdcli("evaluate", PEER, "--data", "digits")
    assert "calibration %" in said.out
    assert said.next == f"kdcli distill --teacher {PEER} --student NAME --data digits"
    kdcli("distill", *CLASSROOM, *TINY, "--out", "r")
    ours = kdcli("evaluate", "r", "--split", "train", "--json").json
    same = kdcli("evaluate", f"{STUDENT}@r/student.safetensors", "--split", "train", "--data", "digits",
                 "--set", "data.per_class=5", "--json").json  # fmt: skip
    assert (same["images"], same["loss"]) == (50, pytest.approx(ours["loss"], rel=1e-6))


def test_json_is_pure_in_every_command_that_trains(mentors):
    assert kdcli("distill", *CLASSROOM, *TINY, "--json").json["epoch"] == 1
    assert kdcli("train", "--model", PEER, "--data", "digits", *TINY, "--json").json["zoo"]["dataset"] == "digits"
    assert kdcli("export", "--onnx", "--json").json["dynamic"] is True
    assert kdcli("check", *CLASSROOM, *TINY, "--json").json["seats"][0]["role"] == "student"
    found = kdcli("compare", "--recipe", "quickstart", *CLASSROOM[:6], *TINY, "--seeds", "1", "--json").json
    assert [line["method"] for line in found["lines"]] == ["nokd", "aver", "classroom"]


def test_a_recipe_file_flags_and_set_add_up(mentors, here):
    (here / "r.toml").write_text(
        f'extends = "quickstart"\n[classroom]\nstudent = "{STUDENT}"\nteacher = "{TEACHER}"\npeers = []\n'
        '[expect]\nsource = "a guess"\ntop1 = { kd = 99.0 }\n'
    )
    said = kdcli("distill", "--recipe", "r.toml", "--method", "kd", "--seed", "3", *TINY, "--set", "method.tau=2")
    assert "published" in said.out
    assert "off by -" in said.out
    recipe = kdcli("recipes", "cat", Path(kdcli("runs", "show", "--json").json["run"], "recipe.toml"), "--json").json
    assert recipe["method"] == {"name": "kd", "tau": 2}
    assert (recipe["train"]["seed"], recipe["train"]["epochs"], recipe["classroom"]["peers"]) == (3, 1, [])


@pytest.mark.parametrize("command", ["distill", "train", "compare"])
def test_a_run_that_was_stopped_is_resumed_by_its_own_command(mentors, here, command, monkeypatch):
    import os
    import signal

    asked = ["--model", PEER, "--data", "digits"] if command == "train" else [*CLASSROOM]
    more = ["--seeds", "1", "--methods", "kd"] if command == "compare" else []
    tiny = [*TINY, "--epochs", "2"]
    kdcli(command, *asked, *more, *tiny, "--out", "whole")
    whole = Session.checkpoint

    def stop(session, epoch, batch):
        whole(session, epoch, batch)
        if (epoch, batch) == (1, 0):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Session, "checkpoint", stop)
    said = kdcli(command, *asked, *more, *tiny, "--out", "runs/stopped", code=130)
    assert "--resume runs/stopped" in said.err
    monkeypatch.setattr(Session, "checkpoint", whole)
    assert "stopped" in kdcli("runs", "ls").out
    assert kdcli("runs", "show", "stopped").next == f"kdcli {command} --resume runs/stopped"
    other = "train" if command == "distill" else "distill"
    assert f"kdcli {command} --resume" in kdcli(other, "--resume", "stopped", code=2).err
    assert "would change it" in kdcli(command, "--resume", "stopped", "--epochs", "5", code=2).err
    kdcli(command, "--resume", "stopped")
    student = "kd-0/student.safetensors" if command == "compare" else "student.safetensors"
    assert (here / "runs/stopped" / student).read_bytes() == (here / "whole" / student).read_bytes()
    if command == "distill":
        assert "is finished" in kdcli(command, "--resume", "stopped", code=2).err


def test_compare_takes_the_newest_run_that_has_mentors_and_stands_for_its_method(mentors, here):
    kdcli("distill", *CLASSROOM, *TINY, "--out", "runs/room")
    kdcli("train", "--model", PEER, "--data", "digits", *TINY)
    said = kdcli("compare", "--methods", "aver,classroom", "--seeds", "2")
    assert "classroom that of run room (no recipe or data was given)" in said.out
    rows = [line.split()[0] for line in said.out.splitlines() if " ± " in line and ";" not in line]
    assert rows == ["nokd", "aver", "classroom"]
    run = kdcli("runs", "ls", "--json").json[-1]
    assert run["kind"] == "compare"
    assert said.next == f"kdcli export --onnx runs/{run['run']}/classroom-0"  # never the best on the test set
    assert f"{run['run']}/classroom-0 (the newest)" in kdcli("evaluate").err
    shown = kdcli("runs", "show")
    assert "within noise" in shown.out or "better" in shown.out or "worse" in shown.out
    assert kdcli("compare", "room", "--methods", "kd", "--seeds", "4,7", "--json").json["lines"][1]["seeds"] == [4, 7]


def test_compare_and_distill_end_with_the_same_bits(mentors, here):
    kdcli("compare", *CLASSROOM, *TINY, "--methods", "classroom", "--seeds", "2", "--out", "both")
    kdcli("distill", *CLASSROOM, *TINY, "--seed", "1", "--out", "alone")
    together, alone = (here / where / "student.safetensors" for where in ("both/classroom-1", "alone"))
    assert together.read_bytes() == alone.read_bytes()


def test_compare_without_any_run_uses_the_quickstarts_classroom():
    room = recipes.load("quickstart").classroom
    add_mentors(str(room.teacher), *room.peers)  # so that it need not train them
    said = kdcli("compare", *TINY, "--seeds", "1", "--methods", "aver")
    assert "classroom the quickstart's" in said.out
    assert "one seed: no verdict" in said.out


def test_compare_with_independent_streams(mentors):
    found = kdcli(
        "compare", *CLASSROOM, *TINY, "--methods", "kd", "--seeds", "2", "--independent", "--json", "--out", "c"
    ).json
    assert found["lines"][1]["seeds"] == [0, 1]
    seeds = [kdcli("runs", "show", f"c/kd-{n}", "--json").json["provenance"]["seeds"] for n in (0, 1)]
    assert seeds == [{"data": n, "train": n} for n in (0, 1)]
