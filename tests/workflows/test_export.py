"""From a trained student to its file: every task and size, all formats by one way, whole or not at all."""

import errno
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_kit import digits, pairs, trained

from kdcli import export as formats
from kdcli.data import DataSet
from kdcli.errors import DataError, ParityError, WeightsError
from kdcli.export import Exported, Format, onnx as writer, open_file, student_file
from kdcli.export.bench import bench
from kdcli.export.runtime import OnnxModel
from kdcli.models.member import Member
from kdcli.recipe import Recipe
from kdcli.system import files
from kdcli.tasks import TASKS, Task
from kdcli.training import run as runs
from kdcli.training.evaluate import report, score
from kdcli.training.run import Run
from kdcli.workflows.export import CHECK_IMAGES, export
from kdcli.workflows.ship import ship

CPU = torch.device("cpu")


@dataclass
class Case:
    """A student, its data and task, and the file it was exported to."""

    member: Member
    data: DataSet
    task: Task
    done: Exported


def case(name: str, data: DataSet, folder: Path) -> Case:
    task = TASKS[name](10)
    member = trained(data, task)
    run = Run(folder / "run")
    run.start(Recipe(task=name), runs.provenance("distill", Recipe(task=name)))
    run.amend(score=dict(score(member, data.test, task, CPU)))
    return Case(member, data, task, export(member, data, task, student_file(run.path), run=run))


