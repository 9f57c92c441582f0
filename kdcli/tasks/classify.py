"""Classification, one class an image: cross-entropy, tempered KL, the true class's probability, top-1 and top-5."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from kdcli.losses.classroom_kd import log_mark, soft_loss
from kdcli.tasks.base import Metric, Move, Score

TOP1 = Metric("top1", "top-1")
TOP5 = Metric("top5", "top-5")
LOSS = Metric("loss", "loss", unit="", higher=False)


class Classify:
    """Targets are class numbers [B] int64, or shares of classes [B, K] after mixup."""

    name: ClassVar[str] = "classify"
    metrics: ClassVar[tuple[Metric, ...]] = (TOP1, TOP5, LOSS)
    output_name: ClassVar[str] = "logits"
    mixable: ClassVar[bool] = True
    per_class: ClassVar[Metric] = TOP1

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        self.num_classes, self.label_smoothing = num_classes, label_smoothing

    @staticmethod
    def target(raw: np.ndarray) -> Int[Tensor, " N"]:
        return torch.from_numpy(raw).to(torch.int64)

    def head(self, in_features: int) -> nn.Linear:
        return nn.Linear(in_features, self.num_classes)

    def moved(self, target: Tensor, move: Move) -> Tensor:
        return target

    def hard(self, out: Float[Tensor, "B K"], target: Shaped[Tensor, "B ..."]) -> Float[Tensor, " B"]:
        """Cross-entropy with the labels."""
        return F.cross_entropy(out.float(), target, reduction="none", label_smoothing=self.label_smoothing)

    def soft(
        self, out: Float[Tensor, "B K"], mentor_out: Float[Tensor, "*M B K"], tau: float | Tensor
    ) -> Float[Tensor, "*M B"]:
        """tau^2 * KL(mentor || student) at temperature tau (ClassroomKD Eq. 7)."""
        return soft_loss(out, mentor_out, tau=tau)

    def log_mark(self, out: Float[Tensor, "*M B K"], target: Int[Tensor, " B"]) -> Float[Tensor, "*M B"]:
        """log of the true class's probability (ClassroomKD Eq. 2-3)."""
        return log_mark(out, target)

    def sums(self, out: Float[Tensor, "B K"], target: Shaped[Tensor, "B ..."]) -> dict[str, Float[Tensor, ""]]:
        """Images, how many have their class first and among the first five, and cross-entropy without smoothing."""
        loss = F.cross_entropy(out.float(), target, reduction="sum")
        if target.ndim == 2:  # mixed images count for the class they show most of
            target = target.argmax(-1)
        hits = out.topk(min(5, out.shape[-1]), dim=-1).indices == target[:, None]
        images = torch.full_like(loss, len(target))
        return {"images": images, TOP1.name: hits[:, 0].sum(), TOP5.name: hits.any(-1).sum(), LOSS.name: loss}

    def score(self, sums: Mapping[str, float]) -> Score:
        """Percent of images, and nats an image."""
        images = int(sums["images"])
        shares = {metric.name: 100 * sums[metric.name] / max(images, 1) for metric in (TOP1, TOP5)}
        return Score({**shares, LOSS.name: sums[LOSS.name] / max(images, 1)}, TOP1, images)

    def same(self, a: Float[Tensor, "B K"], b: Float[Tensor, "B K"], tie: float = 0.0) -> Bool[Tensor, " B"]:
        """The same class first; two classes whose logits in `a` differ by at most `tie` are one answer."""
        gap = a.gather(1, self.decode(a)[:, None]) - a.gather(1, self.decode(b)[:, None])
        return gap[:, 0] <= tie

    def decode(self, out: Float[Tensor, "B K"]) -> Int[Tensor, " B"]:
        """The class of the largest logit."""
        return out.argmax(-1)

    def details(
        self, out: Float[Tensor, "N K"], target: Int[Tensor, " N"]
    ) -> tuple[dict[str, float], Float[Tensor, " K"]]:
        """Expected calibration error in percentage points; each class's top-1 in percent."""
        confidence, first = out.softmax(-1).max(-1)
        right = first == target
        count = torch.bincount(target, minlength=self.num_classes)
        hits = torch.bincount(target, right.double(), self.num_classes)
        return {"calibration": calibration_error(confidence, right)}, 100 * hits / count  # 0 / 0 is not a number

    @property
    def chance(self) -> float:
        return 100.0 / self.num_classes


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error, percent: |accuracy - confidence| averaged over equal-width bins of confidence.

    Guo et al. 2017 (arXiv 1706.04599), Eq. 3. `confidence` [N] in [0, 1], `correct` [N] bool.
    """
    place = (confidence * bins).long().clamp_max(bins - 1)
    count = torch.bincount(place, minlength=bins).clamp_min(1)
    gap = torch.bincount(place, correct.double(), bins) - torch.bincount(place, confidence.double(), bins)
    share = torch.bincount(place, minlength=bins).double() / max(len(confidence), 1)
    return float((gap / count).abs().mul(share).sum() * 100)
