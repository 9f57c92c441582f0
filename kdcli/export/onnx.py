"""The student as one ONNX file, proved against torch before it has its name; and such a file as a model.

Above 300 lines because the contract of a file (names, shapes, metadata) is written and read in one place.
"""

import contextlib
import copy
import errno
import io
import json
import logging
import os
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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

INPUT, OUTPUT, BATCH = "pixels", "logits", "batch"
OPSET = 18  # the oldest that torch's exporter writes by itself, so the one most devices read
REAL, RANDOM = 64, 8  # images that the check looks at, at most
TIE = 2e-5  # two logits this near, relative to the logits' scale, are one answer in float32
LARGEST = 2**31 - 1  # bytes: protobuf's limit for one file
QUIET = 4  # onnxruntime logs only what is fatal; everything else arrives as an exception
DIFFERS = (
    "The exported file does not answer as the student does, so it was not kept. Try another `--opset`, or `--batch 1`."
)


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked."""

    path: Path
    size: int  # bytes
    opset: int
    dynamic: bool  # takes any batch size
    max_difference: float  # largest |onnx - torch| over the largest |torch logit|
    agreement: float  # percent of the real images with the same top-1, ties counted as the same
    checked_on: int  # images, real and random


def export_onnx(
    member: nn.Module,
    real: Float[Tensor, "N 3 S S"],
    path: Path,
    *,
    batch: int | None = None,
    opset: int = OPSET,
    metadata: dict[str, str],
    tolerance: float = 1e-4,
) -> Exported:
    """Write `member` (pixels [B,3,S,S] in [0,1] in, logits [B,K] out) to `path` as one ONNX file that was checked.

    The file's input is `pixels`, of the size of `real`, its output `logits`; `batch` fixes the batch size, None
    leaves it free. onnxruntime must answer like torch on up to 64 of the `real` images, evenly spread, and on 8
    random ones: largest difference at most `tolerance` times the largest logit, and the same top-1 on the real ones
    where torch's two logits are not a tie. `metadata` goes into the file's metadata_props (`classes` as a JSON list
    of K names), with `image_size`, `kdcli_version`, `task` and `input` added where missing. `member` is not touched:
    a float32 copy on the CPU in eval mode is exported. The final name appears only after the check; until then, and
    when anything fails, a file that was there stays as it was.

    Raises ParityError (exit 5) when the file answers otherwise, WeightsError (exit 3) when the student's own logits
    are not finite, DataError (exit 3) when `real` is no batch of square pictures, and KdcliError (exit 2) for an
    opset that cannot be written, a network that cannot be traced, a batch size that is not free, a folder that
    cannot be written or a full disk.
    """
    path = Path(path)
    if real.ndim != 4 or not len(real) or not real.is_floating_point() or real.shape[2] != real.shape[3]:
        raise DataError(
            f"export checks the file on real pictures [N,3,S,S] of floats, given {list(real.shape)} {real.dtype}",
            hint="Give at least one picture of the size the file is for.",
        )
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        raise KdcliError(
            f"opset {opset}: unknown; the installed onnx knows up to {newest}", hint=f"Try `--opset {OPSET}`."
        )
    if batch is not None and batch < 1:
        raise KdcliError(f"batch {batch}: not a batch size", hint="Give 1 or more, or leave it out for any batch size.")

    chosen = torch.linspace(0, len(real) - 1, min(REAL, len(real))).round().long().tolist()
    pixels = real.detach()[chosen].to("cpu", torch.float32)
    student = copy.deepcopy(getattr(member, "_orig_mod", member)).to("cpu", torch.float32).eval()
    with _temporary(path) as part:  # first, since a folder that cannot be written should not cost a trace
        noise = torch.rand(RANDOM, *pixels.shape[1:], generator=torch.Generator().manual_seed(0))
        wanted = _logits(student, torch.cat([pixels, noise]))
        proto = _trace(student, pixels, batch, opset)
        _describe(proto, metadata)
        _write(proto, part, path)
        try:
            difference, agreement = _check(part, pixels, chosen, noise, wanted, tolerance)
        except WeightsError as error:
            if opset > OPSET and "opset" in error.message.lower():
                message = f"opset {opset}: newer than the installed onnxruntime {onnxruntime.__version__} reads"
                raise KdcliError(message, hint=f"Try `--opset {OPSET}`.") from None
            why = error.message.replace(str(part), str(path))
            raise ParityError(f"the exported file does not run: {why}", hint=DIFFERS) from None
        size = part.stat().st_size
        with _disk(path):
            os.replace(part, path)
    return Exported(path, size, opset, batch is None, difference, agreement, len(wanted))


def _logits(student: nn.Module, images: Tensor) -> Tensor:
    """torch's answer [B,K]: exact float32, 16 images at a time. Raises WeightsError when it is not finite."""
    with _exact(), torch.inference_mode():
        logits = torch.cat([student(part) for part in images.split(16)])
    if logits.ndim != 2 or len(logits) != len(images):
        message = f"the student answers {len(images)} pictures with {list(logits.shape)}, not logits [{len(images)},K]"
        raise KdcliError(message, hint="Export a classifier that takes any number of pictures.")
    if not logits.isfinite().all():
        raise WeightsError(
            "the student's own logits are not finite", hint="Its training diverged: export an earlier epoch."
        )
    return logits.float()


