"""An exported ONNX file as a model, in onnxruntime."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from jaxtyping import Float
from torch import Tensor

from kdcli.errors import DataError, KdcliError, WeightsError

FATAL = 4  # onnxruntime's log level: everything less severe is raised as an exception


class OnnxModel:
    """An exported file as a model: `model(images [B,3,H,W] float in [0,1]) -> outputs [B,K] float32`.

    `threads` within one operator (default: as many as torch uses); `providers` are onnxruntime's, default the CPU.
    Raises WeightsError (exit 3) when the file is missing, broken or not ONNX, or does not take one float32 input
    [B,3,H,W] of a known size and give one output [B,K]; KdcliError (exit 2) for threads below 1 or a provider that this
    onnxruntime lacks.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, providers: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise KdcliError(f"threads {threads}: too few", hint="Give 1 or more.")
        self.session = _session(self.path, self.threads, list(providers or ["CPUExecutionProvider"]))
        self.provider: str = self.session.get_providers()[0]
        self.size: int = self.path.stat().st_size  # bytes
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        self.classes: list[str] | None = class_names(self.metadata.get("classes", ""))

        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if (
            len(inputs) != 1
            or inputs[0].type != "tensor(float)"
            or len(inputs[0].shape) != 4
            or inputs[0].shape[1] != 3
        ):
            has = "; ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise self._foreign(f"its input is {has or 'missing'}, not one float32 [batch,3,height,width]")
        if len(outputs) != 1 or len(outputs[0].shape) != 2:
            has = "; ".join(f"{o.name} {o.shape}" for o in outputs)
            raise self._foreign(f"its output is {has}, not one [batch,classes]")
        self.input_name: str = inputs[0].name
        first, _, *size = inputs[0].shape
        known = size if all(isinstance(n, int) for n in size) else _size(self.metadata.get("image_size", ""))
        if known is None:
            raise self._foreign(f"its input {inputs[0].shape} has no fixed size, and its metadata has no image_size")
        self.input_size: tuple[int, int] = (known[0], known[1])  # (height, width)
        self.batch: int | None = first if isinstance(first, int) else None
        classes = outputs[0].shape[1]
        if not isinstance(classes, int):  # another exporter may leave it open: one image answers it
            classes = self.run(np.zeros((self.batch or 1, 3, *self.input_size), np.float32)).shape[1]
        self.num_classes: int = classes

    def _foreign(self, why: str) -> WeightsError:
        return WeightsError(
            f"{self.path} is not a model that kdcli can run: {why}", hint="`kdcli export --onnx` writes one that is."
        )

    def run(self, images: np.ndarray) -> np.ndarray:
        """onnxruntime alone: float32 [B,3,H,W], contiguous, B the file's batch where it has one -> [B,K].

        Raises WeightsError when onnxruntime fails on them.
        """
        try:
            return np.asarray(self.session.run(None, {self.input_name: images})[0])
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise WeightsError(
                f"{self.path} failed on {list(images.shape)}: {first_line(error)}",
                hint="Export it again with `kdcli export --onnx`; add `--batch 1` if one image at a time works.",
            ) from error

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        """Outputs, float32, on the images' device. A file with a fixed batch gets parts of that size, the last padded.

        Raises DataError when the images are not of the file's size.
        """
        height, width = self.input_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, height, width):
            size = height if height == width else f"[{height},{width}]"
            raise DataError(
                f"{self.path} takes images [B,3,{height},{width}], given {list(images.shape)}",
                hint=f"Read the data at that size (`--set data.image_size={size}`), or export for the data's size.",
            )
        if not len(images):
            return torch.empty(0, self.num_classes, device=images.device)
        array = np.ascontiguousarray(images.detach().to("cpu", torch.float32).numpy())
        step = self.batch or len(array)
        out = []
        for start in range(0, len(array), step):
            part = array[start : start + step]
            missing = step - len(part)
            padded = np.concatenate([part, np.zeros((missing, *part.shape[1:]), np.float32)]) if missing else part
            answers = self.run(padded)
            if len(answers) != step:
                raise self._foreign(f"it gave {len(answers)} outputs for {step} images")
            out.append(answers[: len(part)])
        return torch.from_numpy(np.concatenate(out)).to(images.device, torch.float32)


def _session(path: Path, threads: int, providers: list[str]) -> onnxruntime.InferenceSession:
    """A session with its thread count set and its log quiet, or WeightsError."""
    missing = set(providers) - set(onnxruntime.get_available_providers())
    if missing:  # onnxruntime itself would print a banner and use the CPU
        has = ", ".join(onnxruntime.get_available_providers())
        raise KdcliError(f"this onnxruntime lacks {', '.join(sorted(missing))}", hint=f"It has: {has}.")
    if not path.is_file():
        raise WeightsError(f"{path}: no such file", hint="`kdcli export --onnx` writes one.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = FATAL
    # threads that spin after a call would take the cores from the session that is timed next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise WeightsError(
            f"{path} is broken or not an ONNX file: {first_line(error)}",
            hint="`kdcli export --onnx` writes a new one.",
        ) from error


def _size(text: str) -> tuple[int, int] | None:
    """(height, width) of the metadata's `image_size`: `256x192`, or one number for a square; None for anything else."""
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        return None
    return int(parts[0]), int(parts[-1])


def class_names(text: str) -> list[str] | None:
    """A JSON list of names, or None for anything else."""
    with contextlib.suppress(ValueError):
        names = json.loads(text)
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    return None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not blank, else its type's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
