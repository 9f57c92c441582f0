"""Tempered KL, and the marks, ranks and gaps of ClassroomKD (Sarode et al. 2024, arXiv 2409.20237)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

GAP_LIMIT = 100.0
"""Largest gap of Eq. 8. At the temperatures beyond it tau^2 * KL has reached its limit (the squared difference of the
centred logits / 2K), and float32 would return rounding errors or, with an infinite tau^2, NaN."""


def soft_loss(
    student: Float[Tensor, "*B K"], mentor: Float[Tensor, "*M B K"], *, tau: float | Float[Tensor, "..."]
) -> Float[Tensor, "*M B"]:
    """tau^2 * KL(softmax(mentor / tau) || softmax(student / tau)) of every sample: sum over classes, no batch mean.

    Hinton et al. 2015 (arXiv 1503.02531). `tau` is a number or broadcasts to [*M, B].
    """
    if not isinstance(tau, Tensor):
        tau = torch.full((), tau, dtype=torch.float32, device=student.device)  # no copy from the host
    log_p = F.log_softmax(mentor.float() / tau[..., None], dim=-1)
    log_q = F.log_softmax(student.float() / tau[..., None], dim=-1)
    return tau**2 * (log_p.exp() * (log_p - log_q)).sum(-1)  # Eq. 7


def log_mark(out: Float[Tensor, "*M B K"], target: Int[Tensor, " B"]) -> Float[Tensor, "*M B"]:
    """log p^m_y, the log-probability of the true class; as a logarithm it cannot underflow."""
    log_p = F.log_softmax(out.float(), dim=-1)  # Eq. 2
    return log_p.gather(-1, target.expand(out.shape[:-1])[..., None])[..., 0]  # Eq. 3


def log_batch_mark(
    log_p: Float[Tensor, "*M B"], *, mark_mean: Literal["geometric", "arithmetic"] = "geometric"
) -> Float[Tensor, "*M"]:
    """log w^m, one mark per model for the whole batch.

    Eq. 4 averages the probabilities (`arithmetic`); Algorithm 1 and the authors' code take exp(-mean cross-entropy),
    their geometric mean (`geometric`).
    """
    if mark_mean == "geometric":
        return log_p.mean(-1)  # Algorithm 1, lines 7-8
    return log_p.logsumexp(-1) - math.log(log_p.shape[-1])  # Eq. 4


def rank_by_share(log_w: Float[Tensor, "M+1 *B"], *, decimals: int | None = None) -> Float[Tensor, "M+1 *B"]:
    """r^m = lambda * w^m / sum of w over the whole classroom, with lambda = the number of mentors.

    The share of a mark is a softmax of log-marks, which cannot divide by zero. `decimals` rounds the shares first, as
    the authors' code does (two).
    """
    share = log_w.softmax(0)
    if decimals is not None:
        share = share.round(decimals=decimals)
    return (log_w.shape[0] - 1) * share  # Eq. 5


def rank_by_position(log_w: Float[Tensor, "M+1 *B"], *, lambda_: float = 0.1) -> Float[Tensor, "M+1 *B"]:
    """r^m = lambda * position of m when all models are sorted by mark, the worst at position 1 (method B).

    Equal marks keep the order student, teacher, peers.
    """
    order = log_w.argsort(dim=0, stable=True)  # Eq. 13
    return lambda_ * (order.argsort(dim=0).float() + 1)  # Eq. 14: the inverse permutation gives the positions


def performance_gap(
    r_m: Float[Tensor, "M *B"], r_s: Float[Tensor, " *B"], *, gap: Literal["max", "mentor", "student"] = "max"
) -> Float[Tensor, "M *B"]:
    """Delta r^m = |r^m - r^s| / epsilon.

    The paper does not define epsilon; the authors' code divides by `max`, which for an active mentor equals `mentor`.
    Guarded against 0/0, and limited to GAP_LIMIT, which only `student` (untrained) and `mentor` (inactive) can reach.
    """
    epsilon = {"max": torch.maximum(r_m, r_s), "mentor": r_m, "student": r_s.expand_as(r_m)}[gap]
    gaps = (r_m - r_s).abs() / epsilon.clamp_min(torch.finfo(torch.float32).tiny)  # Eq. 8
    return gaps.clamp_max(GAP_LIMIT)
