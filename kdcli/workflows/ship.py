"""The shipping report: accuracy, size and latency of exported files, side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcli.data import DataSet
from kdcli.export import open_file, suffix_of
from kdcli.export.bench import bench
from kdcli.models.member import Member
from kdcli.tasks import Metric, Task
from kdcli.training.evaluate import score
from kdcli.training.run import Run
from kdcli.workflows.export import export


@dataclass
class Shipped:
    """One exported model: the task's primary metric in torch and from the file, and the latency of one call."""

    role: str
    name: str
    metric: Metric
    in_torch: float  # in the metric's unit
    in_onnx: float
    params: int
    macs: int  # multiply-adds of one image
    size: int  # bytes of the file
    p50: float  # ms
    p90: float  # ms
    path: str

    def json(self) -> dict[str, Any]:
        """The fields, those of the metric under its name: `top1_torch`, `top1_onnx`."""
        facts = {key: value for key, value in vars(self).items() if key not in ("metric", "in_torch", "in_onnx")}
        name = self.metric.name
        return {**facts, f"{name}_torch": self.in_torch, f"{name}_onnx": self.in_onnx}


def ship(
    members: dict[str, Member],
    data: DataSet,
    task: Task,
    folder: Path,
    runs: dict[str, Run],
    *,
    threads: int = 1,
) -> list[Shipped]:
    """Export every member (by role) into `folder`, score it in torch and from its file, and time all files in turn.

    `runs` holds the run of each member that was trained in one. Raises as `workflows.export.export` does.
    """
    cpu = torch.device("cpu")
    shipped, paths = [], {role: folder / f"{role}{suffix_of(None)}" for role in members}
    for role, member in members.items():
        done = export(member, data, task, paths[role], run=runs.get(role))
        in_torch, in_file = (score(model, data.test, task, cpu).value for model in (member.cpu(), open_file(done.path)))
        params, macs = member.count()
        row = Shipped(
            role, member.name, task.metrics[0], in_torch, in_file, params, macs, done.size, 0.0, 0.0, str(done.path)
        )  # fmt: skip
        shipped.append(row)
    for row, timing in zip(shipped, bench(paths, batch=1, threads=threads), strict=True):
        row.p50, row.p90 = timing.p50, timing.p90
    return shipped
