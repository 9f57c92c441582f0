"""Students that teach each other: the targets of DML, ONE, OKDDip and FFL, and the ramp of their weight."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

EPS = 1e-7
"""Added to the target's probabilities, as in the public code of DML, ONE, OKDDip and FFL: a gradient through the target
has no logarithm of zero."""


def peer_loss(
    student: Float[Tensor, "*N B K"], target: Float[Tensor, "*N B K"], *, tau: float = 3.0, eps: float = EPS
) -> Float[Tensor, "*N B"]:
    """D(target||student) = tau^2 * sum over classes of p (log p - log q), with p = softmax(target / tau) + eps.

    Both are logits. Gradient flows into the target unless it is detached.
    """
    p = F.softmax(target.float() / tau, -1) + eps
    return tau**2 * (p * (p.log() - F.log_softmax(student.float() / tau, -1))).sum(-1)


def mutual_loss(
    outs: Float[Tensor, "N B K"], *, tau: float = 3.0, pairwise: bool = True, through: bool = False, eps: float = EPS
) -> Float[Tensor, " B"]:
    """The sum over students of the loss against the others. DML (Zhang et al. 2018, arXiv 1706.00384).

    pairwise: the mean of D over the others; else D of the mean of the others' logits. through: gradient flows into the
    targets too.
    """
    n = len(outs)
    targets = outs if through else outs.detach()
    if pairwise:
        each = [[peer_loss(outs[j], targets[k], tau=tau, eps=eps) for k in range(n) if k != j] for j in range(n)]
        return torch.stack([torch.stack(one).mean(0) for one in each]).sum(0)  # Eq. 8
    others = (targets.sum(0) - targets) / (n - 1)  # Eq. 9
    return peer_loss(outs, others, tau=tau, eps=eps).sum(0)


def gated(outs: Float[Tensor, "N B K"], gate: Float[Tensor, "B N"]) -> Float[Tensor, "B K"]:
    """The logits of the ensemble, the branches weighted by the gate. ONE (Lan et al. 2018, arXiv 1806.04606)."""
    return (gate.float().T[..., None] * outs.float()).sum(0)


def attended(
    outs: Float[Tensor, "N B K"], queries: Float[Tensor, "N B d"], keys: Float[Tensor, "N B d"]
) -> Float[Tensor, "N B K"]:
    """The target of every peer a: all peers' logits weighted by the softmax over b of query_a . key_b, unscaled.

    OKDDip (Chen et al. 2020, arXiv 1912.00350). b includes the peer itself. Gradient flows through everything: queries
    and keys learn in no other way.
    """
    w = torch.einsum("aid,bid->abi", queries.float(), keys.float()).softmax(1)
    return torch.einsum("abi,bik->aik", w, outs.float())


def ramp(epoch: float, *, epochs: float) -> float:
    """exp(-5 (1 - min(epoch, epochs) / epochs)^2): the weight of the mutual teaching, small at first."""
    return math.exp(-5 * (1 - min(epoch, epochs) / epochs) ** 2) if epochs else 1.0
