"""A network as one ONNX file: traced, described in the file's metadata, and checked against torch in onnxruntime."""

import contextlib
import copy
import io
import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx.checker
import onnx.defs
import onnx.helper
import onnxruntime
import torch
from jaxtyping import Float
from torch import Tensor, nn

import kdcli
from kdcli.errors import DataError, KdcliError, ParityError, WeightsError
from kdcli.export import parity
from kdcli.export.base import Exported, Same
from kdcli.export.runtime import OnnxModel, class_names, first_line

INPUT, BATCH = "pixels", "batch"
OPSET = 18  # the oldest that torch's exporter writes by itself, so the one most devices read
LARGEST = 2**31 - 1  # bytes: protobuf's limit for one file


def export_onnx(
    network: nn.Module,
    real: Float[Tensor, "N 3 H W"],
    path: Path,
    *,
    task: str,
    output_name: str,
    same: Same,
    metadata: Mapping[str, str],
    batch: int | None = None,
    opset: int = OPSET,
    tolerance: float = 1e-4,
) -> Exported:
    """Write `network` (images [B,3,H,W] in [0,1] -> outputs [B,K]) to `path` as one ONNX file, and check it.

    The file's input is `pixels`, of the size of `real`, its output `output_name`; `batch` fixes the batch size, None
    leaves it free. onnxruntime must answer like torch on the `real` images and on 8 random ones: largest difference at
    most `tolerance` times the largest output, and on the real ones the `same` answer, except where the answer in torch
    is a tie. `metadata` goes into the file's metadata_props (`classes` as a JSON list of K names) with `task`, `input`,
    `image_size` (`256x192`, height first; one number for a square) and `kdcli_version`. `network` is not changed: a
    float32 copy on the CPU in eval mode is exported.

    `path` is created first and may be left incomplete: the caller gives a temporary name, and the final one only on
    success (`system.files.write_atomic`).

    Raises ParityError (exit 5) when the file answers differently, WeightsError (exit 3) when the network's own outputs
    are not finite, DataError (exit 3) when `real` is not a batch of images, OSError when the disk refuses, and
    KdcliError (exit 2) for an opset that cannot be written, a network that cannot be traced or a batch size that is not
    free.
    """
    if real.ndim != 4 or not len(real) or not real.is_floating_point():
        raise DataError(
            f"export checks the file on real images [N,3,H,W] of floats, given {list(real.shape)} {real.dtype}",
            hint="Give at least one image of the size that the file is for.",
        )
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        raise KdcliError(
            f"opset {opset}: unknown; the installed onnx knows up to {newest}", hint=f"Try `--opset {OPSET}`."
        )
    if batch is not None and batch < 1:
        raise KdcliError(f"batch {batch}: too small", hint="Give 1 or more, or leave it out for any batch size.")

    path.touch()  # a folder that cannot be written should not cost a trace
    real = real.detach().to("cpu", torch.float32)
    random = parity.noise(real)
    student = copy.deepcopy(getattr(network, "_orig_mod", network)).to("cpu", torch.float32).eval()
    wanted = parity.outputs(student, torch.cat([real, random]))
    proto = _trace(student, real, batch, opset, output_name)
    _describe(proto, {**metadata, "task": task}, (real.shape[2], real.shape[3]))
    path.write_bytes(proto.SerializeToString())
    try:
        difference, agreement = parity.compare(OnnxModel(path), real, random, wanted, same, tolerance)
    except WeightsError as error:
        if opset > OPSET and "opset" in error.message.lower():
            message = f"opset {opset}: newer than the installed onnxruntime {onnxruntime.__version__} reads"
            raise KdcliError(message, hint=f"Try `--opset {OPSET}`.") from None
        why = error.message.replace(str(path), "it")  # the name is a temporary one
        raise ParityError(f"the exported file does not run: {why}", hint=parity.DIFFERS) from None
    return Exported(path, path.stat().st_size, opset, batch is None, difference, agreement, len(wanted))


