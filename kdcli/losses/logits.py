"""What the teacher's logits teach beside plain tempered KL: DKD, NKD, DIST, WSLD."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

NORM_FLOOR = 1e-5
"""Shortest centred vector whose direction counts in a correlation: below, a softmax's deviations from their mean are
float32's rounding (a uniform row has none at all), and their gradient would be their reciprocal."""


def dkd_loss(
    student: Float[Tensor, "B K"],
    mentor: Float[Tensor, "*M B K"],
    target: Int[Tensor, " B"],
    *,
    tau: float,
) -> tuple[Float[Tensor, "*M B"], Float[Tensor, "*M B"]]:
    """(TCKD, NCKD) of every sample: tau^2 KL of the target class against all others, and among these others.

    Zhao et al. 2022, Decoupled Knowledge Distillation (arXiv 2203.08679), Eq. 7. The mass of the others is a
    log-sum-exp: 1 - p_target would round to nothing.
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

    Huang et al. 2022, Knowledge Distillation from A Stronger Teacher (arXiv 2205.10536). Guarded: a vector shorter than
    NORM_FLOOR after centring counts as that long, so that a uniform answer, which correlates with nothing, gives back a
    finite gradient.
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
    """tau^2 w H(mentor, student) of every sample; w = 1 - exp(-CE_student / CE_mentor) is a number to the gradient.

    Zhou et al. 2021, Rethinking Soft Labels for Knowledge Distillation (arXiv 2102.00650). H is a cross-entropy, as the
    authors' code has it; a student that knows a sample better than its mentor is hardly taught it.
    """
    with torch.no_grad():
        ours = F.cross_entropy(student.float(), target, reduction="none")
        theirs = torch.stack(
            [F.cross_entropy(x, target, reduction="none") for x in mentor.float().reshape(-1, *mentor.shape[-2:])]
        ).reshape(mentor.shape[:-1])
        w = 1 - torch.exp(-ours / (theirs + eps))
    p, log_q = F.softmax(mentor.float() / tau, -1), F.log_softmax(student.float() / tau, -1)
    return tau**2 * w * -(p * log_q).sum(-1)


def _is_target(target: Int[Tensor, " B"], classes: int) -> Bool[Tensor, "B K"]:
    return torch.arange(classes, device=target.device) == target[:, None]


def _binary(log_p: Float[Tensor, "*M B K"], y: Bool[Tensor, "B K"]) -> Float[Tensor, "*M B 2"]:
    """log of (probability of the target, probability of all others)."""
    others = log_p.masked_fill(y, -torch.inf).logsumexp(-1)
    return torch.stack([log_p.masked_fill(~y, 0).sum(-1), others], -1)


def _others(z: Float[Tensor, "*M B K"], y: Bool[Tensor, "B K"]) -> Float[Tensor, "*M B K"]:
    """log-softmax over all classes but the target, whose place holds 0."""
    return F.log_softmax(z.masked_fill(y, -torch.inf), -1).masked_fill(y, 0)


def _correlation(a: Float[Tensor, "*X N"], b: Float[Tensor, "*X N"], eps: float) -> Float[Tensor, "*X"]:
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    norms = a.norm(dim=-1).clamp_min(NORM_FLOOR) * b.norm(dim=-1).clamp_min(NORM_FLOOR)
    return (a * b).sum(-1) / (norms + eps)
