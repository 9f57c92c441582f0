"""Several classes an image, through the commands: mosaics of real digits from an .npz file with a 0/1 matrix."""

from pathlib import Path

import mosaics
import pytest
from cli_kit import PEER, STUDENT, kdcli

MULTI = ("--data", "npz:mosaics.npz", "--set", "task=multilabel")
TINY = ("--epochs", "1", "--set", "train.batch_size=32")


@pytest.fixture(autouse=True)
def _data(here: Path) -> None:
    mosaics.write(here / "mosaics.npz", train=96, test=64)


@pytest.fixture
def mentor() -> None:
    kdcli("train", "--model", PEER, *MULTI, *TINY, "--out", "mentor")


def test_a_student_is_trained_distilled_evaluated_and_exported(mentor, here):
    said = kdcli("distill", "--teacher", PEER, "--student", STUDENT, "--method", "kd", *MULTI, *TINY, "--out", "run")
    assert "mAP %" in said.out
    assert "top-1" not in said.out
    found = kdcli("evaluate", "run", "--mentors", "--json").json
    assert {"map", "f1", "loss"} <= found.keys()
    assert "top1" not in found
    assert found["images"] == 64
    assert found["agreement"].keys() == {PEER}
    assert len(found["per_class"]) == 10
    shown = kdcli("evaluate", "run")
    assert all(title in shown.out for title in ("mAP %", "micro F1 %", "AP %"))
    kdcli("export", "--onnx", "run")
    exported = kdcli("evaluate", "run/student.onnx", "--json").json
    assert exported["map"] == pytest.approx(found["map"], abs=0.5)
    assert exported["loss"] == pytest.approx(found["loss"], rel=1e-3)
    alone = kdcli("evaluate", "run/student.safetensors", "--data", "npz:mosaics.npz", "--json").json
    assert alone["map"] == pytest.approx(found["map"])  # its card knows the task


def test_a_trained_model_enters_the_zoo_with_its_metric_and_its_next_command_names_the_task(here):
    said = kdcli("train", "--model", PEER, *MULTI, *TINY)
    assert "mAP %" in said.out
    assert said.next == f"kdcli distill --teacher {PEER} --student NAME --data npz:mosaics.npz --set task=multilabel"
    card = next(one for one in kdcli("zoo", "ls", "--json").json if one["task"] == "multilabel")
    assert card["map"] == card["score"]["map"]
    copied = kdcli("zoo", "add", card["weights"], "--architecture", PEER, *MULTI, "--json").json
    assert copied["task"] == "multilabel"
    assert copied["score"]["map"] == pytest.approx(card["map"], abs=0.02)
    run = kdcli("runs", "ls", "--json").json[0]
    assert run["metric"] == "map"
    assert run["map"] == pytest.approx(card["map"], abs=1e-3)
    assert "map" in kdcli("runs", "show").out


def test_methods_are_compared_by_the_tasks_metric(mentor, here):
    classroom = ("--teacher", PEER, "--student", STUDENT, *MULTI, *TINY)
    said = kdcli("compare", *classroom, "--methods", "kd", "--seeds", "1", "--out", "both")
    assert "mAP %" in said.out
    assert "mAP: mean ± spread" in said.out
    assert "top-1" not in said.out
    found = kdcli("compare", "--resume", "both", "--json").json
    assert found["metric"]["name"] == "map"
    assert found["lines"][1]["map"] == found["lines"][1]["values"]


def test_a_classroom_is_checked_by_the_tasks_metric(mentor):
    classroom = ("--teacher", PEER, "--student", STUDENT, "--method", "kd", *MULTI, *TINY)
    said = kdcli("check", *classroom)
    assert "mAP %" in said.out
    assert "top-1" not in said.out
    student, teacher = kdcli("check", *classroom, "--json").json["seats"]
    assert (student["map"], teacher["role"]) == (None, "teacher")
    assert teacher["map"] > 0


@pytest.mark.parametrize("command", ["distill", "check", "compare"])
def test_a_method_with_a_softmax_over_classes_is_refused(mentor, command):
    method = ("--methods", "dkd") if command == "compare" else ("--method", "dkd")
    said = kdcli(command, "--teacher", PEER, "--student", STUDENT, *method, *MULTI, *TINY, code=2)
    assert "dkd" in said.err
    assert "multilabel" in said.err


@pytest.mark.parametrize("command", ["distill", "check", "compare"])
def test_published_figures_of_another_tasks_metric_are_refused(command, here):
    (here / "r.toml").write_text(
        f'task = "multilabel"\n[data]\nname = "npz:mosaics.npz"\n[classroom]\nstudent = "{STUDENT}"\n'
        '[method]\nname = "nokd"\n[expect]\nmapp = { nokd = 50.0 }\n'
    )
    said = kdcli(command, "--recipe", "r.toml", code=2)
    assert "expect.mapp: task multilabel has no metric of that name" in said.err
    assert "map" in said.err.splitlines()[-1]