def _trace(student: nn.Module, real: Tensor, batch: int | None, opset: int, output_name: str) -> onnx.ModelProto:
    """The student's graph. Raises KdcliError with the first line of torch's message."""
    example = real[torch.arange(2 if batch is None else batch) % len(real)]
    shapes = ({0: torch.export.Dim(BATCH, min=1)},) if batch is None else None
    free = " with a free batch size" if batch is None else ""
    cure = (
        "`--batch 1` writes a file for one image per call, which most networks allow."
        if batch is None
        else "torch.export must be able to trace its forward: no branch on the images' values, no numpy."
    )
    # a tensor `mean` would share its name with the operator's output (pytorch issue 168211); `student.mean` cannot
    whole = nn.Sequential(OrderedDict(student=student)).eval()
    try:
        with _silent(), torch.no_grad():
            program = torch.onnx.export(
                whole,
                (example,),
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[output_name],
                external_data=False,
                verbose=False,
            )
            assert program is not None
            proto = program.model_proto
            _as_torch_resizes(proto)
            _drop_sources(proto)
            if proto.ByteSize() <= LARGEST:
                onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # torch.export raises whatever the network's code raised
        if opset != OPSET:  # the conversion to another opset fails with as many kinds of errors
            free, cure = f"{free} as opset {opset}", f"Try `--opset {OPSET}`. {cure}"
        raise KdcliError(f"the student cannot be traced{free}: {_reason(error)}", hint=cure) from error
    if proto.ByteSize() > LARGEST:
        size = f"{proto.ByteSize() / 2**30:.1f} GiB"
        raise KdcliError(f"the student is {size}: one ONNX file holds 2 GiB", hint="Export a smaller student.")
    # torch's exporter keeps opset 18, with no more than a warning, where it cannot convert
    written = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    if written != opset:
        raise KdcliError(
            f"opset {opset}: this network could only be written as opset {written}", hint=f"Try `--opset {written}`."
        )
    # a network that reshapes to the traced batch size has a free input all the same: its output shows it
    if batch is None and not all(
        v.type.tensor_type.shape.dim[0].dim_param for v in (proto.graph.input[0], proto.graph.output[0])
    ):
        raise KdcliError(
            "the student cannot be traced with a free batch size: it fixes the batch size itself", hint=cure
        )
    return proto


def _as_torch_resizes(proto: onnx.ModelProto) -> None:
    """Antialiased Resize as torch computes it: weights outside the image dropped, bicubic with a = -0.5.

    onnxscript before mid-2026 writes neither (pytorch issues 177138 and 183546); with a newer one this changes nothing.
    """
    for node in proto.graph.node:
        attributes = {a.name: a for a in node.attribute}
        if node.op_type == "Resize" and "antialias" in attributes and attributes["antialias"].i:
            attributes = [a for a in node.attribute if a.name not in ("exclude_outside", "cubic_coeff_a")]
            del node.attribute[:]
            node.attribute.extend(attributes)
            node.attribute.append(onnx.helper.make_attribute("exclude_outside", 1))
            node.attribute.append(onnx.helper.make_attribute("cubic_coeff_a", -0.5))


def _drop_sources(proto: onnx.ModelProto) -> None:
    """Drop the exporter's notes: stack traces with paths of this machine, up to a third of a small file."""
    graph = proto.graph
    for part in (
        graph,
        *graph.node,
        *graph.initializer,
        *graph.value_info,
        *graph.input,
        *graph.output,
        *proto.functions,
    ):
        del part.metadata_props[:]
        part.doc_string = ""
    for function in proto.functions:
        for node in function.node:
            del node.metadata_props[:]
            node.doc_string = ""


def _describe(proto: onnx.ModelProto, metadata: dict[str, str], size: tuple[int, int]) -> None:
    """Write the metadata. Raises KdcliError when there are not as many class names as outputs."""
    classes = proto.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    height, width = size
    facts = {
        "input": "RGB, NCHW, float32 in [0, 1]; normalised inside",
        "image_size": str(height) if height == width else f"{height}x{width}",
        "kdcli_version": kdcli.__version__,
        **metadata,
    }
    if "classes" in facts and len(class_names(facts["classes"]) or ()) != classes:
        raise KdcliError(
            f"the metadata's `classes` is not a JSON list of {classes} names, one for each output of the student",
            hint="Export with the class names of the data that the student was trained on.",
        )
    onnx.helper.set_model_props(proto, facts)
    proto.producer_name, proto.producer_version = "kdcli", kdcli.__version__


def _reason(error: BaseException) -> str:
    """The error that the exporter wrapped in its own, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress what torch.onnx, torch.export and onnxscript print, warn and log."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
