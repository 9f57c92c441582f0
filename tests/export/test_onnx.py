"""The exported file answers as the student does, or there is no file."""

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdcli
from kdcli.errors import DataError, KdcliError, ParityError, WeightsError
from kdcli.export import Exported, OnnxModel, export_onnx, onnx as room

CLASSES = ["ant", "bee", "cat", "dog", "élan"]


class Student(nn.Module):
    """Normalises and resizes for itself, as a Member does."""

    def __init__(self, net: nn.Module, size: int, mode: str = "bicubic", antialias: bool = True) -> None:
        super().__init__()
        self.net, self.size, self.mode, self.antialias = net, size, mode, antialias
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-1] != self.size:
            pixels = F.interpolate(pixels, size=(self.size, self.size), mode=self.mode, antialias=self.antialias)
        return self.net((pixels - self.mean) / self.std).float()


def lived(net: nn.Module) -> nn.Module:
    """Norms and biases as after training: an untrained network hides what an export loses."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            assert parameter.isfinite().all(), name
    return net


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return lived(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12), nn.Hardswish(), nn.Dropout(0.5)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
        )
    )


def pictures(n: int, size: int = 16, seed: int = 3) -> Tensor:
    """Smooth coloured pictures, which is nearer to real ones than noise."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(size, size), mode="bilinear")


@dataclass
class Shipped:
    student: Student
    done: Exported
    model: OnnxModel


def ship(folder: Path, net: nn.Module, size: int, **options) -> Shipped:
    student = Student(net, size)
    done = export_onnx(student, pictures(80), folder / "student.onnx", **{"metadata": {}, **options})
    return Shipped(student, done, OnnxModel(done.path))


@pytest.fixture(scope="module")
def free(tmp_path_factory) -> Shipped:
    """A convnet in training mode, in float64, resizing 16 to 24, any batch."""
    metadata = {"classes": json.dumps(CLASSES), "run": "runs/seven", "task": "classify"}
    return ship(tmp_path_factory.mktemp("free"), convnet().double().train(), 24, metadata=metadata)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory) -> Shipped:
    return ship(tmp_path_factory.mktemp("fixed"), convnet(), 12, batch=2)


def answers(student: Student, pixels: Tensor) -> Tensor:
    was = student.training
    with torch.inference_mode():
        out = student.eval()(pixels.to(next(student.parameters()).dtype))
    student.train(was)
    return out


@pytest.mark.parametrize("n", [1, 3, 64])
def test_any_batch_size_answers_like_torch(free, n):
    pixels = pictures(n, seed=9)
    wanted = answers(free.student, pixels)
    assert wanted.std() > 0.05  # or any constant would pass
    torch.testing.assert_close(free.model(pixels), wanted, rtol=1e-4, atol=1e-4)
    assert (free.model.batch, free.done.dynamic, free.done.opset) == (None, True, 18)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_a_fixed_batch_is_met_by_splitting_and_padding(fixed, n):
    pixels = pictures(n + 1, seed=9)[:n]
    torch.testing.assert_close(fixed.model(pixels), answers(fixed.student, pixels), rtol=1e-4, atol=1e-4)
    assert (fixed.model.batch, fixed.done.dynamic) == (2, False)


def test_the_original_is_untouched(free):
    assert free.student.training
    assert all(module.training for module in free.student.modules())
    assert {p.dtype for p in free.student.net.parameters()} == {torch.float64}
    assert all(p.grad is None and p.requires_grad for p in free.student.parameters())


def test_what_was_checked_is_told(free):
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


def test_one_file_and_nothing_beside_it(free, fixed):
    for shipped in (free, fixed):
        assert [p.name for p in shipped.done.path.parent.iterdir()] == ["student.onnx"]


def test_a_run_that_allowed_bfloat16_is_checked_in_float32(tmp_path, free, known_trace, monkeypatch):
    mkldnn: Any = torch.backends.mkldnn
    conv, matmul = mkldnn.conv, mkldnn.matmul
    before = (conv.fp32_precision, matmul.fp32_precision)
    try:
        conv.fp32_precision = matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            done = export_onnx(free.student, pictures(6), tmp_path / "s.onnx", metadata={})
        assert done.max_difference < 1e-5
        assert (conv.fp32_precision, matmul.fp32_precision) == ("bf16", "bf16")
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def test_metadata_round_trip(free, fixed):
    told = free.model.metadata
    assert free.model.classes == CLASSES
    assert told["run"] == "runs/seven"
    assert (told["image_size"], told["kdcli_version"], told["task"]) == ("16", kdcli.__version__, "classify")
    assert (free.model.input_size, free.model.num_classes) == (16, 5)
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
    net = lived(timm.create_model(name, img_size=16, num_classes=5, **options))
    shipped = ship(tmp_path, net, 16)
    assert shipped.done.agreement == 100
    pixels = pictures(5, seed=9)
    torch.testing.assert_close(shipped.model(pixels), answers(shipped.student, pixels), rtol=1e-3, atol=1e-4)


