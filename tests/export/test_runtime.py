"""A file on disk as a model: what is read from it, and what is refused."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from export_kit import CLASSES, Student, convnet, export, images

from kdcli.errors import DataError, KdcliError, WeightsError
from kdcli.export.runtime import OnnxModel


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A checked file for images of 16 pixels and five classes."""
    path = tmp_path_factory.mktemp("file") / "student.onnx"
    return export(Student(convnet(), 16), images(8), path, metadata={"classes": json.dumps(CLASSES)}).path


def test_files_that_are_not_models(tmp_path, file):
    (tmp_path / "cut.onnx").write_bytes(file.read_bytes()[:3000])
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("hello")
    for name in ("cut.onnx", "empty.onnx", "text.onnx", "absent.onnx"):
        with pytest.raises(WeightsError, match=name) as caught:
            OnnxModel(tmp_path / name)
        assert "kdcli export --onnx" in caught.value.hint
        assert caught.value.exit_code == 3


def foreign(
    path: Path, inputs: dict[str, list], outputs: dict[str, list], kind=onnx.TensorProto.FLOAT, **metadata: str
) -> Path:
    """A file that another exporter could have written: each channel's mean as every output."""
    nodes = [
        onnx.helper.make_node("ReduceMean", [next(iter(inputs)), "axes"], [name], keepdims=int(len(shape) == 4))
        for name, shape in outputs.items()
    ]
    axes = onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [2, 3])
    took, gave = ([onnx.helper.make_tensor_value_info(n, kind, s) for n, s in x.items()] for x in (inputs, outputs))
    graph = onnx.helper.make_graph(nodes, "g", took, gave, [axes])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, path)
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
        ({"a": ["n", 3, "h", "w"]}, {"y": NK}, onnx.TensorProto.FLOAT, "no fixed size"),
        ({"a": ["n", 3, 8, "w"]}, {"y": NK}, onnx.TensorProto.FLOAT, "no fixed size"),
    ],
)
def test_foreign_files_are_refused(tmp_path, inputs, outputs, kind, match):
    with pytest.raises(WeightsError, match=match) as caught:
        OnnxModel(foreign(tmp_path / "f.onnx", inputs, outputs, kind))
    assert caught.value.hint


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_a_foreign_file_that_fits_is_read(tmp_path, size):
    model = OnnxModel(foreign(tmp_path / "f.onnx", {"image": ["n", 3, *size]}, {"scores": ["n", "k"]}))
    assert (model.num_classes, model.input_size, model.classes) == (3, size, None)
    pixels = images(4, size)
    torch.testing.assert_close(model(pixels), pixels.mean((2, 3)))


@pytest.mark.parametrize(
    ("text", "size"), [("8", (8, 8)), ("8x12", (8, 12)), ("8x", None), ("8x12x3", None), ("", None), ("wide", None)]
)
def test_the_size_of_a_file_that_takes_any_is_in_its_metadata(tmp_path, text, size):
    """One number, as files of earlier versions have it, is a square."""
    path = foreign(tmp_path / "f.onnx", {"image": ["n", 3, "h", "w"]}, {"scores": NK}, image_size=text)
    if size is None:
        with pytest.raises(WeightsError, match="no fixed size"):
            OnnxModel(path)
    else:
        assert OnnxModel(path).input_size == size


def test_images_of_another_size(file):
    with pytest.raises(DataError, match=r"\[B,3,16,16\]") as caught:
        OnnxModel(file)(images(2, 12))
    assert "data.image_size=16" in caught.value.hint


def test_threads_and_providers(file):
    model = OnnxModel(file, threads=2)
    assert model.threads == model.session.get_session_options().intra_op_num_threads == 2
    assert model.provider == "CPUExecutionProvider"
    with pytest.raises(KdcliError, match="threads"):
        OnnxModel(file, threads=0)
    with pytest.raises(KdcliError, match="NoSuchProvider"):
        OnnxModel(file, providers=["NoSuchProvider"])