@pytest.fixture(scope="module")
def classified(tmp_path_factory) -> Case:
    """Handwritten digits, higher than wide."""
    return case("classify", digits((20, 12)), tmp_path_factory.mktemp("classified"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Case:
    """Two handwritten digits side by side, each a label."""
    folder = tmp_path_factory.mktemp("labelled")
    return case("multilabel", pairs(folder / "pairs.npz"), folder)


@pytest.fixture(params=["classified", "labelled"])
def both(request) -> Case:
    return request.getfixturevalue(request.param)


def test_the_file_scores_what_the_student_scores(both):
    model = open_file(both.done.path)
    in_torch, in_file = (score(m, both.data.test, both.task, CPU) for m in (both.member, model))
    assert in_torch.value > 80  # or any two networks would agree
    assert dict(in_file) == pytest.approx(dict(in_torch), abs=1e-3)
    ours, theirs = (report(m, both.data.test, both.data.classes, both.task, CPU) for m in (both.member, model))
    assert theirs.per_class == pytest.approx(ours.per_class, abs=1e-3)
    assert theirs.details == pytest.approx(ours.details, abs=1e-3)


def test_what_was_checked(both):
    assert both.done.checked_on == CHECK_IMAGES + 8
    assert both.done.agreement == 100
    assert both.done.max_difference < 1e-5
    assert both.done.size == both.done.path.stat().st_size
    assert both.done.path.name == "student.onnx"


def test_the_file_describes_itself(both):
    model, size = open_file(both.done.path), both.data.image_size
    assert size[0] != size[1]
    assert (model.input_size, model.num_classes, model.batch) == (size, 10, None)
    facts = model.metadata
    assert json.loads(facts["classes"]) == both.data.classes
    assert facts["image_size"] == f"{size[0]}x{size[1]}"
    assert facts["dataset"] == both.data.name
    assert facts["task"] == both.task.name
    assert facts["run"] == str(both.done.path.parent)
    assert facts["recipe"] == Recipe(task=both.task.name).hash()
    values = score(both.member, both.data.test, both.task, CPU)
    assert facts[both.task.metrics[0].name] == f"{values.value:.2f}"
    assert facts["loss"] == f"{values['loss']:.4f}"


def test_each_task_has_its_own_metrics_in_the_file(classified, labelled):
    assert {"top1", "top5", "loss"} <= open_file(classified.done.path).metadata.keys()
    facts = open_file(labelled.done.path).metadata
    assert {"map", "f1", "loss"} <= facts.keys()
    assert "top1" not in facts


def test_the_file_is_timed_at_its_size(both):
    (timing,) = bench({"student": both.done.path}, batch=2, threads=1, warmup=1, runs=3)
    assert 0 < timing.p50 <= timing.p99


def test_ship_is_an_export_a_score_and_a_time_of_each(labelled, tmp_path):
    run = Run(labelled.done.path.parent)
    rows = ship({"teacher": labelled.member, "student": labelled.member}, labelled.data, labelled.task, tmp_path,
                {"student": run})  # fmt: skip
    assert [row.role for row in rows] == ["teacher", "student"]
    for row in rows:
        facts = row.json()
        assert facts["map_onnx"] == pytest.approx(facts["map_torch"], abs=1e-3)
        assert {"role", "name", "params", "macs", "size", "p50", "p90", "path"} <= facts.keys()
        assert Path(row.path).stat().st_size == row.size
        assert 0 < row.p50 <= row.p90
        assert ("run" in open_file(row.path).metadata) == (row.role == "student")


# --- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.fixture
def known_trace(classified, monkeypatch):
    """Exports of the fixture's student without tracing it again; the list counts the traces."""
    proto, traces = onnx.load(classified.done.path), []
    monkeypatch.setattr(writer, "_trace", lambda *_: traces.append(1) or proto)
    return traces


def again(case: Case, path: Path) -> Exported:
    return export(case.member, case.data, case.task, path)


def test_a_good_file_replaces_an_older_one_in_a_new_folder_too(tmp_path, classified, known_trace):
    path = tmp_path / "new" / "s.onnx"
    assert again(classified, path).path == path
    path.write_bytes(b"older")
    again(classified, path)
    assert open_file(path).num_classes == 10
    assert [p.name for p in path.parent.iterdir()] == ["s.onnx"]


def test_a_file_that_answers_differently_has_no_name(tmp_path, classified, known_trace, monkeypatch):
    path = tmp_path / "student.onnx"
    path.write_bytes(b"older")
    monkeypatch.setattr(OnnxModel, "run", lambda self, pixels: np.zeros((len(pixels), 10), np.float32))
    with pytest.raises(ParityError):
        again(classified, path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk(tmp_path, classified, known_trace, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write .*s\.onnx: the disk is full") as caught:
        again(classified, tmp_path / "s.onnx")
    assert "space" in caught.value.hint
    assert "--file" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused_before_a_trace(tmp_path, classified, known_trace):
    (tmp_path / "file").touch()
    (tmp_path / "folder.onnx").mkdir()
    for path in (tmp_path / "file" / "s.onnx", tmp_path / "folder.onnx"):
        with pytest.raises(DataError, match="cannot write") as caught:
            again(classified, path)
        assert "--file" in caught.value.hint
    assert not known_trace
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.onnx"]


def test_a_folder_without_permission_is_refused_before_a_trace(tmp_path, classified, known_trace, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", refused)  # the tests may run as root, to whom no folder is closed
    with pytest.raises(DataError, match="Permission denied"):
        again(classified, tmp_path / "s.onnx")
    assert not known_trace
    assert not list(tmp_path.iterdir())


# --- one dictionary of formats ----------------------------------------------------------------------------------------


class Toy:
    """A runtime for files that hold a number: every output is the image's mean times it."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self.path, self.size, self.provider, self.batch = path, path.stat().st_size, "toy", None
        self.input_size, self.num_classes, self.metadata = (8, 12), 10, {"task": "multilabel"}

    def run(self, images):
        return images.mean((1, 2, 3))[:, None].repeat(10, 1) * float(self.path.read_text())

    def __call__(self, images):
        return torch.from_numpy(self.run(images.numpy()))


@pytest.fixture
def toy(monkeypatch):
    """A second format, and what its writer was given."""
    given = []

    def write(network, real, path, **options):
        given.append((real.shape, options))
        path.write_text("2")
        return Exported(path, 1, 0, True, 0.0, 100.0, len(real))

    monkeypatch.setitem(formats.FORMATS, ".toy", Format("toy", write, Toy))
    return given


def test_a_new_format_is_one_line(toy, tmp_path):
    task = TASKS["multilabel"](10)
    done = export(torch.nn.Identity(), digits((8, 12)), task, tmp_path / "student.toy", batch=3)  # pyright: ignore[reportArgumentType]
    assert done.path == tmp_path / "student.toy"
    ((shape, options),) = toy
    assert shape == (64, 3, 8, 12)
    assert (options["task"], options["output_name"], options["batch"]) == ("multilabel", "logits", 3)
    assert options["same"] == task.same
    assert open_file(done.path).provider == "toy"
    assert bench({"toy": done.path}, warmup=0, runs=2)[0].provider == "toy"
    assert formats.suffix_of("toy") == ".toy"
    assert student_file(tmp_path) == done.path  # the first that exists
    (tmp_path / "student.onnx").touch()
    assert student_file(tmp_path) == tmp_path / "student.onnx"


def test_the_first_format_is_the_default_and_unknown_ones_are_refused(toy, tmp_path):
    assert formats.suffix_of(None) == formats.suffix_of("onnx") == ".onnx"
    assert student_file(tmp_path) == tmp_path / "student.onnx"
    with pytest.raises(formats.RecipeError, match="'onx'") as caught:
        formats.suffix_of("onx")
    assert "onnx" in caught.value.hint
    with pytest.raises(WeightsError, match=r"weights\.pth.*\.onnx or \.toy"):
        open_file("weights.pth")
    assert not formats.is_exported("weights.pth")
    assert formats.is_exported("runs/a/student.onnx")
