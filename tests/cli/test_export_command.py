"""kdcli export, and what evaluate and bench do with its files: formats by name and by suffix, both tasks."""

from pathlib import Path

import pytest
import torch
from cli_kit import STUDENT, TINY, kdcli
from export_kit import pairs

from kdcli import export as formats
from kdcli.export import Exported, Format, open_file

ALONE = ("--student", STUDENT, "--data", "digits", "--method", "nokd")


@pytest.fixture
def run(here) -> Path:
    """A finished run."""
    kdcli("distill", *ALONE, *TINY, "--out", "runs/done")
    return here / "runs/done"


class Toy:
    """A runtime for files that hold nothing: the first class, always."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self.path, self.size, self.provider, self.batch = Path(path), 0, "toy", None
        self.input_size, self.num_classes, self.metadata = (16, 16), 10, {"task": "classify"}

    def run(self, images):
        return torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.int64), 10).float()

    __call__ = run


@pytest.fixture
def toy(monkeypatch):
    """A second format."""

    def write(network, real, path, *, batch, **_):
        path.touch()
        return Exported(path, 0, 0, batch is None, 0.0, 100.0, len(real))

    monkeypatch.setitem(formats.FORMATS, ".toy", Format("toy", write, Toy))


def test_the_format_may_be_named_in_three_ways_or_not_at_all(run, here):
    for words in (("--onnx",), ("--format", "onnx"), ("--file", "named.onnx"), ()):
        done = kdcli("export", *words, "--json").json
        assert {"path", "size", "opset", "dynamic", "max_difference", "agreement", "checked_on"} == done.keys()
        assert open_file(done["path"]).metadata["run"] == "runs/done"
    assert (run / "student.onnx").is_file()
    assert (here / "named.onnx").is_file()


def test_a_file_has_the_suffix_of_its_format(run, toy):
    said = kdcli("export", "--onnx", "--file", "s.pt", code=2)
    assert "s.pt" in said.err
    assert "--file s.onnx" in said.err
    assert "s.toy" in kdcli("export", "--onnx", "--file", "s.toy", code=2).err
    assert ".onnx or .toy" in kdcli("export", "--file", "s", code=2).err
    assert "'onx'" in kdcli("export", "--format", "onx", code=2).err
    assert "contradict" in kdcli("export", "--onnx", "--format", "toy", code=2).err


def test_another_format_goes_through_every_command(run, toy, here):
    assert kdcli("export", "--format", "toy").next == "kdcli bench runs/done/student.toy"
    assert kdcli("bench", "--calls", "2", "--json").json[0]["provider"] == "toy"
    assert kdcli("export", "--file", "s.toy", "--json").json["path"] == "s.toy"
    assert kdcli("bench", "s.toy", "--calls", "2").next == "kdcli evaluate s.toy"
    said = kdcli("evaluate", "s.toy", "--data", "digits")
    assert said.next == "kdcli bench s.toy"
    assert kdcli("evaluate", "s.toy", "--data", "digits", "--json").json["top1"] == pytest.approx(10, abs=0.5)


def test_images_that_are_not_square_and_have_several_labels(here):
    """From the training to the timed file. The file alone, apart from its run, knows its task and its size."""
    pairs(here / "pairs.npz")
    data = ("--data", "npz:pairs.npz", "--set", "task=multilabel", "--set", "data.image_size=[8,16]")
    training = ("--epochs", "4", "--set", "train.batch_size=32", "--set", "train.lr=0.05")
    kdcli("distill", "--student", STUDENT, *data, "--method", "nokd", *training, "--out", "runs/pairs")
    ours = kdcli("evaluate", "--json").json
    assert ours["map"] > 40  # a fifth of the labels are given: random answers have about 20
    assert kdcli("export", "--onnx", "--json").json["agreement"] == 100
    assert kdcli("bench", "--calls", "2", "--json").json[0]["p50"] > 0
    (here / "runs/pairs/student.onnx").rename(here / "s.onnx")
    for words in ((), ("--data", "npz:pairs.npz")):
        scored = kdcli("evaluate", "s.onnx", *words, "--json").json
        assert {"map", "f1", "loss", "exact", "per_class"} <= scored.keys()
        assert "top1" not in scored
        assert [scored[name] for name in ("map", "f1", "loss")] == pytest.approx(
            [ours[name] for name in ("map", "f1", "loss")], rel=1e-3
        )
    assert "mAP %" in kdcli("evaluate", "s.onnx").out


@pytest.mark.parametrize("size", ["16", "[20,12]"])
def test_a_file_is_evaluated_at_its_own_size(here, size):
    kdcli("distill", *ALONE, *TINY, "--set", f"data.image_size={size}", "--out", "run")
    ours = kdcli("evaluate", "run", "--json").json
    file = kdcli("export", "--onnx", "run", "--json").json["path"]
    height, width = open_file(file).input_size
    assert f"[{height},{width}]" == size or height == width == int(size)
    scored = kdcli("evaluate", file, "--data", "digits", "--json").json
    assert scored["loss"] == pytest.approx(ours["loss"], rel=1e-4)
