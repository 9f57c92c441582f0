"""Scores: how well a trained student, a mentor or an exported file answers a split."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.data import Split
from kdcli.system import device as devices, distributed, shards
from kdcli.tasks import Score, Task
from kdcli.tasks.base import plain

Model = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [0, 1] to the task's output [B, ...]: a Member or an exported file's runtime."""


@dataclass
class Report:
    """A Score with what `kdcli evaluate` shows besides."""

    score: Score
    details: dict[str, float] = field(default_factory=dict)  # the task's further figures
    per_class: dict[str, float] = field(default_factory=dict)  # class -> the task's figure for it
    agreement: dict[str, float] = field(default_factory=dict)  # mentor -> images with the same answer, percent

    def json(self) -> dict[str, Any]:
        return {
            "images": self.score.images, **self.score, **self.details,
            "per_class": self.per_class, "agreement": self.agreement,
        }  # fmt: skip


def outputs(model: Model, split: Split, device: torch.device, batch_size: int = 256) -> Tensor:
    """All outputs [N, ...] of a split in order, float32 on the CPU; the model's mode is restored.

    Where memory runs out it goes on in batches of half the size: evaluation treats images one by one. Several ranks
    divide the split, and all of them must call this.
    """
    training = model.training if isinstance(model, nn.Module) else False
    if isinstance(model, nn.Module):
        model.eval()
    own, size = split, batch_size
    if not distributed.alone():  # whole batches, the same as a single rank would read
        own = split.subset(shards.turns(len(split), batch_size)[distributed.rank()])
    try:
        while (out := _outputs(model, own, device, size)) is None:
            size //= 2
    finally:
        if isinstance(model, nn.Module):
            model.train(training)
    return shards.rejoin(out, len(split), batch_size)


def _outputs(model: Model, split: Split, device: torch.device, batch_size: int) -> list[Tensor] | None:
    """Outputs by batch; None when memory ran out, so that the error does not keep what was in it."""
    try:
        with torch.inference_mode():
            return [model(batch.images).float().cpu() for batch in split.plain(batch_size, device)]
    except RuntimeError as error:
        if batch_size == 1 or not devices.out_of_memory(error):
            raise
        return None


def score(model: Model, split: Split, task: Task, device: torch.device) -> Score:
    """The task's metrics of a model on a split."""
    return score_outputs(outputs(model, split, device), split.targets, task)


def score_outputs(out: Tensor, target: Tensor, task: Task) -> Score:
    """The task's metrics of outputs [N, ...] on the CPU."""
    return task.score(plain(task.sums(out, target)))


def report(
    model: Model,
    split: Split,
    classes: list[str],
    task: Task,
    device: torch.device,
    mentors: dict[str, Model] | None = None,
) -> Report:
    """Score, the task's further figures, each class, and agreement with each of `mentors`."""
    out, target = outputs(model, split, device), split.targets
    details, each = task.details(out, target)
    agreement = {
        name: 100 * task.same(outputs(mentor, split, device), out).double().mean().item()
        for name, mentor in (mentors or {}).items()
    }
    per_class = {name: value for name, value in zip(classes, each.tolist(), strict=True) if value == value}
    return Report(score_outputs(out, target, task), details, per_class, agreement)