def _trace(student: nn.Module, pixels: Tensor, batch: int | None, opset: int) -> onnx.ModelProto:
    """The student's graph. Raises KdcliError with the first line of what torch said."""
    example = pixels[torch.arange(2 if batch is None else batch) % len(pixels)]
    shapes = ({0: torch.export.Dim(BATCH, min=1)},) if batch is None else None
    free = " with a free batch size" if batch is None else ""
    cure = (
        "`--batch 1` writes a file for one picture per call, which most networks allow."
        if batch is None
        else "torch.export must be able to trace its forward: no branch on the pixels' values, no numpy."
    )
    # a tensor `mean` would share its name with the operator's output (pytorch issue 168211); `student.mean` cannot
    whole = nn.Sequential(OrderedDict(student=student)).eval()
    try:
        with _hushed(), torch.no_grad():
            program = torch.onnx.export(
                whole,
                (example,),
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                external_data=False,
                verbose=False,
            )
            assert program is not None
            proto = program.model_proto
            _as_torch_resizes(proto)
            _forget_sources(proto)
            if proto.ByteSize() <= LARGEST:
                onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # torch.export raises whatever the network's code raised
        if opset != OPSET:  # a conversion that fails says so in as many ways
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
    # a network that reshapes to the traced batch size still has a free input, and only its output tells
    if batch is None and not all(
        v.type.tensor_type.shape.dim[0].dim_param for v in (proto.graph.input[0], proto.graph.output[0])
    ):
        raise KdcliError(
            "the student cannot be traced with a free batch size: it fixes the batch size itself", hint=cure
        )
    return proto


def _as_torch_resizes(proto: onnx.ModelProto) -> None:
    """Antialiased Resize as torch computes it: weights outside the picture dropped, bicubic with a = -0.5.

    onnxscript before mid-2026 wrote neither (pytorch issues 177138 and 183546); with a newer one this changes nothing.
    """
    for node in proto.graph.node:
        attributes = {a.name: a for a in node.attribute}
        if node.op_type == "Resize" and "antialias" in attributes and attributes["antialias"].i:
            attributes = [a for a in node.attribute if a.name not in ("exclude_outside", "cubic_coeff_a")]
            del node.attribute[:]
            node.attribute.extend(attributes)
            node.attribute.append(onnx.helper.make_attribute("exclude_outside", 1))
            node.attribute.append(onnx.helper.make_attribute("cubic_coeff_a", -0.5))


def _forget_sources(proto: onnx.ModelProto) -> None:
    """Drop the exporter's notes: stack traces with this machine's paths, up to a third of a small file."""
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


