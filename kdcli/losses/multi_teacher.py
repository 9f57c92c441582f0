"""Weights of several teachers: by entropy (EBKD), by cross-entropy (CA-MKD), by gradient (AEKD)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

BARRIER_STEPS = 25
"""Newton steps of `least_norm_weights`: after 20 the hardest of hundreds of problems was exact to 1e-7."""


def entropy_weights(mentors: Float[Tensor, "M B K"]) -> Float[Tensor, "M B"]:
    """w_m = 1 - H_m / sum_k H_k, with H_m the entropy of teacher m's probabilities at temperature 1; they sum to M - 1.

    EBKD (Kwon et al. 2020), as in its public code. Guarded if all entropies are zero: then all weights are equal.
    """
    log_p = F.log_softmax(mentors.float(), -1)
    entropy = -(log_p.exp() * log_p).sum(-1) + torch.finfo(torch.float32).tiny
    return 1 - entropy / entropy.sum(0)


def confidence_weights(cross_entropy: Float[Tensor, "M B"]) -> Float[Tensor, "M B"]:
    """w_m = (1 - softmax over teachers of their cross-entropy) / (M - 1); they sum to 1.

    CA-MKD (Zhang et al. 2022, arXiv 2201.00007), for logits and for feature maps. Needs two teachers.
    """
    return (1 - cross_entropy.float().softmax(0)) / (cross_entropy.shape[0] - 1)


def mean_gradients(
    student: Float[Tensor, "B K"], mentors: Float[Tensor, "M B K"], *, tau: float
) -> Float[Tensor, "M K"]:
    """g_m: the gradient of each teacher's distillation loss (tau^2 KL, batch mean) w.r.t. the student's logits,
    averaged over the batch: tau / B * (softmax(student / tau) - softmax(teacher / tau)). AEKD (Du et al. 2020).
    """
    q, p = F.softmax(student.float() / tau, -1), F.softmax(mentors.float() / tau, -1)
    return tau / student.shape[0] * (q - p).mean(1)


@torch.no_grad()
def least_norm_weights(
    gradients: Float[Tensor, "M K"], *, C: float = 0.6, normalise: bool = False
) -> Float[Tensor, " M"]:
    """The w that minimises |sum_m w_m g_m|^2 subject to sum w = 1 and 0 <= w_m <= C. AEKD (Du et al. 2020).

    normalise: the gradients are first divided by their norms; then the solution is too, and is scaled to sum to 1.
    C * M must be at least 1, otherwise there is no solution. A primal-dual interior-point method with a fixed number of
    steps on an M x M system; if several w are optimal it ends between them, so that equal teachers have equal weights.
    """
    m = gradients.shape[0]
    real = torch.float32 if gradients.device.type == "mps" else torch.float64
    g = gradients.to(real)
    norms = g.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    if normalise:
        g = g / norms[:, None]
    w = _box_simplex(g, C) if C * m > 1 + 1e-6 else g.new_full((m,), 1 / m)  # at C M = 1 this is the only one
    if normalise:
        w = w / norms
        w = w / w.sum()
    return w.float()


def _box_simplex(g: Float[Tensor, "M K"], c: float) -> Float[Tensor, " M"]:
    """argmin |w g|^2 / 2 with sum w = 1, 0 <= w <= c: Newton's method on the perturbed optimality conditions.

    x holds w and c - w, z their multipliers; both remain positive.
    """
    gram = g @ g.T
    gram = gram / gram.diagonal().max().clamp_min(1e-30)  # the solution does not depend on the gradients' length
    floor = 1e-16 if g.dtype == torch.float64 else 1e-8  # of x z: no closer to the boundary than rounding
    m, one = g.shape[0], torch.ones_like(g[:, 0])
    w, z, y = one / m, gram.new_ones(2, m), gram.new_zeros(())
    for _ in range(BARRIER_STEPS):
        x = torch.stack([w, c - w])
        mu = (0.05 * (x * z).mean()).clamp_min(floor)
        ratio, pull = z / x, mu / x
        slope = gram @ w - y - pull[0] + pull[1]
        factor, _ = torch.linalg.cholesky_ex(gram + torch.diag(ratio.sum(0)))
        both = torch.cholesky_solve(torch.stack([slope, one], 1), factor)
        dy = (both[:, 0].sum() + 1 - w.sum()) / both[:, 1].sum()
        dw = dy * both[:, 1] - both[:, 0]
        dx = torch.stack([dw, -dw])
        dz = pull - z - ratio * dx
        step = 0.99 / torch.stack([-dx / x, -dz / z]).amax().clamp_min(0.99)  # at most 1, and strictly inside
        w, y, z = w + step * dw, y + step * dy, z + step * dz
    return w.clamp(0, c)
