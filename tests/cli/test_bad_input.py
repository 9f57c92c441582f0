"""Every way in which input can be wrong: one paragraph that says what and where, a cure, the right exit code.

Exit codes are DESIGN section 7's: 2 usage or recipe, 3 data or weights, 4 diverged, 130 interrupted.
"""

import errno
import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_kit import CLASSROOM, PEER, STUDENT, TEACHER, TINY, Started, add_mentors, kdcli, picture_folder

from kdcli.models import registry
from kdcli.training import run as runs

ALONE = ("--student", STUDENT, "--method", "nokd")
SMALL = ("--set", "data.image_size=32", "--set", "train.batch_size=4", "--epochs", "1")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@dataclass
class Case:
    """A command line that must be refused."""

    name: str
    args: tuple[str, ...]
    code: int
    says: tuple[str, ...]  # in the message
    cure: tuple[str, ...]  # in the message too
    ready: list[str] = field(default_factory=list)  # the preparations of `prepare` it needs


def prepare(here: Path, what: str) -> None:
    """Lay out what a case needs."""
    if what == "mentors":
        add_mentors(TEACHER, PEER)
    elif what == "checkpoints":
        state = registry.create(registry.resolve(PEER), 10).module.state_dict()
        torch.save(state, here / "whole.pth")
        (here / "cut.pth").write_bytes((here / "whole.pth").read_bytes()[:5000])
        torch.save({"epoch": 3}, here / "foreign.pth")
        (here / "page.pth").write_text("<html>not found</html>")
        torch.save(registry.create(registry.resolve(PEER), 7).module.state_dict(), here / "seven.pth")
        sick = {k: torch.full_like(v, float("nan")) if v.is_floating_point() else v for k, v in state.items()}
        torch.save(sick, here / "sick.pth")
    elif what == "pictures":
        picture_folder(here / "pets", ("cat", "dog"))
    elif what == "corrupt":
        picture_folder(here / "torn", ("cat", "dog"))
        for n in (1, 2):
            (here / f"torn/train/cat/cat_{n}.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    elif what == "one class":
        picture_folder(here / "one", ("cat",))
    elif what == "empty class":
        picture_folder(here / "gap", ("cat", "dog"))
        (here / "gap/train/emu").mkdir()
    elif what == "empty npz":
        zeros = np.zeros((4, 8, 8, 3), np.uint8)
        np.savez(here / "x.npz", train_images=zeros, train_labels=[0, 0, 2, 2], test_images=zeros, test_labels=[0] * 4)
    elif what == "locked":
        (here / "file").write_text("in the way")
    elif what == "recipes":
        (here / "key.toml").write_text("[train]\nepoch = 3\n")
        (here / "broken.toml").write_text("[train\n")
        (here / "value.toml").write_text('[data]\nname = "digits"\n[train]\nepochs = 0\n')
    elif what == "run":
        kdcli("distill", *ALONE, "--data", "digits", *TINY, "--out", "runs/done")
    else:
        raise AssertionError(what)


DIGITS = ("--data", "digits")
CASES = [
    Case("model", ("distill", "--student", "resnet19", *ALONE[2:], *DIGITS), 2, ("'resnet19'",), ("resnet18",)),
    Case("model of the zoo", ("distill", "--student", "resnet20", *ALONE[2:], *DIGITS), 2, ("'resnet20'",),
         ("cifar_resnet20",)),
    Case("mentor", ("distill", "--teacher", "no_such_net", "--student", STUDENT, *DIGITS), 2, ("'no_such_net'",),
         ("kdcli models",)),
    Case("data set", ("distill", *ALONE, "--data", "cifar11"), 2, ("cifar11",), ("cifar10",)),
    Case("data set without its file", ("distill", *ALONE, "--data", "npz"), 2, ("the path is missing",), ("npz:FILE",)),
    Case("method", ("distill", *CLASSROOM, "--method", "clasroom"), 2, ("clasroom",), ("classroom",), ["mentors"]),
    Case("one of several methods", ("compare", *CLASSROOM, "--methods", "aver,clasroom"), 2, ("clasroom",),
         ("classroom",), ["mentors"]),
    Case("method's option", ("distill", *CLASSROOM, "--set", "method.tua=4"), 2, ("tua",), ("tau",), ["mentors"]),
    Case("method without mentors", ("distill", "--student", STUDENT, "--method", "kd", *DIGITS), 2,
         ("kd needs 1 mentor",), ("--teacher",)),
    Case("peers without a teacher", ("distill", "--peers", PEER, "--student", STUDENT, *DIGITS), 2,
         ("without a teacher",), ("--teacher",), ["mentors"]),
    Case("key of --set", ("distill", *ALONE, *DIGITS, "--set", "train.epoch=3"), 2, ("train.epoch",), ("epochs",)),
    Case("value of --set", ("distill", *ALONE, *DIGITS, "--set", "train.lr=fast"), 2, ("train.lr", "'fast'"), ("cat",)),
    Case("--set without =", ("distill", *ALONE, *DIGITS, "--set", "train.lr"), 2, ("not key=value",), ("--set",)),
    Case("optimiser", ("distill", *ALONE, *DIGITS, *TINY, "--set", "train.optimizer=adamm"), 2, ("adamm",), ("adam",)),
    Case("schedule", ("distill", *ALONE, *DIGITS, *TINY, "--set", "train.schedule=cosin"), 2, ("cosin",), ("cosine",)),
    Case("recipe", ("distill", "--recipe", "quikstart"), 2, ("'quikstart'",), ("quickstart",)),
    Case("recipe's key", ("distill", "--recipe", "key.toml"), 2, ("key.toml", "train.epoch"), ("epochs",), ["recipes"]),
    Case("recipe's value", ("distill", "--recipe", "value.toml"), 2, ("value.toml", "train.epochs"), ("cat",),
         ["recipes"]),
    Case("recipe's TOML", ("distill", "--recipe", "broken.toml"), 2, ("broken.toml", "not TOML"), ("cat",),
         ["recipes"]),
    Case("nothing named", ("distill",), 2, ("no data",), ("--data",)),
    Case("no student", ("distill", *DIGITS), 2, ("no student",), ("--student",)),
    Case("no model", ("train", *DIGITS), 2, ("no model",), ("--model",)),
    Case("run", ("export", "--onnx", "dome"), 2, ("'dome'",), ("done",), ["run"]),
    Case("run to score", ("evaluate", "dome"), 2, ("'dome'",), ("done",), ["run"]),
    Case("no run at all", ("export", "--onnx"), 2, ("no finished run",), ("kdcli quickstart",)),
    Case("run to resume", ("distill", "--resume", "dome"), 2, ("'dome'",), ("done",), ["run"]),
    Case("run that is there already", ("distill", *ALONE, *DIGITS, *TINY, "--out", "runs/done"), 2,
         ("already holds a run",), ("--resume", "--out"), ["run"]),
    Case("device", ("distill", *ALONE, *DIGITS, "--device", "gpu"), 2, ("gpu",), ("cuda",)),
    Case("split", ("evaluate", "done", "--split", "tset"), 2, ("tset",), ("test",), ["run"]),
    Case("held-out slice that is not", ("evaluate", "done", "--split", "holdout"), 3, ("held-out",), ("data.holdout",),
         ["run"]),
    Case("source", ("models", "vgg", "--source", "keras"), 2, ("keras",), ("torchvision",)),
    Case("seeds", ("compare", *CLASSROOM, "--seeds", "some"), 2, ("--seeds some",), ("--seeds 3",)),
    Case("no seeds", ("compare", *CLASSROOM, "--seeds", "0"), 2, ("--seeds 0",), ("--seeds 3",)),
    Case("negative seeds", ("compare", *CLASSROOM, "--seeds=-1,2"), 2, ("--seeds",), ("--seeds 3",)),
    Case("a seed twice", ("compare", *CLASSROOM, "--seeds", "4,4"), 2, ("twice",), ("once",)),
    Case("no methods", ("compare", *CLASSROOM, "--methods", ","), 2, ("--methods",), ("aver,classroom",)),
    Case("keep beyond the end", ("train", "--model", PEER, *DIGITS, "--epochs", "2", "--keep", "1,3"), 2,
         ("--keep 1,3", "1 to 2"), ("within",)),
    Case("keep nonsense", ("train", "--model", PEER, *DIGITS, "--keep", "last"), 2, ("--keep last",),
         ("--keep 20,60",)),
    Case("batch larger than the data", ("distill", *ALONE, *DIGITS, "--set", "data.per_class=2"), 2,
         ("batch_size = 32", "20 images"), ("train.batch_size=",)),
    Case("images a class", ("distill", *ALONE, *DIGITS, "--set", "data.per_class=500"), 2, ("per_class = 500",),
         ("most",)),
    Case("folder missing", ("distill", *ALONE, "--data", "folder:nowhere"), 3, ("nowhere",), ("--data folder:DIR",)),
    Case("imagenet missing", ("distill", *ALONE, "--data", "imagenet"), 3, ("imagenet",),
         ("KDCLI_DATA", "train/<class>")),
    Case("npz missing", ("distill", *ALONE, "--data", "npz:none.npz"), 3, ("none.npz",), ("npz:",)),
    Case("one class", ("distill", *ALONE, "--data", "folder:one", *SMALL), 3, ("one class",), ("two classes",),
         ["one class"]),
    Case("class without images", ("distill", *ALONE, "--data", "folder:gap", *SMALL), 3, ("emu",), ("delete",),
         ["empty class"]),
    Case("label without images", ("distill", *ALONE, "--data", "npz:x.npz", *SMALL), 3, ("no training images",),
         ("without",), ["empty npz"]),
    Case("corrupt images", ("distill", *ALONE, "--data", "folder:torn", *SMALL), 3,
         ("2 image files", "cat_1.jpg", "cat_2.jpg"), ("--skip-corrupt",), ["corrupt"]),
    Case("untrained mentor", ("distill", "--teacher", TEACHER, "--student", STUDENT, *DIGITS), 3, (TEACHER, "digits"),
         (f"kdcli train --model {TEACHER} --data digits",)),
    Case("mentor of other classes", ("distill", "--teacher", "resnet34", "--student", STUDENT, *DIGITS), 3,
         ("1000", "10"), ("kdcli train --model", "class_map")),
    Case("mentor without training", ("distill", "--teacher", f"{PEER}@none", "--student", STUDENT, *DIGITS), 3,
         ("random outputs",), ("kdcli train",)),
    Case("checkpoint missing", ("evaluate", f"{PEER}@whale.pth", *DIGITS), 3, ("whale.pth",), ("whole.pth",),
         ["checkpoints"]),
    Case("checkpoint cut short", ("evaluate", f"{PEER}@cut.pth", *DIGITS), 3, ("cut.pth", "cut short"), ("again",),
         ["checkpoints"]),
    Case("checkpoint of something else", ("evaluate", f"{PEER}@foreign.pth", *DIGITS), 3, ("foreign.pth",),
         ("state_dict",), ["checkpoints"]),
    Case("web page for a checkpoint", ("evaluate", f"{PEER}@page.pth", *DIGITS), 3, ("page.pth", "web page"),
         ("safetensors",), ["checkpoints"]),
    Case("checkpoint of another network", ("evaluate", f"{TEACHER}@whole.pth", *DIGITS), 3, ("whole.pth", TEACHER),
         ("ARCHITECTURE@PATH",), ["checkpoints"]),
    Case("checkpoint of other classes", ("evaluate", f"{PEER}@seven.pth", *DIGITS), 3, ("7 classes", "10"),
         ("kdcli train",), ["checkpoints"]),
    Case("checkpoint that diverged", ("evaluate", f"{PEER}@sick.pth", *DIGITS), 3, ("NaN",), ("earlier",),
         ["checkpoints"]),
    Case("run without that epoch", ("evaluate", f"{STUDENT}@runs/done#9", *DIGITS), 3, ("no epoch 9",), ("--keep 9",),
         ["run"]),
    Case("run on other data", ("evaluate", "done", "--data", "folder:pets"), 3, ("10 classes", "2"), ("trained for",),
         ["run", "pictures"]),
    Case("onnx missing", ("evaluate", "none.onnx", *DIGITS), 3, ("none.onnx",), ("kdcli export",)),
    Case("file to time missing", ("bench", "none.onnx"), 3, ("none.onnx",), ("kdcli export",)),
    Case("run that was never exported", ("bench", "done"), 3, ("student.onnx",), ("kdcli export --onnx done",),
         ["run"]),
    Case("something else for an onnx file", ("bench", "page.pth"), 3, ("page.pth",), ("export",), ["checkpoints"]),
    Case("data that nobody named", ("evaluate", f"{PEER}@whole.pth"), 2, ("no data is named",), ("--data",),
         ["checkpoints"]),
    Case("folder that cannot be written", ("distill", *ALONE, *DIGITS, *TINY, "--out", "file/run"), 3, ("file/run",),
         ("--out",), ["locked"]),
    Case("file that cannot be written", ("export", "--onnx", "done", "--file", "file/s.onnx"), 3, ("file/s.onnx",),
         ("--file",), ["run", "locked"]),
    Case("learning rate that explodes", ("distill", *ALONE, *DIGITS, *TINY, "--set", "train.lr=1e30"), 4,
         ("nokd",), ("train.lr",)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_with_a_cure(case, here):
    for what in case.ready:
        prepare(here, what)
    said = kdcli(*case.args, code=case.code)
    one_paragraph(said)
    for word in (*case.says, *case.cure):
        assert word in said.err
    assert not list(here.rglob(".*.onnx*")), "a temporary file was left"


def one_paragraph(said) -> None:
    assert said.err.startswith("error: ") or said.err.startswith("run "), said.err
    assert "Traceback" not in said.err + said.out
    assert "\n\n" not in said.err.strip()
    assert said.err.count("\n") <= 9, said.err


def test_corrupt_images_are_left_out_when_asked_and_named(here):
    prepare(here, "corrupt")
    said = kdcli("distill", *ALONE, "--data", "folder:torn", "--skip-corrupt", *SMALL)
    assert "cat_1.jpg" in said.out + said.err
    assert kdcli("runs", "show", "--json").json["provenance"]["data"]["train"] == 14


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("command", ["distill", "compare", "evaluate", "check", "train"])
def test_cuda_where_there_is_none(command):
    said = kdcli(command, "--device", "cuda", "--data", "digits", code=2)
    one_paragraph(said)
    assert "no CUDA device" in said.err
    assert "kdcli doctor" in said.err


def test_a_loss_that_is_no_number_names_step_and_term_and_keeps_the_last_good_checkpoint(here):
    said = kdcli("distill", *ALONE, *DIGITS, *TINY, "--epochs", "3", "--set", "train.lr=1e12", "--out", "r", code=4)
    one_paragraph(said)
    assert "step" in said.err or "update" in said.err
    assert not (here / "r/student.safetensors").exists()
    if (here / "r/last.ckpt").exists():
        state = torch.load(here / "r/last.ckpt", weights_only=True)
        assert all(v.isfinite().all() for v in state["learners"]["nokd"]["learners"]["student"].values())


@pytest.mark.parametrize(("broken", "fit"), [("fsync", 5), ("replace", 2)])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(here, monkeypatch, broken, fit):
    whole, calls = getattr(os, broken), []

    def full(*args):
        calls.append(args)
        if len(calls) > fit:  # provenance, recipe and the first scores still fit, the first checkpoint does not
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(*args)

    monkeypatch.setattr(os, broken, full)
    said = kdcli("distill", *ALONE, *DIGITS, *TINY, "--out", "r", code=3)
    one_paragraph(said)
    assert "disk is full" in said.err
    assert "kdcli runs rm" in said.err
    left = sorted(path.name for path in (here / "r").iterdir())
    assert left == ["metrics.jsonl", "provenance.json", "recipe.toml", "run.lock"]


def test_a_disk_that_fills_while_torch_writes(here, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    said = kdcli("distill", *ALONE, *DIGITS, *TINY, "--out", "r", code=3)
    assert "disk is full" in said.err
    assert not (here / "r/last.ckpt").exists()


@pytest.mark.parametrize("model", ["torchvision:resnet18", "timm:resnet18"])
def test_pretrained_weights_without_a_network(here, monkeypatch, model):
    import socket
    import urllib.request

    def offline(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(here / "torch"))
    monkeypatch.setattr(socket, "create_connection", offline)
    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    said = kdcli("train", "--model", f"{model}@pretrained", *DIGITS, code=3)
    one_paragraph(said)
    assert "resnet18" in said.err
    assert not runs.every()


def test_a_checkpoint_cut_short_cannot_be_resumed(here):
    kdcli("distill", *ALONE, *DIGITS, *TINY, "--out", "r")
    (here / "r/student.safetensors").unlink()
    facts = json.loads((here / "r/provenance.json").read_text())
    del facts["finished"], facts["best_epoch"]  # the last things a run writes
    (here / "r/provenance.json").write_text(json.dumps(facts))
    (here / "r/last.ckpt").write_bytes((here / "r/last.ckpt").read_bytes()[:1000])
    said = kdcli("distill", "--resume", "r", code=3)
    one_paragraph(said)
    assert "truncated" in said.err
    assert "no student" in kdcli("evaluate", "r", code=3).err


def test_ctrl_c_saves_and_leaves_with_130(here):
    args = ["distill", *ALONE, *DIGITS, "--epochs", "200", "--set", "data.per_class=10", "--out", "r"]
    with Started(*args) as process:
        for _ in range(600):
            if (here / "r/last.ckpt").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.said(60)
    assert said.code == 130, said.err
    assert said.own[0].startswith("error: stopped by SIGINT")
    assert "--resume r" in said.err
    assert "Traceback" not in said.err
    assert torch.load(here / "r/last.ckpt", weights_only=True)["epoch"] < 200