def _describe(proto: onnx.ModelProto, metadata: dict[str, str]) -> None:
    """Write the metadata; class names must be as many as the logits."""
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    classes = proto.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    told = {
        "task": "classify",
        "input": "RGB, NCHW, float32 in [0, 1]; normalised inside",
        "image_size": str(shape[-1].dim_value),
        "kdcli_version": kdcli.__version__,
        **{key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()},
    }
    if "classes" in told and len(_class_names(told["classes"]) or ()) != classes:
        raise KdcliError(
            f"the metadata's `classes` is no JSON list of {classes} names, which is how many logits the student has",
            hint="The data set's class names and the student's class count must belong together.",
        )
    onnx.helper.set_model_props(proto, told)
    proto.producer_name, proto.producer_version = "kdcli", kdcli.__version__


def _write(proto: onnx.ModelProto, part: Path, path: Path) -> None:
    with _disk(path), part.open("wb") as file:
        file.write(proto.SerializeToString())
        file.flush()
        os.fsync(file.fileno())


def _check(
    part: Path, pixels: Tensor, names: list[int], noise: Tensor, wanted: Tensor, tolerance: float
) -> tuple[float, float]:
    """(relative difference, top-1 agreement in percent), or ParityError. `names` index the real images."""
    model = OnnxModel(part)
    # three batch sizes: a batch size that only seemed to be free shows here
    given = torch.cat([model(pixels[:1]), model(pixels[1:]), model(noise)])

    scale = max(wanted.abs().max().item(), 1e-12)
    apart = (given - wanted).abs().amax(1).nan_to_num(nan=float("inf")) / scale
    real, worst = len(pixels), apart.max().item()
    top, other = wanted[:real].argmax(1), given[:real].argmax(1)
    gap = wanted[:real].gather(1, top[:, None]) - wanted[:real].gather(1, other[:, None])
    same = gap[:, 0] <= TIE * scale
    if worst > tolerance or not same.all():
        wrong = apart > tolerance
        wrong[:real] |= ~same
        where = [
            f"real image {names[i]}" if i < real else f"random image {i - real}" for i in wrong.nonzero()[:, 0].tolist()
        ]
        listed = ", ".join(where[:8]) + (f" and {len(where) - 8} more" if len(where) > 8 else "")
        raise ParityError(
            f"onnxruntime and torch differ by {worst:.2g} of the largest logit ({worst * scale:.3g} of {scale:.3g}; "
            f"allowed {tolerance:g}), top-1 differs on {(~same).sum().item()} of {real} real images; wrong on {listed}",
            hint=DIFFERS,
        )
    return worst, 100 * same.float().mean().item()


