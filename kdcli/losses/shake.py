"""SHAKE's standardised logits (Li and Jin 2022)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def standardise(out: Float[Tensor, "B K"], *, logit_scale: float = 3.1415, eps: float = 1e-7) -> Float[Tensor, "B K"]:
    """The logits of every sample with mean 0 and variance 1 over the classes, times `logit_scale`."""
    return logit_scale * F.layer_norm(out.float(), out.shape[-1:], eps=eps)
