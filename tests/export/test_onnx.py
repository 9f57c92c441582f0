"""The exported file gives the student's answers, or the export fails."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from export_kit import CLASSES, Student, answers, as_if_trained, convnet, export, images
from torch import Tensor, nn

import kdcli
from kdcli.errors import DataError, KdcliError, ParityError, WeightsError
from kdcli.export import Exported, onnx as module
from kdcli.export.runtime import OnnxModel
from kdcli.tasks import MultiLabel


@dataclass
class Shipped:
    student: Student
    done: Exported
    model: OnnxModel


def ship(folder: Path, net: nn.Module, size: int, **options) -> Shipped:
    student = Student(net, size)
    done = export(student, images(64), folder / "student.onnx", **options)
    return Shipped(student, done, OnnxModel(done.path))


@pytest.fixture(scope="module")
def free(tmp_path_factory) -> Shipped:
    """A convnet in training mode, in float64, resizing 16 to 24, any batch."""
    metadata = {"classes": json.dumps(CLASSES), "run": "runs/seven"}
    return ship(tmp_path_factory.mktemp("free"), convnet().double().train(), 24, metadata=metadata)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory) -> Shipped:
    return ship(tmp_path_factory.mktemp("fixed"), convnet(), 12, batch=2)


@pytest.mark.parametrize("n", [1, 3, 64])
def test_any_batch_size_answers_like_torch(free, n):
    pixels = images(n, seed=9)
    wanted = answers(free.student, pixels)
    assert wanted.std() > 0.05  # or any constant would pass
    torch.testing.assert_close(free.model(pixels), wanted, rtol=1e-4, atol=1e-4)
    assert (free.model.batch, free.done.dynamic, free.done.opset) == (None, True, 18)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_a_fixed_batch_is_met_by_splitting_and_padding(fixed, n):
    pixels = images(n + 1, seed=9)[:n]
    torch.testing.assert_close(fixed.model(pixels), answers(fixed.student, pixels), rtol=1e-4, atol=1e-4)
    assert (fixed.model.batch, fixed.done.dynamic) == (2, False)


def test_the_original_is_untouched(free):
    assert free.student.training
    assert all(module.training for module in free.student.modules())
    assert {p.dtype for p in free.student.net.parameters()} == {torch.float64}
    assert all(p.grad is None and p.requires_grad for p in free.student.parameters())


def test_what_was_checked_is_reported(free):
    done = free.done
    assert done.checked_on == 64 + 8
    assert 0 <= done.max_difference <= 1e-4
    assert done.agreement == 100
    assert done.size == done.path.stat().st_size == free.model.size


def test_no_tensor_shares_a_name_with_an_operator(free):
    """The students' own `mean` met the output of the pooling's mean (pytorch issue 168211)."""
    graph = onnx.load(free.done.path).graph
    tensors = [t.name for t in graph.initializer]
    made = [name for node in graph.node for name in node.output]
    assert len({*tensors, *made}) == len(tensors) + len(made)
    assert "student.mean" in tensors


def test_all_in_one_file(free, fixed):
    """Weights included: torch's exporter would put them into a second file."""
    for shipped in (free, fixed):
        assert [p.name for p in shipped.done.path.parent.iterdir()] == ["student.onnx"]


def test_a_run_that_allowed_bfloat16_is_checked_in_float32(tmp_path, free, known_trace, monkeypatch):
    mkldnn: Any = torch.backends.mkldnn
    conv, matmul = mkldnn.conv, mkldnn.matmul
    before = (conv.fp32_precision, matmul.fp32_precision)
    try:
        conv.fp32_precision = matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            done = export(free.student, images(6), tmp_path / "s.onnx")
        assert done.max_difference < 1e-5
        assert (conv.fp32_precision, matmul.fp32_precision) == ("bf16", "bf16")
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def test_metadata_round_trip(free, fixed):
    facts = free.model.metadata
    assert free.model.classes == CLASSES
    assert facts["run"] == "runs/seven"
    assert (facts["image_size"], facts["kdcli_version"], facts["task"]) == ("16", kdcli.__version__, "classify")
    assert (free.model.input_size, free.model.num_classes) == ((16, 16), 5)
    assert fixed.model.classes is None