class OnnxModel:
    """An exported file as a model: `model(pixels [B,3,S,S] float in [0,1]) -> logits [B,K] float32`.

    `threads` within one operator (default: as many as torch uses); `providers` are onnxruntime's, default the CPU.
    Raises WeightsError (exit 3) when the file is missing, broken, no ONNX, or does not take one float32 NCHW input
    of a known square size and give one [B,K] output.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, providers: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise KdcliError(f"threads {threads}: not a number of threads", hint="Give 1 or more.")
        self.session = _session(self.path, self.threads, list(providers or ["CPUExecutionProvider"]))
        self.provider: str = self.session.get_providers()[0]
        self.size: int = self.path.stat().st_size  # bytes
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        self.classes: list[str] | None = _class_names(self.metadata.get("classes", ""))

        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if (
            len(inputs) != 1
            or inputs[0].type != "tensor(float)"
            or len(inputs[0].shape) != 4
            or inputs[0].shape[1] != 3
        ):
            has = "; ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise self._foreign(f"its input is {has or 'nothing'}, not one float32 [batch,3,size,size]")
        if len(outputs) != 1 or len(outputs[0].shape) != 2:
            has = "; ".join(f"{o.name} {o.shape}" for o in outputs)
            raise self._foreign(f"its output is {has}, not one [batch,classes]")
        self.input_name: str = inputs[0].name
        first, _, height, width = inputs[0].shape
        told = self.metadata.get("image_size", "")
        height, width = (s if isinstance(s, int) else int(told) if told.isdecimal() else None for s in (height, width))
        if height is None or height != width:
            raise self._foreign(
                f"its input {inputs[0].shape} has no fixed square size, nor does its metadata's image_size say one"
            )
        self.input_size: int = height
        self.batch: int | None = first if isinstance(first, int) else None
        classes = outputs[0].shape[1]
        if not isinstance(classes, int):  # a foreign file may leave it open: ask it
            classes = self.run(np.zeros((self.batch or 1, 3, height, height), np.float32)).shape[1]
        self.num_classes: int = classes

    def _foreign(self, why: str) -> WeightsError:
        return WeightsError(
            f"{self.path} is not a model kdcli can read: {why}", hint="`kdcli export --onnx` writes one that is."
        )

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """onnxruntime alone: float32 [B,3,S,S], contiguous, B the file's batch where it has one -> [B,K]."""
        try:
            return np.asarray(self.session.run(None, {self.input_name: pixels})[0])
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise WeightsError(
                f"{self.path} failed on {list(pixels.shape)}: {_first_line(error)}",
                hint="`kdcli export --onnx` writes it anew; `--batch 1` where a free batch size is the trouble.",
            ) from error

    def __call__(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B K"]:
        """Logits, float32, on the pixels' device. A fixed batch is met by splitting, and padding the last part.

        Raises DataError when the pictures are not of the file's size.
        """
        size = self.input_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise DataError(
                f"{self.path} takes pictures [B,3,{size},{size}], given {list(pixels.shape)}",
                hint=f"Read the data at that size (`--set data.image_size={size}`), or export for the data's own.",
            )
        if not len(pixels):
            return torch.empty(0, self.num_classes, device=pixels.device)
        array = np.ascontiguousarray(pixels.detach().to("cpu", torch.float32).numpy())
        step = self.batch or len(array)
        out = []
        for start in range(0, len(array), step):
            part = array[start : start + step]
            missing = step - len(part)
            padded = np.concatenate([part, np.zeros((missing, *part.shape[1:]), np.float32)]) if missing else part
            logits = self.run(padded)
            if len(logits) != step:
                raise self._foreign(f"it gave {len(logits)} answers to {step} pictures")
            out.append(logits[: len(part)])
        return torch.from_numpy(np.concatenate(out)).to(pixels.device, torch.float32)


def _session(path: Path, threads: int, providers: list[str]) -> onnxruntime.InferenceSession:
    """A session with its thread count set and its log quiet, or WeightsError."""
    missing = set(providers) - set(onnxruntime.get_available_providers())
    if missing:  # onnxruntime itself would print a banner and use the CPU
        has = ", ".join(onnxruntime.get_available_providers())
        raise KdcliError(f"this onnxruntime has no {', '.join(sorted(missing))}", hint=f"It has: {has}.")
    if not path.is_file():
        raise WeightsError(f"{path}: no such file", hint="`kdcli export --onnx` writes one.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = QUIET
    # threads that spin after a call would take the cores from the session that is timed next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise WeightsError(
            f"{path} is broken or no ONNX file: {_first_line(error)}", hint="`kdcli export --onnx` writes it anew."
        ) from error


def _class_names(text: str) -> list[str] | None:
    """A JSON list of names, or None for anything else."""
    with contextlib.suppress(ValueError):
        names = json.loads(text)
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    return None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _reason(error: BaseException) -> str:
    """What lies under the exporter's own wrapping, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_first_line(error)}"


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name in `path`'s folder, created empty now and gone after, unless it was renamed."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with _disk(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            part.touch(exist_ok=False)
        yield part
    finally:
        with contextlib.suppress(OSError):  # renamed by now, or its folder never was
            part.unlink()


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """The disk's refusals as DataError."""
    try:
        yield
    except OSError as error:
        cure = (
            "Free some space, or write elsewhere."
            if error.errno == errno.ENOSPC
            else "Choose a place you can write to."
        )
        raise DataError(
            f"cannot write {path}: {error.strerror or error}", hint=f"{cure} `--file` says where."
        ) from error


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """torch's float32 as float32: autocast off, no bfloat16 products, whatever the run before chose."""
    # the legacy torch.get_float32_matmul_precision raises once anything has used these
    mkldnn: Any = torch.backends.mkldnn
    kinds = (mkldnn.matmul, mkldnn.conv)
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Nothing of what torch.onnx, torch.export and onnxscript print, warn or log."""
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
