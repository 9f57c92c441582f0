"""OFA's loss of the logits that a stage's projector gives (Hao et al. 2023, arXiv 2310.19444)."""

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
    """-sum_c w_c log q_c of every sample, with w_c = p_c^eps, and (1 + p_y)^eps - 1 for the true class y.

    p are the mentor's probabilities, q the student's, both at temperature tau and without a factor tau^2, as in the
    authors' code. At eps = 1 it is the cross-entropy of the two.
    """
    log_q = F.log_softmax(student.float() / tau, dim=-1)
    p = F.softmax(mentor.float() / tau, dim=-1)
    true = F.one_hot(target, student.shape[-1]).to(p)
    return -(((p + true) ** eps - true) * log_q).sum(-1)
