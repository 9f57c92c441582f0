"""Losses on intermediate maps: AT, SP, NST, VID. (FitNets' hint loss is F.mse_loss.)"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def attention(maps: Float[Tensor, "B C H W"], *, p: float = 2.0) -> Float[Tensor, "B HW"]:
    """AT's attention map: the channel mean of |activation|^p, flattened and L2-normalised per sample."""
    return F.normalize(maps.float().abs().pow(p).mean(1).flatten(1), dim=1)


def attention_loss(
    student: Float[Tensor, "B C H W"], mentor: Float[Tensor, "B D H W"], *, p: float = 2.0
) -> Float[Tensor, ""]:
    """AT (arXiv 1612.03928): the mean over batch and positions of the squared difference of the attention maps."""
    return F.mse_loss(attention(student, p=p), attention(mentor, p=p))


def similarity_loss(student: Float[Tensor, "B ..."], mentor: Float[Tensor, "B ..."]) -> Float[Tensor, ""]:
    """SP (arXiv 1907.09682): the similarities of the samples of a batch.

    The sum of squared differences of the two B x B Gram matrices, their rows L2-normalised, divided by B^2.
    """
    s, t = (F.normalize(x @ x.T, dim=1) for x in (student.float().flatten(1), mentor.float().flatten(1)))
    return F.mse_loss(s, t)


def selectivity_loss(student: Float[Tensor, "B C H W"], mentor: Float[Tensor, "B D H W"]) -> Float[Tensor, ""]:
    """NST (arXiv 1707.01219): the squared MMD between the channels of two maps, each flattened and L2-normalised, with
    the kernel k(x, y) = (x . y)^2: mean k(t, t) + mean k(s, s) - 2 mean k(s, t).

    This kernel is the inner product of the matrices x x^T, so the distance is that of their means over channels, the
    second moments of a map (positions x positions). These are compared if there are at most as many positions as
    channels, else the kernels of all pairs of channels; the result is the same.
    """
    s, t = (F.normalize(x.float().flatten(2), dim=2) for x in (student, mentor))
    if s.shape[2] <= max(s.shape[1], t.shape[1]):
        moments = [x.mT @ x / x.shape[1] for x in (s, t)]
        return (moments[0] - moments[1]).square().sum((1, 2)).mean()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT).square().mean()

    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def variational_loss(
    mean: Float[Tensor, "B D H W"], mentor: Float[Tensor, "B D H W"], variance: Float[Tensor, " D"]
) -> Float[Tensor, ""]:
    """VID (arXiv 1904.05835): the mean of ((mean - mentor)^2 / variance + log variance) / 2.

    The negative log-likelihood, without its constant, of the mentor's map under a Gaussian predicted from the
    student's; it can be negative if a variance is below one.
    """
    variance = variance.float()[:, None, None]
    return 0.5 * ((mean.float() - mentor.float()).square() / variance + variance.log()).mean()


def channel_variance(log_scale: Float[Tensor, " D"], *, eps: float = 1e-5) -> Float[Tensor, " D"]:
    """VID's variance of every channel of the mentor: the softplus of the learned parameter, plus eps."""
    return F.softplus(log_scale) + eps


def log_scale(init_variance: float, *, eps: float = 1e-5) -> Float[Tensor, ""]:
    """The inverse of `channel_variance`: log(exp(init_variance - eps) - 1)."""
    excess = torch.tensor(init_variance - eps, dtype=torch.float64)
    return (excess + torch.log(-torch.expm1(-excess))).float()  # the same value without overflow
