"""Losses on the logits of one teacher: DKD, NKD, DIST, WSLD, CTKD, DTKD, MLKD."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

NORM_FLOOR = 1e-5
"""Least norm of a centred vector in a correlation: below it a softmax's deviations from its mean are float32 rounding
(a uniform row has none), and the gradient would be their reciprocal."""
SHARPNESS_FLOOR = 0.1
"""Least maximum logit from which DTKD computes a temperature. DTKD assumes positive maxima, as in a trained network; an
untrained student, or logits shifted below zero, would give temperatures of zero or less."""


def dkd_loss(
    student: Float[Tensor, "B K"],
    mentor: Float[Tensor, "*M B K"],
    target: Int[Tensor, " B"],
    *,
    tau: float,
) -> tuple[Float[Tensor, "*M B"], Float[Tensor, "*M B"]]:
    """(TCKD, NCKD) of every sample: tau^2 KL of the target class against all others, and among these others.

    Zhao et al. 2022, Decoupled Knowledge Distillation (arXiv 2203.08679), the two parts of Eq. 7. The mass of the
    others is a log-sum-exp: 1 - p_target would round to zero.
    """
    y = _is_target(target, student.shape[-1])
    p, q = (F.log_softmax(x.float() / tau, -1) for x in (mentor, student))
    b_t, b_s = _binary(p, y), _binary(q, y)
    target_class = (b_t.exp() * (b_t - b_s)).sum(-1)
    n_t, n_s = _others(mentor.float() / tau, y), _others(student.float() / tau, y)
    others = (n_t.exp() * (n_t - n_s)).masked_fill(y, 0).sum(-1)
    return tau**2 * target_class, tau**2 * others


def nkd_loss(
    student: Float[Tensor, "B K"],
    mentor: Float[Tensor, "*M B K"],
    target: Int[Tensor, " B"],
    *,
    tau: float,
) -> tuple[Float[Tensor, "*M B"], Float[Tensor, "*M B"]]:
    """(target term, non-target term) of every sample: cross-entropies weighted by the mentor's probabilities.

    Yang et al. 2023, From Knowledge Distillation to Self-Knowledge Distillation (arXiv 2303.13005): -t_y log s_y at
    temperature 1, and tau^2 times the cross-entropy among the other classes, whose probabilities sum to 1 again.
    """
    y = _is_target(target, student.shape[-1])
    t, s = (F.log_softmax(x.float(), -1).masked_fill(~y, 0).sum(-1) for x in (mentor, student))
    n_t, n_s = _others(mentor.float() / tau, y), _others(student.float() / tau, y)
    return -t.exp() * s, -(tau**2) * (n_t.exp() * n_s).masked_fill(y, 0).sum(-1)


def dist_loss(
    student: Float[Tensor, "B K"], mentor: Float[Tensor, "*M B K"], *, tau: float, eps: float = 1e-8
) -> tuple[Float[Tensor, "*M"], Float[Tensor, "*M"]]:
    """(inter, intra): tau^2 (1 - Pearson correlation) of rows, a sample's classes, and of columns, a class's samples.

    Huang et al. 2022, Knowledge Distillation from A Stronger Teacher (arXiv 2205.10536). Guarded: the norm of a centred
    vector is at least NORM_FLOOR, so that uniform probabilities, which correlate with nothing, have a finite gradient.
    """
    p, q = (F.softmax(x.float() / tau, -1) for x in (mentor, student))
    inter = 1 - _correlation(q, p, eps).mean(-1)
    intra = 1 - _correlation(q.mT, p.mT, eps).mean(-1)
    return tau**2 * inter, tau**2 * intra


def wsld_loss(
    student: Float[Tensor, "B K"],
    mentor: Float[Tensor, "*M B K"],
    target: Shaped[Tensor, "B ..."],
    *,
    tau: float,
    eps: float = 1e-7,
) -> Float[Tensor, "*M B"]:
    """tau^2 w H(mentor, student) of every sample; w = 1 - exp(-CE_student / CE_mentor) is a constant to the gradient.

    Zhou et al. 2021, Rethinking Soft Labels for Knowledge Distillation (arXiv 2102.00650). H is a cross-entropy, as in
    the authors' code; samples that the student answers better than the mentor have little weight.
    """
    with torch.no_grad():
        ours = F.cross_entropy(student.float(), target, reduction="none")
        theirs = torch.stack(
            [F.cross_entropy(x, target, reduction="none") for x in mentor.float().reshape(-1, *mentor.shape[-2:])]
        ).reshape(mentor.shape[:-1])
        w = 1 - torch.exp(-ours / (theirs + eps))
    p, log_q = F.softmax(mentor.float() / tau, -1), F.log_softmax(student.float() / tau, -1)
    return tau**2 * w * -(p * log_q).sum(-1)


def reversal(epoch: float, *, decay_max: float = 0.0, decay_min: float = -1.0, decay_loops: int = 10) -> float:
    """lambda(epoch), the factor of the temperature's gradient: a half cosine from decay_max to decay_min.

    Li et al. 2023, Curriculum Temperature for Knowledge Distillation (arXiv 2211.16231).
    """
    share = min(epoch / decay_loops, 1.0) if decay_loops else 1.0
    return decay_min + 0.5 * (decay_max - decay_min) * (1 + math.cos(math.pi * share))


def reversed_gradient(x: Float[Tensor, "..."], factor: float) -> Float[Tensor, "..."]:
    """`x`, to the bit, with its gradient multiplied by `factor`; a negative one turns x's descent into ascent."""
    return x.detach() + factor * (x - x.detach())


