"""Classification with several classes an image: binary cross-entropy, binary KLs, mean average precision, F1."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kdcli.losses.multilabel import binary_soft_loss, log_mean_mark
from kdcli.tasks.base import Metric, Move, Score

MAP = Metric("map", "mAP")
F1 = Metric("f1", "micro F1")
LOSS = Metric("loss", "loss", unit="", higher=False)
AP = Metric("ap", "AP")


class MultiLabel:
    """Targets are 0/1 matrices [B, K] float32. A class is answered "yes" from a probability of 0.5 on."""

    name: ClassVar[str] = "multilabel"
    metrics: ClassVar[tuple[Metric, ...]] = (MAP, F1, LOSS)
    output_name: ClassVar[str] = "logits"
    mixable: ClassVar[bool] = False
    per_class: ClassVar[Metric] = AP

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        self.num_classes = num_classes

    @staticmethod
    def target(raw: np.ndarray) -> Float[Tensor, "N K"]:
        return torch.from_numpy(raw).to(torch.float32)

    def head(self, in_features: int) -> nn.Linear:
        return nn.Linear(in_features, self.num_classes)

    def moved(self, target: Tensor, move: Move) -> Tensor:
        return target

    def hard(self, out: Float[Tensor, "B K"], target: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
        """Binary cross-entropy, summed over the classes: the negative log-likelihood of an image's labels."""
        return F.binary_cross_entropy_with_logits(out.float(), target, reduction="none").sum(-1)

    def soft(
        self, out: Float[Tensor, "B K"], mentor_out: Float[Tensor, "*M B K"], tau: float | Tensor
    ) -> Float[Tensor, "*M B"]:
        """tau^2 times the sum over the classes of KL(mentor || student) of yes and no, at temperature tau."""
        return binary_soft_loss(out, mentor_out, tau=tau)

    def log_mark(self, out: Float[Tensor, "*M B K"], target: Float[Tensor, "B K"]) -> Float[Tensor, "*M B"]:
        """log of the mean over the classes of the probability of what is right."""
        return log_mean_mark(out, target)

    def sums(self, out: Float[Tensor, "B K"], target: Float[Tensor, "B K"]) -> dict[str, Float[Tensor, ""]]:
        """Average precision summed over the classes that occur and their number; counts of F1; loss; images."""
        ap, yes, right = average_precision(out.float(), target), self.decode(out), target > 0.5
        known = ap.isfinite()
        loss = self.hard(out, target).sum()
        return {
            "images": torch.full_like(loss, len(target)),
            MAP.name: ap.where(known, 0.0).sum(),
            "classes": known.sum(),
            "both": (yes & right).sum(),
            "yes": yes.sum(),
            "right": right.sum(),
            LOSS.name: loss,
        }

    def score(self, sums: Mapping[str, float]) -> Score:
        """Percent, and nats an image. Summed over batches mAP is the mean of theirs, over one set its own."""
        images = int(sums["images"])
        values = {
            MAP.name: 100 * sums[MAP.name] / max(sums["classes"], 1),
            F1.name: 200 * sums["both"] / max(sums["yes"] + sums["right"], 1),
            LOSS.name: sums[LOSS.name] / max(images, 1),
        }
        return Score(values, MAP, images)

    def same(self, a: Float[Tensor, "B K"], b: Float[Tensor, "B K"], tie: float = 0.0) -> Bool[Tensor, " B"]:
        """The same classes; one whose logit in `a` is within `tie` of the threshold may be either."""
        return ((self.decode(a) == self.decode(b)) | (a.abs() <= tie)).all(-1)

    def decode(self, out: Float[Tensor, "B K"]) -> Bool[Tensor, "B K"]:
        """The classes of probability 0.5 and more."""
        return out >= 0

    def details(
        self, out: Float[Tensor, "N K"], target: Float[Tensor, "N K"]
    ) -> tuple[dict[str, float], Float[Tensor, " K"]]:
        """The share of images whose every class is right, in percent; each class's average precision in percent."""
        exact = (self.decode(out) == (target > 0.5)).all(-1).double().mean().item()
        return {"exact": 100 * exact}, 100 * average_precision(out, target)

    @property
    def chance(self) -> float:
        """The expected mAP of random answers depends on the classes' frequencies; 0 makes no mentor suspicious."""
        return 0.0


def average_precision(out: Float[Tensor, "N K"], target: Float[Tensor, "N K"]) -> Float[Tensor, " K"]:
    """Each class's average precision in [0, 1]: the mean, over its images, of the precision at each one's rank.

    As scikit-learn's `average_precision_score`, equal outputs counted as one threshold; not a number for a class that
    does not occur.
    """
    order = out.argsort(0, descending=True)
    ranked, hits = out.gather(0, order), target.gather(0, order)
    found, seen = hits.cumsum(0), torch.arange(1, len(out) + 1, device=out.device)[:, None]
    # of equal outputs all have the counts of the last one: their order is arbitrary
    last = torch.cat([ranked[1:] != ranked[:-1], torch.ones_like(ranked[:1], dtype=torch.bool)])
    position = torch.where(last, seen, len(out)).flip(0).cummin(0).values.flip(0) - 1
    precision = found.gather(0, position) / (position + 1)
    return (precision * hits).sum(0) / hits.sum(0)
