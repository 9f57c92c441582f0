"""Scores: what a trained student, a mentor or an exported file gets right."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.data import Split
from kdcli.system import device as devices, shards
from kdcli.tasks.classify import calibration_error

Model = Callable[[Tensor], Tensor]
"""Pixels [B, 3, H, W] in [0, 1] to logits [B, K]: a Member or an OnnxModel."""


@dataclass
class Score:
    """How a model did on a split. Percentages, but for the loss (nats)."""

    images: int
    top1: float
    top5: float
    loss: float


@dataclass
class Report(Score):
    """A Score with what `kdcli evaluate` shows beside it."""

    calibration: float  # expected calibration error, percentage points
    per_class: dict[str, float] = field(default_factory=dict)  # class -> top-1, percent
    agreement: dict[str, float] = field(default_factory=dict)  # mentor -> same first answer, percent


def answers(model: Model, split: Split, device: torch.device, batch_size: int = 256) -> Tensor:
    """All logits [N, K] of a split in order, float32 on the CPU; the model is left in the mode it was in.

    Where memory runs out it goes on in batches of half the size: nothing couples the images here. Several ranks divide
    the split, and all of them must ask.
    """
    training = model.training if isinstance(model, nn.Module) else False
    if isinstance(model, nn.Module):
        model.eval()
    own, size = shards.own_batches(split, batch_size), batch_size
    try:
        while (out := _answers(model, own, device, size)) is None:
            size //= 2
    finally:
        if isinstance(model, nn.Module):
            model.train(training)
    return shards.rejoin(out, len(split), batch_size)


def _answers(model: Model, split: Split, device: torch.device, batch_size: int) -> list[Tensor] | None:
    """Logits by batch, but None when memory ran out, so that the error does not keep what was in it."""
    try:
        with torch.inference_mode():
            return [model(batch.pixels).float().cpu() for batch in split.plain(batch_size, device)]
    except RuntimeError as error:
        if batch_size == 1 or not devices.out_of_memory(error):
            raise
        return None


def score(model: Model, split: Split, device: torch.device) -> Score:
    """Top-1, top-5 and cross-entropy of a model on a split."""
    return score_answers(answers(model, split, device), split.targets)


def score_answers(out: Tensor, target: Tensor) -> Score:
    """Score of logits [N, K] against class numbers [N]."""
    hits = out.topk(min(5, out.shape[-1]), dim=-1).indices == target[:, None]
    n = len(target)
    return Score(n, 100 * hits[:, 0].sum().item() / n, 100 * hits.sum().item() / n, F.cross_entropy(out, target).item())


def report(
    model: Model, split: Split, classes: list[str], device: torch.device, mentors: dict[str, Model] | None = None
) -> Report:
    """A full account: score, calibration, each class, and agreement with each of `mentors`."""
    out, target = answers(model, split, device), split.targets
    plain = score_answers(out, target)
    confidence, first = out.softmax(-1).max(-1)
    right = first == target
    per_class = {
        name: 100 * right[target == k].float().mean().item() for k, name in enumerate(classes) if (target == k).any()
    }
    agreement = {
        name: 100 * (answers(mentor, split, device).argmax(-1) == first).float().mean().item()
        for name, mentor in (mentors or {}).items()
    }
    return Report(
        **vars(plain), calibration=calibration_error(confidence, right), per_class=per_class, agreement=agreement
    )