def test_an_older_exporters_antialiasing_is_put_right():
    """What onnxscript wrote before it followed torch: edges counted in, bicubic with a = -0.75."""
    node = onnx.helper.make_node("Resize", ["x", "", "", "s"], ["y"], mode="cubic", antialias=1, cubic_coeff_a=-0.75)
    plain = onnx.helper.make_node("Resize", ["y", "", "", "s"], ["z"], mode="cubic", antialias=0, cubic_coeff_a=-0.75)
    proto = onnx.helper.make_model(onnx.helper.make_graph([node, plain], "g", [], []))
    room._as_torch_resizes(proto)
    first, second = ({a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in proto.graph.node)
    assert (first["exclude_outside"], first["cubic_coeff_a"], first["mode"]) == (1, -0.5, b"cubic")
    assert second["cubic_coeff_a"] == -0.75
    assert "exclude_outside" not in second


@pytest.fixture
def known_trace(free, monkeypatch):
    """Exports of the fixture's student without tracing it again."""
    proto = onnx.load(free.done.path)
    monkeypatch.setattr(room, "_trace", lambda *_: proto)


def test_a_file_that_answers_otherwise_is_not_kept(tmp_path, free, known_trace, monkeypatch):
    path = tmp_path / "student.onnx"
    path.write_bytes(b"older")
    true = OnnxModel.run

    def wrong(self, pixels):
        out = true(self, pixels).copy()
        if len(out) == 79 - 16:  # the second call: all real images but the first
            out[2] += 0.5
        return out

    monkeypatch.setattr(OnnxModel, "run", wrong)
    with pytest.raises(ParityError, match=r"differ by .*wrong on real image 4") as caught:
        export_onnx(free.student, pictures(80), path, metadata={})
    assert caught.value.exit_code == 5
    assert caught.value.hint
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_small_difference_that_changes_the_answer_is_refused(tmp_path, free, known_trace, monkeypatch):
    def turned(self, pixels):
        return answers(free.student, torch.from_numpy(pixels)).roll(1, 1).numpy()

    monkeypatch.setattr(OnnxModel, "run", turned)
    with pytest.raises(ParityError, match="top-1 differs on 64 of 64"):
        export_onnx(free.student, pictures(64), tmp_path / "s.onnx", metadata={}, tolerance=10.0)
    assert not list(tmp_path.iterdir())


def test_nan_from_the_file_is_a_difference(tmp_path, free, known_trace, monkeypatch):
    monkeypatch.setattr(OnnxModel, "run", lambda self, pixels: torch.full((len(pixels), 5), float("nan")).numpy())
    with pytest.raises(ParityError, match="differ by inf"):
        export_onnx(free.student, pictures(4), tmp_path / "s.onnx", metadata={})
    assert not list(tmp_path.iterdir())


def test_a_good_file_replaces_an_older_one(tmp_path, free, known_trace):
    path = tmp_path / "new" / "s.onnx"
    path.parent.mkdir()
    path.write_bytes(b"older")
    done = export_onnx(free.student, pictures(3), path, metadata={})
    assert done.checked_on == 3 + 8
    assert OnnxModel(path).num_classes == 5


def test_a_full_disk(tmp_path, free, known_trace, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(room.os, "fsync", full)
    with pytest.raises(KdcliError, match="No space left") as caught:
        export_onnx(free.student, pictures(3), tmp_path / "s.onnx", metadata={})
    assert "space" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path, free):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "s.onnx", tmp_path):
        with pytest.raises(KdcliError, match="cannot write"):
            export_onnx(free.student, pictures(3), path, metadata={})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_student_that_is_not_a_number(tmp_path, free):
    net = convnet()
    broken = Student(net, 16)
    nn.init.constant_(list(net.parameters())[-1], float("nan"))
    with pytest.raises(WeightsError, match="not finite"):
        export_onnx(broken, pictures(3), tmp_path / "s.onnx", metadata={})


@pytest.mark.parametrize("opset", [0, 17, 999])
def test_an_opset_that_cannot_be_written(tmp_path, free, opset):
    with pytest.raises(KdcliError, match=f"opset {opset}") as caught:
        export_onnx(free.student, pictures(3), tmp_path / "s.onnx", metadata={}, opset=opset)
    assert "--opset 18" in caught.value.hint
    assert not list(tmp_path.iterdir())