def dynamic_temperatures(
    student: Float[Tensor, "B K"], mentor: Float[Tensor, "*M B K"], *, tau: float
) -> tuple[Float[Tensor, "*M B"], Float[Tensor, "*M B"]]:
    """(T_s, T_m) of every sample: 2 tau, divided between the two in proportion to their largest logits.

    Wei and Bai 2024, Dynamic Temperature Knowledge Distillation (arXiv 2404.12711). The gradient flows through the
    student's maximum. Guarded: maxima are at least SHARPNESS_FLOOR.
    """
    a, b = (x.float().amax(-1).clamp_min(SHARPNESS_FLOOR) for x in (student, mentor))
    return 2 * a / (a + b) * tau, 2 * b / (a + b) * tau


def dtkd_loss(
    student: Float[Tensor, "B K"],
    mentor: Float[Tensor, "*M B K"],
    *,
    tau_s: Float[Tensor, "*M B"],
    tau_m: Float[Tensor, "*M B"],
) -> Float[Tensor, "*M B"]:
    """T_s T_m KL(softmax(mentor / T_m) || softmax(student / T_s)) of every sample: each at its own temperature."""
    log_p = F.log_softmax(mentor.float() / tau_m[..., None], -1)
    log_q = F.log_softmax(student.float() / tau_s[..., None], -1)
    return tau_s * tau_m * (log_p.exp() * (log_p - log_q)).sum(-1)


def class_level_loss(
    student: Float[Tensor, "B K"], mentor: Float[Tensor, "*M B K"], *, tau: float
) -> Float[Tensor, "*M"]:
    """||P_m^T P_m - P_s^T P_s||^2 / K, the similarities of the classes over the batch; without tau^2.

    Jin et al. 2023, Multi-level Logit Distillation (CVPR 2023), as is `batch_level_loss`.
    """
    p, q = (F.softmax(x.float() / tau, -1) for x in (mentor, student))
    return (p.mT @ p - q.mT @ q).square().sum((-2, -1)) / student.shape[-1]


def batch_level_loss(
    student: Float[Tensor, "B K"], mentor: Float[Tensor, "*M B K"], *, tau: float
) -> Float[Tensor, "*M"]:
    """||P_m P_m^T - P_s P_s^T||^2 / B, the similarities of the samples; without tau^2."""
    p, q = (F.softmax(x.float() / tau, -1) for x in (mentor, student))
    return (p @ p.mT - q @ q.mT).square().sum((-2, -1)) / student.shape[-2]


def _is_target(target: Int[Tensor, " B"], classes: int) -> Bool[Tensor, "B K"]:
    return torch.arange(classes, device=target.device) == target[:, None]


def _binary(log_p: Float[Tensor, "*M B K"], y: Bool[Tensor, "B K"]) -> Float[Tensor, "*M B 2"]:
    """log of (probability of the target, probability of all others)."""
    others = log_p.masked_fill(y, -torch.inf).logsumexp(-1)
    return torch.stack([log_p.masked_fill(~y, 0).sum(-1), others], -1)


def _others(z: Float[Tensor, "*M B K"], y: Bool[Tensor, "B K"]) -> Float[Tensor, "*M B K"]:
    """log-softmax over all classes but the target, whose entry is 0."""
    return F.log_softmax(z.masked_fill(y, -torch.inf), -1).masked_fill(y, 0)


def _correlation(a: Float[Tensor, "*X N"], b: Float[Tensor, "*X N"], eps: float) -> Float[Tensor, "*X"]:
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    norms = a.norm(dim=-1).clamp_min(NORM_FLOOR) * b.norm(dim=-1).clamp_min(NORM_FLOOR)
    return (a * b).sum(-1) / (norms + eps)