def test_names_and_no_path_of_this_machine_in_the_file(free):
    proto = onnx.load(free.done.path)
    assert [i.name for i in proto.graph.input] == ["pixels"]
    assert [o.name for o in proto.graph.output] == ["logits"]
    raw = free.done.path.read_bytes()
    assert str(Path(__file__).parent).encode() not in raw
    assert str(Path(torch.__file__).parent).encode() not in raw


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 4}),
        ("swin_tiny_patch4_window7_224", {"depths": (2, 1), "embed_dim": 24, "num_heads": (2, 2), "window_size": 2}),
    ],
)
def test_attention(tmp_path, name, options):
    """Swin's second block shifts its windows: its mask depends on the batch size."""
    net = as_if_trained(timm.create_model(name, img_size=16, num_classes=5, **options))
    shipped = ship(tmp_path, net, 16)
    assert shipped.done.agreement == 100
    pixels = images(5, seed=9)
    torch.testing.assert_close(shipped.model(pixels), answers(shipped.student, pixels), rtol=1e-3, atol=1e-4)


def test_an_older_exporters_antialiasing_is_put_right():
    """What onnxscript wrote before it followed torch: edges counted in, bicubic with a = -0.75."""
    node = onnx.helper.make_node("Resize", ["x", "", "", "s"], ["y"], mode="cubic", antialias=1, cubic_coeff_a=-0.75)
    plain = onnx.helper.make_node("Resize", ["y", "", "", "s"], ["z"], mode="cubic", antialias=0, cubic_coeff_a=-0.75)
    proto = onnx.helper.make_model(onnx.helper.make_graph([node, plain], "g", [], []))
    module._as_torch_resizes(proto)
    first, second = ({a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in proto.graph.node)
    assert (first["exclude_outside"], first["cubic_coeff_a"], first["mode"]) == (1, -0.5, b"cubic")
    assert second["cubic_coeff_a"] == -0.75
    assert "exclude_outside" not in second


@pytest.fixture
def known_trace(free, monkeypatch):
    """Exports of the fixture's student without tracing it again."""
    proto = onnx.load(free.done.path)
    monkeypatch.setattr(module, "_trace", lambda *_: proto)


@pytest.mark.parametrize(("size", "inner"), [((12, 20), (12, 20)), ((20, 12), (16, 24))])
def test_images_that_are_not_square(tmp_path, size, inner):
    """Also for a network that resizes to another size, height and width by different factors."""
    student = Student(convnet(), inner)
    done = export(student, images(16, size), tmp_path / "s.onnx", metadata={"classes": json.dumps(CLASSES)})
    model = OnnxModel(done.path)
    assert (model.input_size, model.metadata["image_size"]) == (size, f"{size[0]}x{size[1]}")
    pixels = images(5, size, seed=9)
    wanted = answers(student, pixels)
    assert wanted.std() > 0.05
    torch.testing.assert_close(model(pixels), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match=r"images \[B,3,\d\d,\d\d\], given"):
        model(pixels.transpose(2, 3))


def test_a_file_that_answers_differently_is_refused(tmp_path, free, known_trace, monkeypatch):
    true = OnnxModel.run

    def wrong(self, pixels):
        out = true(self, pixels).copy()
        if len(out) == 63:  # the second call: all real images but the first
            out[2] += 0.5
        return out

    monkeypatch.setattr(OnnxModel, "run", wrong)
    with pytest.raises(ParityError, match=r"differ by .*wrong on real image 3$") as caught:
        export(free.student, images(64), tmp_path / "s.onnx")
    assert caught.value.exit_code == 5
    assert caught.value.hint


def test_a_small_difference_that_changes_the_answer_is_refused(tmp_path, free, known_trace, monkeypatch):
    def turned(self, pixels):
        return answers(free.student, torch.from_numpy(pixels)).roll(1, 1).numpy()

    monkeypatch.setattr(OnnxModel, "run", turned)
    with pytest.raises(ParityError, match="answer differs on 64 of 64"):
        export(free.student, images(64), tmp_path / "s.onnx", tolerance=10.0)


def test_the_task_decides_what_is_the_same_answer(tmp_path, free, known_trace, monkeypatch):
    """The last of the ranking changes its sign: nothing to a classifier, another label where all may be given."""

    def turned(self, pixels):
        out = answers(free.student, torch.from_numpy(pixels)).float()
        last = out.argmin(1, keepdim=True)
        return out.scatter(
            1, last, torch.where(out.gather(1, last) < 0, 1e-3, -1e-3).minimum(out.amax(1, True))
        ).numpy()

    monkeypatch.setattr(OnnxModel, "run", turned)
    out = answers(free.student, images(64).double())
    assert (out.amin(1) < 0).any()
    changed = int(((out.amin(1) < 0) & (out.amax(1) > 0)).sum())
    assert changed > 0
    assert export(free.student, images(64), tmp_path / "s.onnx", tolerance=10.0).agreement == 100
    with pytest.raises(ParityError, match=r"answer differs on [1-9]\d* of 64"):
        export(free.student, images(64), tmp_path / "s.onnx", MultiLabel(5), tolerance=10.0)


def test_the_task_names_itself_and_its_output(tmp_path):
    done = export(Student(convnet(), 16), images(6), tmp_path / "s.onnx", task="heatmap", output_name="maps")
    assert OnnxModel(done.path).metadata["task"] == "heatmap"
    assert [o.name for o in onnx.load(done.path).graph.output] == ["maps"]


def test_nan_from_the_file_is_a_difference(tmp_path, free, known_trace, monkeypatch):
    monkeypatch.setattr(OnnxModel, "run", lambda self, pixels: torch.full((len(pixels), 5), float("nan")).numpy())
    with pytest.raises(ParityError, match="differ by inf"):
        export(free.student, images(4), tmp_path / "s.onnx")


def test_a_file_that_does_not_run_is_refused_without_its_temporary_name(tmp_path, free, known_trace, monkeypatch):
    def fails(self, pixels):
        raise WeightsError(f"{self.path} failed on {list(pixels.shape)}")

    monkeypatch.setattr(OnnxModel, "run", fails)
    with pytest.raises(ParityError, match=r"the exported file does not run: it failed on \[1, 3, 16, 16\]"):
        export(free.student, images(4), tmp_path / ".s.onnx.part")


def test_a_student_that_is_not_a_number(tmp_path, free):
    net = convnet()
    broken = Student(net, 16)
    nn.init.constant_(list(net.parameters())[-1], float("nan"))
    with pytest.raises(WeightsError, match="not finite"):
        export(broken, images(3), tmp_path / "s.onnx")


@pytest.mark.parametrize("opset", [0, 17, 999])
def test_an_opset_that_cannot_be_written(tmp_path, free, opset):
    with pytest.raises(KdcliError, match=f"opset {opset}") as caught:
        export(free.student, images(3), tmp_path / "s.onnx", opset=opset)
    assert "--opset 18" in caught.value.hint


class BatchOfTwo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)[:, :5]


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_a_batch_size_that_is_not_free(tmp_path, capfd):
    for net, real in ((BatchOfTwo(), images(8)), (Branches(), images(8))):
        with pytest.raises(KdcliError, match="free batch size") as caught:
            module._trace(net.eval(), real, None, 18, "logits")
        assert "--batch 1" in caught.value.hint
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")  # the exporter's chatter is not the user's


def test_class_names_must_fit(tmp_path, free, known_trace):
    with pytest.raises(KdcliError, match="5 names"):
        export(free.student, images(3), tmp_path / "s.onnx", metadata={"classes": '["a", "b"]'})


@pytest.mark.parametrize("shape", [(0, 3, 16, 16), (3, 16, 16)])
def test_no_images_to_check_on(tmp_path, free, shape):
    with pytest.raises(DataError):
        export(free.student, torch.zeros(shape), tmp_path / "s.onnx")
