"""The relations between the samples of a batch: PKT and RKD."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PART = 2**26
"""Numbers that one tensor of RKD may hold (256 MiB); beyond this the angles are computed in parts."""


def probabilistic_loss(
    student: Float[Tensor, "B D"], mentor: Float[Tensor, "B E"], *, eps: float = 1e-7
) -> Float[Tensor, ""]:
    """PKT (arXiv 1803.10837): the similarities of the samples as probabilities.

    Cosines are mapped to (c + 1) / 2 and every row (diagonal included) is divided by its sum; the loss is the mean over
    all B x B entries of p log((p + eps) / (q + eps)), p the mentor's, q the student's.
    """

    def near(x: Tensor) -> Tensor:
        x = x.float() / (torch.linalg.vector_norm(x.float(), dim=1, keepdim=True) + eps)
        similarity = (x @ x.T + 1) / 2
        return similarity / similarity.sum(1, keepdim=True).clamp_min(eps)

    q, p = near(student), near(mentor)
    return (p * ((p + eps) / (q + eps)).log()).mean()


def relational_loss(
    student: Float[Tensor, "B D"],
    mentor: Float[Tensor, "B E"],
    *,
    w_distance: float = 25.0,
    w_angle: float = 50.0,
    eps: float = 1e-12,
    part: int = PART,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """RKD (arXiv 1904.05068): the weighted distance term and the weighted angle term.

    Distance: the Euclidean distances in the batch (squares clamped at eps, zero diagonal) divided by the mean of the
    positive ones. Angle: the cosine at sample i between samples j and k, for all B^3 triples. Both are compared by
    smooth L1, averaged over all entries. Guarded: two equal samples (squared distance up to eps) have no direction,
    which gives cosine 0 and no gradient.

    If B x B x max(B, D) exceeds `part` numbers, the vertices i are processed in parts, and each part is recomputed in
    the backward pass instead of stored.
    """
    student, mentor = student.float(), mentor.float()
    b = len(student)
    size = max(1, part // (b * max(b, student.shape[1], mentor.shape[1])))

    def relations(x: Tensor, lo: int) -> tuple[Tensor, Tensor]:
        """At some of the samples: the squared distances to all [b, B], and the cosines between all [b, B, B]."""
        away = x[None] - x[lo : lo + size, None]
        square = away.square().sum(-1)
        unit = away * torch.where(square > eps, square.clamp_min(eps).rsqrt(), 0.0)[..., None]
        return square, unit @ unit.mT

    def compare(student: Tensor, mentor: Tensor, lo: int) -> tuple[Tensor, Tensor, Tensor]:
        (d_s, angle_s), (d_t, angle_t) = relations(student, lo), relations(mentor, lo)
        return d_s, d_t, F.smooth_l1_loss(angle_s, angle_t, reduction="sum")

    def recomputed(lo: int) -> tuple[Tensor, Tensor, Tensor]:
        return checkpoint(compare, student, mentor, lo, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore

    parts = [compare(student, mentor, 0)] if size >= b else [recomputed(lo) for lo in range(0, b, size)]

    def distance(rows: list[Tensor]) -> Tensor:
        d = torch.cat(rows).clamp_min(eps).sqrt() * (1 - torch.eye(b, device=student.device))
        return d / (d.sum() / max(b * (b - 1), 1)).clamp_min(eps)

    near_s, near_t = distance([d for d, _, _ in parts]), distance([d for _, d, _ in parts])
    angle = torch.stack([part for _, _, part in parts]).sum() / b**3
    return w_distance * F.smooth_l1_loss(near_s, near_t), w_angle * angle
