"""Run folders and cards written by kdcli 0.1.0, before metrics had tables of their own: everything still reads them."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from cli_kit import PEER, STUDENT, add_mentors, kdcli
from safetensors.torch import save_file

from kdcli.data import open_data
from kdcli.models import cards, registry
from kdcli.recipe import DataConfig

RECIPE = """\
title = "What `--data digits` starts from when no recipe is given"
source = "kdcli; a set for trying things out, so short"
task = "classify"

[data]
name = "digits"
image_size = 8
augment = "crop"
holdout = 0.0
per_class = 5
seed = 0
readers = "auto"
decode = "cpu"
skip_corrupt = false

[classroom]
student = "cifar_resnet10_xxs"
teacher = "cifar_resnet8"
peers = []
class_map = "off"
precision = "auto"
bank = false
bank_pooled = false

[method]
name = "kd"

[baselines]

[train]
epochs = 1
batch_size = 16
drop_last = false
optimizer = "sgd"
lr = 0.05
momentum = 0.9
nesterov = false
weight_decay = 0.0005
decay_norm_and_bias = true
schedule = "cosine"
warmup_epochs = 0
warmup_lr = 1e-05
min_lr = 0.0
decay_epochs = []
decay_rate = 0.1
cycles = 1
precision = "auto"
seed = 0
accumulate = 1
label_smoothing = 0.0
mixup = 0.0
cutmix = 0.0
sync_bn = false
compile = false
cuda_graph = false
tensorboard = false
eval_every = 1
checkpoint_minutes = 10.0
"""
CARD = """\
name = "cifar_resnet10_xxs on digits"
architecture = "zoo:cifar_resnet10_xxs"
dataset = "digits"
data_hash = "{data}"
num_classes = 10
classes = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
image_size = 8
mean = [0.306, 0.306, 0.306]
std = [0.3761, 0.3761, 0.3761]
interpolation = "bicubic"
top1 = 10.2778
sha256 = "{sha256}"
licence = ""
origin = "runs/old"
created = "2026-11-26T16:06:39.249161+00:00"
epoch = 1
params = 11490
"""
ROW = {
    "epoch": 1, "lr": 0.007, "train/top1": 10.0, "train/loss": 0.37, "loss/hard": 0.25, "loss/teacher": 0.12,
    "test/top1": 10.277777777777779, "test/top5": 54.166666666666664, "test/loss": 2.3067798614501953,
}  # fmt: skip


def provenance(kind: str, data: str, **more: object) -> dict[str, object]:
    return {
        "kind": kind,
        "started": "2026-11-26T16:06:38.122642+00:00",
        "command": "kdcli",
        "platform": "Linux",
        "versions": {"kdcli": "0.1.0", "python": "3.11.7", "torch": "2.14.1"},
        "recipe": "efccd29554f6c613fdc2e9a3960e18ea6967faae398d2b46b3349a63ada0f502",
        "seeds": {"data": 0, "train": 0},
        "device": "AMD EPYC, 1 threads",
        "ranks": "1",
        "data": {"name": "digits", "hash": data, "pixels": data, "image_size": 8, "train": 50, "test": 360},
        "mentors": {PEER: {"architecture": f"zoo:{PEER}", "sha256": "2dd43839e107070d2cdb768987ae68c6"}},
        "banks": {},
        "chosen": [["device", "AMD EPYC, 1 threads", "--device chooses"]],
        "number": 1,
        "recipe_toml": RECIPE,
        **more,
    }


def learner(folder: Path, data: str, seed: int = 0) -> Path:
    """A finished distill as it was written, with the weights of a random student."""
    folder.mkdir(parents=True)
    scores = {"epoch": 1, "top1": ROW["test/top1"], "last": ROW["test/top1"], "best": ROW["test/top1"], "best_epoch": 1}
    (folder / "provenance.json").write_text(json.dumps(provenance("distill", data, **scores), indent=1))
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    torch.manual_seed(seed)
    weights = folder / "student.safetensors"
    save_file(registry.create(registry.resolve(STUDENT), 10).module.state_dict(), weights)
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    (folder / "student.toml").write_text(CARD.format(data=data, sha256=sha256))
    return folder


@pytest.fixture
def data() -> str:
    """The digits' content hash."""
    return open_data(DataConfig(name="digits")).hash


@pytest.fixture
def old(here: Path, data: str) -> Path:
    return learner(here / "runs/old", data)


def test_it_is_listed_shown_and_finished(old):
    (row,) = kdcli("runs", "ls", "--json").json
    assert {"run": "old", "kind": "distill", "finished": True, "top1": ROW["test/top1"]}.items() <= row.items()
    assert "10.28" in kdcli("runs", "ls").out
    shown = kdcli("runs", "show", "old")
    assert "10.28" in shown.out
    assert shown.next == "kdcli export --onnx runs/old"
    assert "is finished" in kdcli("distill", "--resume", "old", code=2).err


def test_it_is_evaluated_exported_and_timed(old):
    found = kdcli("evaluate", "--json").json
    assert found["images"] == 360
    assert found["top1"] >= 0
    add_mentors(PEER, image_size=8)
    assert kdcli("evaluate", "old", "--mentors", "--json").json["agreement"].keys() == {PEER}
    assert kdcli("export", "--onnx", "old", "--json").json["path"].endswith("student.onnx")
    exported = kdcli("evaluate", "runs/old/student.onnx", "--json").json
    assert exported["loss"] == pytest.approx(found["loss"], rel=1e-3)
    kdcli("bench", "old", "--calls", "2")


def test_its_student_is_a_mentor_by_run_by_path_and_in_the_zoo(old):
    spec = f"{STUDENT}@runs/old"
    said = kdcli("distill", "--teacher", spec, "--student", STUDENT, "--method", "kd", "--data", "digits", "--epochs",
                 "1", "--set", "data.per_class=2", "--set", "train.batch_size=10", "--out", "new")  # fmt: skip
    assert "run old: cifar_resnet10_xxs on digits, 10.28 %, epoch 1, 2026-11-26" in said.out
    kdcli("evaluate", f"{STUDENT}@runs/old/student.safetensors", "--data", "digits")
    added = kdcli("zoo", "add", "runs/old", "--json").json
    assert added["top1"] == added["score"]["top1"] == 10.2778
    assert cards.find(f"zoo:{STUDENT}", added["data_hash"]) is not None


def test_a_compare_is_summarised_and_stands_for_its_learner(here, data):
    folder = here / "runs/pair"
    for n, name in enumerate(("nokd-0", "kd-0")):
        learner(folder / name, data, n)
    more = {"methods": ["nokd", "kd"], "train_seeds": [0], "independent": False, "stands_for": "kd-0"}
    (folder / "provenance.json").write_text(json.dumps(provenance("compare", data, **more)))
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "compare.json").write_text("{}")
    said = kdcli("runs", "show", "pair")
    assert "one seed: no verdict" in said.out
    assert "runs/pair/kd-0 (the newest)" in kdcli("evaluate").err
