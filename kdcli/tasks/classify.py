"""Image classification: cross-entropy, tempered KL, the true class's probability, top-1 and top-5."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from kdcli import losses


class Classify:
    """The task's four questions, each answered per sample so that a method may weigh samples."""

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing

    def hard(self, out: Float[Tensor, "B K"], target: Shaped[Tensor, "B ..."]) -> Float[Tensor, " B"]:
        """Cross-entropy with the labels: class numbers [B], or shares of classes [B, K] after mixup."""
        return F.cross_entropy(out.float(), target, reduction="none", label_smoothing=self.label_smoothing)

    def soft(
        self, out: Float[Tensor, "B K"], mentor_out: Float[Tensor, "*M B K"], tau: float | Tensor
    ) -> Float[Tensor, "*M B"]:
        """tau^2 * KL(mentor || student) at temperature tau (ClassroomKD Eq. 7)."""
        return losses.soft_loss(out, mentor_out, tau=tau)

    def log_mark(self, out: Float[Tensor, "*M B K"], target: Shaped[Tensor, " B"]) -> Float[Tensor, "*M B"]:
        """log of how well each sample was answered, in (-inf, 0] (ClassroomKD Eq. 2-3)."""
        return losses.log_mark(out, target)

    def metrics(self, out: Float[Tensor, "B K"], target: Shaped[Tensor, "B ..."]) -> dict[str, Float[Tensor, ""]]:
        """How many of the batch were right first and among the first five: sums, left on the device."""
        if target.ndim == 2:  # mixed images count for the class they show most of
            target = target.argmax(-1)
        best = out.topk(min(5, out.shape[-1]), dim=-1).indices == target[:, None]
        return {"top1": best[:, 0].sum(), "top5": best.any(-1).sum()}

    @property
    def chance(self) -> float:
        """The accuracy of guessing, percent."""
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
