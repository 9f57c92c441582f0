"""Contrast of samples with memories of the other network's vectors: CRD, Tian et al. 2020 (arXiv 1910.10699)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def draw_negatives(
    first: Int[Tensor, " B"], count: Int[Tensor, " B"], *, n_data: int, draws: int, generator: torch.Generator
) -> Int[Tensor, "B draws"]:
    """`draws` rows of other classes for every sample, out of `n_data` rows that are sorted by class.

    The sample's own class fills the `count` rows from `first` on. The other n = n_data - count rows, rotated by a
    random offset, are cut into `draws` stretches of equal length and one row is drawn from each: every row has the same
    probability (draws / n), none is drawn twice, and every other class is drawn in proportion. If more are requested
    than there are, rows repeat as evenly as possible. CRD's loss is a sum over negatives, so its expectation is that of
    independent draws. Shapes are fixed and no value is copied to the host.
    """
    device = first.device
    n = (n_data - count)[:, None]
    k = torch.arange(draws, device=device)
    low = k * n // draws
    length = (k + 1) * n // draws - low
    share = torch.rand(low.shape, generator=generator, device=device)
    row = low + torch.minimum((share * length).long(), length - 1).clamp_min(0)
    offset = torch.randint(2**31 - 1, (len(first), 1), generator=generator, device=device)
    row = (row + offset) % n
    return row + count[:, None] * (row >= first[:, None])  # skip the sample's own class


def log_scores(
    x: Float[Tensor, "B D"], memory: Float[Tensor, "N D"], rows: Int[Tensor, "B R"], *, temperature: float
) -> Float[Tensor, "B R"]:
    """log exp(x . memory[row] / temperature) for the rows of each sample.

    All N products are computed and those of the rows gathered: with CRD's number of negatives B x N numbers are far
    fewer than the B x R x D of gathered vectors.
    """
    return (x.float() @ memory.T / temperature).gather(1, rows)


def log_normaliser(scores: Float[Tensor, "B 1+R"], *, nce_k: int, n_data: int) -> Float[Tensor, ""]:
    """log Z of log-scores, the positive in column 0; a constant to the gradient.

    Z = (mean of the scores) * n_data, where each of the R negatives has the weight nce_k / R.
    """
    positive, negative = (x.detach().flatten() for x in scores.split([1, scores.shape[1] - 1], dim=1))
    log_mean = [x.logsumexp(0) - math.log(x.numel()) for x in (positive, negative)]
    return torch.logaddexp(log_mean[0], log_mean[1] + math.log(nce_k)) - math.log(1 + nce_k) + math.log(n_data)


def contrast(scores: Float[Tensor, "B 1+R"], *, nce_k: int, n_data: int, eps: float = 1e-7) -> Float[Tensor, ""]:
    """One network's part of the loss, from log-scores already divided by Z, the positive in column 0.

    -(sum_i log(pos / (pos + K Pn + eps)) + sum_ik log(K Pn / (neg + K Pn + eps))) / B, with Pn = 1 / n_data and K =
    nce_k, where each of the R negatives has the weight K / R: the critic's likelihood in its noise-contrastive form.
    Written as the softplus of log-scores it cannot overflow at any temperature.
    """
    k_pn = nce_k / n_data
    log_c = math.log(k_pn + eps)
    positive = F.softplus(log_c - scores[:, 0])  # -log(pos / (pos + c))
    negative = F.softplus(scores[:, 1:] - log_c) + (log_c - math.log(k_pn))  # -log(K Pn / (neg + c))
    return positive.mean() + nce_k * negative.mean()


def remembered(old: Float[Tensor, "B D"], new: Float[Tensor, "B D"], *, momentum: float = 0.5) -> Float[Tensor, "B D"]:
    """The rows of a memory after a batch: normalise(momentum * old + (1 - momentum) * embedding)."""
    return F.normalize(momentum * old + (1 - momentum) * new, dim=1)
