"""Distillation and marks for independent classes, each with a yes-or-no label."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def binary_soft_loss(
    student: Float[Tensor, "*B K"], mentor: Float[Tensor, "*M B K"], *, tau: float | Float[Tensor, "..."]
) -> Float[Tensor, "*M B"]:
    """tau^2 * sum_k KL(Bernoulli(sigmoid(mentor_k / tau)) || Bernoulli(sigmoid(student_k / tau))) of every image.

    The tempered KL of Hinton et al. 2015 (arXiv 1503.02531) for independent classes. `tau` is a number or broadcasts
    to [*M, B].
    """
    if not isinstance(tau, Tensor):
        tau = torch.full((), tau, dtype=torch.float32, device=student.device)  # no copy from the host
    t, s = mentor.float() / tau[..., None], student.float() / tau[..., None]
    yes = t.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(s))
    no = (-t).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return tau**2 * (yes + no).sum(-1)


def log_mean_mark(out: Float[Tensor, "*M B K"], target: Float[Tensor, "B K"]) -> Float[Tensor, "*M B"]:
    """log of (1/K) sum_k p_k, with p_k the probability of the right answer, yes or no, for class k.

    It replaces ClassroomKD's probability of the true class (Eq. 2-3); as a log-sum-exp it cannot underflow.
    """
    right = F.logsigmoid(torch.where(target > 0.5, out.float(), -out.float()))
    return right.logsumexp(-1) - math.log(out.shape[-1])
