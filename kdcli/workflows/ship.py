"""The shipping report: what an engineer gets for the student, beside the teacher and the control."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcli.data import DataSet
from kdcli.export.bench import bench
from kdcli.export.onnx import OnnxModel, export_onnx
from kdcli.models.member import Member
from kdcli.tasks import Metric, Task
from kdcli.training.evaluate import score


@dataclass
class Shipped:
    """One exported model: accuracy in percent, latency in milliseconds of one call."""

    role: str
    name: str
    metric: Metric
    in_torch: float  # the primary metric
    in_onnx: float
    params: int
    macs: int  # multiply-adds of one image
    size: int  # bytes of the file
    p50: float
    p90: float
    path: str

    def json(self) -> dict[str, Any]:
        """Its figures, those of the task under the metric's name."""
        facts = {key: value for key, value in vars(self).items() if key not in ("metric", "in_torch", "in_onnx")}
        name = self.metric.name
        return {**facts, f"{name}_torch": self.in_torch, f"{name}_onnx": self.in_onnx}


def ship(
    members: dict[str, Member],
    data: DataSet,
    task: Task,
    folder: Path,
    metadata: dict[str, dict[str, str]],
    *,
    threads: int = 1,
) -> list[Shipped]:
    """Export every member (by role, as `metadata` is), score it in torch and in onnxruntime, and time all in turn.

    Raises ParityError when a file does not answer as its network does.
    """
    cpu, real = torch.device("cpu"), data.test.take(64)
    rows, paths = [], {}
    for role, member in members.items():
        path = paths[role] = folder / f"{role}.onnx"
        done = export_onnx(member, real, path, metadata=metadata[role])
        params, macs = member.count()
        in_torch, in_onnx = (score(model, data.test, task, cpu).value for model in (member.cpu(), OnnxModel(path)))
        rows.append(
            Shipped(
                role, member.name, task.metrics[0], in_torch, in_onnx, params, macs, done.size, 0.0, 0.0, str(path)
            )
        )  # fmt: skip
    timings = {timing.name: timing for timing in bench(paths, batch=1, threads=threads)}
    for row in rows:
        row.p50, row.p90 = timings[row.role].p50, timings[row.role].p90
    return rows