class BatchOfTwo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)[:, :5]


class Asks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_a_batch_size_that_is_not_free(tmp_path, capfd):
    for net, real in ((BatchOfTwo(), pictures(8)), (Asks(), pictures(8))):
        with pytest.raises(KdcliError, match="free batch size") as caught:
            room._trace(net.eval(), real, None, 18)
        assert "--batch 1" in caught.value.hint
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")  # the exporter's chatter is not the user's


def test_class_names_must_fit(tmp_path, free, known_trace):
    with pytest.raises(KdcliError, match="5 names"):
        export_onnx(free.student, pictures(3), tmp_path / "s.onnx", metadata={"classes": '["a", "b"]'})


@pytest.mark.parametrize("shape", [(0, 3, 16, 16), (2, 3, 16, 12), (3, 16, 16)])
def test_no_pictures_to_check_on(tmp_path, free, shape):
    with pytest.raises(DataError):
        export_onnx(free.student, torch.zeros(shape), tmp_path / "s.onnx", metadata={})


def test_files_that_are_no_model(tmp_path, free):
    (tmp_path / "cut.onnx").write_bytes(free.done.path.read_bytes()[:3000])
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("hello")
    for name in ("cut.onnx", "empty.onnx", "text.onnx", "absent.onnx"):
        with pytest.raises(WeightsError, match=name) as caught:
            OnnxModel(tmp_path / name)
        assert "kdcli export --onnx" in caught.value.hint
        assert caught.value.exit_code == 3


def foreign(path: Path, inputs: dict[str, list], outputs: dict[str, list], kind=onnx.TensorProto.FLOAT) -> Path:
    """A file whose every output is its first input's picture means, by no way kdcli would write it."""
    nodes = [
        onnx.helper.make_node("ReduceMean", [next(iter(inputs)), "axes"], [name], keepdims=int(len(shape) == 4))
        for name, shape in outputs.items()
    ]
    axes = onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [2, 3])
    took, gave = ([onnx.helper.make_tensor_value_info(n, kind, s) for n, s in x.items()] for x in (inputs, outputs))
    graph = onnx.helper.make_graph(nodes, "g", took, gave, [axes])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), path)
    return path


NCHW, NK = ["n", 3, 8, 8], ["n", 3]


@pytest.mark.parametrize(
    ("inputs", "outputs", "kind", "match"),
    [
        ({"a": NCHW, "b": NCHW}, {"y": NK}, onnx.TensorProto.FLOAT, "its input is"),
        ({"a": ["n", 8, 8, 3]}, {"y": ["n", 8]}, onnx.TensorProto.FLOAT, "its input is"),
        ({"a": NCHW}, {"y": NK}, onnx.TensorProto.DOUBLE, "its input is"),
        ({"a": NCHW}, {"y": NK, "z": NK}, onnx.TensorProto.FLOAT, "its output is"),
        ({"a": NCHW}, {"y": ["n", 3, 1, 1]}, onnx.TensorProto.FLOAT, "its output is"),
        ({"a": ["n", 3, "h", "w"]}, {"y": NK}, onnx.TensorProto.FLOAT, "square size"),
        ({"a": ["n", 3, 8, 9]}, {"y": NK}, onnx.TensorProto.FLOAT, "square size"),
    ],
)
def test_foreign_files_are_refused(tmp_path, inputs, outputs, kind, match):
    with pytest.raises(WeightsError, match=match) as caught:
        OnnxModel(foreign(tmp_path / "f.onnx", inputs, outputs, kind))
    assert caught.value.hint


def test_a_foreign_file_that_fits_is_read(tmp_path):
    model = OnnxModel(foreign(tmp_path / "f.onnx", {"image": NCHW}, {"scores": ["n", "k"]}))
    assert (model.num_classes, model.input_size, model.classes) == (3, 8, None)
    pixels = pictures(4, 8)
    torch.testing.assert_close(model(pixels), pixels.mean((2, 3)))


def test_pictures_of_another_size(free):
    with pytest.raises(DataError, match=r"\[B,3,16,16\]"):
        free.model(pictures(2, 12))


def test_threads_and_providers(free):
    model = OnnxModel(free.done.path, threads=2)
    assert model.threads == model.session.get_session_options().intra_op_num_threads == 2
    assert model.provider == "CPUExecutionProvider"
    with pytest.raises(KdcliError, match="threads"):
        OnnxModel(free.done.path, threads=0)
    with pytest.raises(KdcliError, match="NoSuchProvider"):
        OnnxModel(free.done.path, providers=["NoSuchProvider"])
