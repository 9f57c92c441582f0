"""OFA's loss, and SHAKE's standardised logits: what methods ask of heads they put on maps."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def ofa_loss(
    student: Float[Tensor, "B K"],
    mentor: Float[Tensor, "B K"],
    target: Int[Tensor, " B"],
    *,
    eps: float = 1.0,
    tau: float = 1.0,
) -> Float[Tensor, " B"]:
    """-sum_c w_c log q_c of every sample, with w_c = p_c^eps, but (1 + p_y)^eps - 1 for the true class y.

    OFA, Hao et al. 2023 (arXiv 2310.19444), as the authors' code evaluates it; p is the mentor's answer, q the
    student's, both at temperature tau, without tau^2. At eps = 1 it is the cross-entropy of the two.
    """
    log_q = F.log_softmax(student.float() / tau, dim=-1)
    p = F.softmax(mentor.float() / tau, dim=-1)
    true = F.one_hot(target, student.shape[-1]).to(p)
    return -(((p + true) ** eps - true) * log_q).sum(-1)


def standardise(out: Float[Tensor, "B K"], *, logit_scale: float = 3.1415, eps: float = 1e-7) -> Float[Tensor, "B K"]:
    """Every sample's logits with mean 0 and variance 1 over the classes, times `logit_scale`: SHAKE, Li et al. 2022."""
    return logit_scale * F.layer_norm(out.float(), out.shape[-1:], eps=eps)
