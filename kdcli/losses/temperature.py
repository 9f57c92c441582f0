"""Temperatures that are learnt or follow the logits: CTKD and DTKD."""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SHARPNESS_FLOOR = 0.1
"""Least maximum logit that a temperature is made of. DTKD takes maxima to be positive, as a trained network's are; a
student that knows nothing yet, or logits shifted below zero, would make temperatures of zero or less."""


def reversal(epoch: float, *, decay_max: float = 0.0, decay_min: float = -1.0, decay_loops: int = 10) -> float:
    """lambda(epoch), what the temperature's gradient is multiplied by: a half cosine from decay_max to decay_min.

    Li et al. 2023, Curriculum Temperature for Knowledge Distillation (arXiv 2211.16231).
    """
    share = min(epoch / decay_loops, 1.0) if decay_loops else 1.0
    return decay_min + 0.5 * (decay_max - decay_min) * (1 + math.cos(math.pi * share))


def reversed_gradient(x: Float[Tensor, "..."], factor: float) -> Float[Tensor, "..."]:
    """`x`, to the bit, whose gradient comes back multiplied by `factor`: negative, and what descends for all others
    climbs for x."""
    return x.detach() + factor * (x - x.detach())


def dynamic_temperatures(
    student: Float[Tensor, "B K"], mentor: Float[Tensor, "*M B K"], *, tau: float
) -> tuple[Float[Tensor, "*M B"], Float[Tensor, "*M B"]]:
    """(T_s, T_m) of every sample: 2 tau, divided among the two as their largest logits are.

    Wei and Bai 2024, Dynamic Temperature Knowledge Distillation (arXiv 2404.12711). The gradient flows through the
    student's maximum. Guarded: a maximum below SHARPNESS_FLOOR counts as that.
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
