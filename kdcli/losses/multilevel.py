"""Multi-level logit distillation's relations between samples and between classes (Jin et al., CVPR 2023)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def class_level_loss(
    student: Float[Tensor, "B K"], mentor: Float[Tensor, "*M B K"], *, tau: float
) -> Float[Tensor, "*M"]:
    """||P_m^T P_m - P_s^T P_s||^2 / K: how much classes are thought alike, over the batch; no tau^2."""
    p, q = (F.softmax(x.float() / tau, -1) for x in (mentor, student))
    return (p.mT @ p - q.mT @ q).square().sum((-2, -1)) / student.shape[-1]


def batch_level_loss(
    student: Float[Tensor, "B K"], mentor: Float[Tensor, "*M B K"], *, tau: float
) -> Float[Tensor, "*M"]:
    """||P_m P_m^T - P_s P_s^T||^2 / B: how much samples are thought alike; no tau^2."""
    p, q = (F.softmax(x.float() / tau, -1) for x in (mentor, student))
    return (p @ p.mT - q @ q.mT).square().sum((-2, -1)) / student.shape[-2]
