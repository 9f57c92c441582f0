"""How the samples of a batch lie to each other: PKT and RKD."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PART = 2**26
"""Numbers that one tensor of RKD may hold (256 MiB): beyond, its angles are computed in parts."""


def probabilistic_loss(
    student: Float[Tensor, "B D"], mentor: Float[Tensor, "B E"], *, eps: float = 1e-7
) -> Float[Tensor, ""]:
    """PKT, arXiv 1803.10837: who is near whom, as probabilities.

    Cosines mapped to (c + 1) / 2, every row (diagonal included) divided by its sum; the mean over all B x B entries of
    p log((p + eps) / (q + eps)), p the mentor's, q the student's.
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
    """RKD, arXiv 1904.05068: the weighted distance term and the weighted angle term.

    Distance: the batch's Euclidean distances (squares clamped at eps, zero diagonal) divided by the mean of the
    positive ones. Angle: the cosine at sample i between samples j and k, for all B^3. Both by smooth L1, the mean over
    all entries. Guarded: two samples at the same place (squared distance up to eps) lie in no direction of each other,
    which gives cosine 0 and no gradient.

    Where B x B x max(B, D) exceeds `part` numbers, vertices i go through in parts, and each part is computed once more
    in the backward pass instead of kept.
    """
    student, mentor = student.float(), mentor.float()
    b = len(student)
    size = max(1, part // (b * max(b, student.shape[1], mentor.shape[1])))

    def seen(x: Tensor, lo: int) -> tuple[Tensor, Tensor]:
        """From some samples: squared distances of all [b, B], and cosines between all [b, B, B]."""
        away = x[None] - x[lo : lo + size, None]
        square = away.square().sum(-1)
        unit = away * torch.where(square > eps, square.clamp_min(eps).rsqrt(), 0.0)[..., None]
        return square, unit @ unit.mT

    def compare(student: Tensor, mentor: Tensor, lo: int) -> tuple[Tensor, Tensor, Tensor]:
        (d_s, angle_s), (d_t, angle_t) = seen(student, lo), seen(mentor, lo)
        return d_s, d_t, F.smooth_l1_loss(angle_s, angle_t, reduction="sum")

    def again(lo: int) -> tuple[Tensor, Tensor, Tensor]:
        return checkpoint(compare, student, mentor, lo, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore

    parts = [compare(student, mentor, 0)] if size >= b else [again(lo) for lo in range(0, b, size)]

    def distance(rows: list[Tensor]) -> Tensor:
        d = torch.cat(rows).clamp_min(eps).sqrt() * (1 - torch.eye(b, device=student.device))
        return d / (d.sum() / max(b * (b - 1), 1)).clamp_min(eps)

    near_s, near_t = distance([d for d, _, _ in parts]), distance([d for _, d, _ in parts])
    angle = torch.stack([part for _, _, part in parts]).sum() / b**3
    return w_distance * F.smooth_l1_loss(near_s, near_t), w_angle * angle
