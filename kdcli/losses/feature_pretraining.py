"""The losses of methods with an initial stage: factor transfer and activation boundaries."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def factor_loss(
    student: Float[Tensor, "B C H W"],
    mentor: Float[Tensor, "B C H W"],
    *,
    p1: float = 2.0,
    p2: float = 1.0,
    variant: Literal["paper", "official"] = "paper",
) -> Float[Tensor, ""]:
    """mean |s - t|^p2 of the two networks' factors, each normalised per sample: FT, Kim et al. 2018 (arXiv 1802.04977).

    `paper` normalises the factors; `official`, the public re-implementation, the mean over channels of their p1-th
    powers. The mean over elements replaces the paper's norm, so that one weight fits all sizes.
    """

    def normal(x: Tensor) -> Tensor:
        x = x.abs().pow(p1).mean(1) if variant == "official" else x
        return F.normalize(x.flatten(1), dim=1)

    return (normal(student) - normal(mentor)).abs().pow(p2).mean()


def boundary_loss(
    student: Float[Tensor, "B C H W"], mentor: Float[Tensor, "B C H W"], *, margin: float = 1.0
) -> Float[Tensor, ""]:
    """The squared distance of the student's pre-activations from the mentor's side of zero, kept by a margin m.

    AB, Heo et al. 2019 (arXiv 1811.03233): (s + m)^2 where s > -m and t <= 0, (s - m)^2 where s <= m and t > 0, summed
    over the elements of a sample, batch mean.
    """
    wrong = torch.where(mentor > 0, F.relu(margin - student), F.relu(margin + student))  # Eq. 5
    return wrong.square().flatten(1).sum(1).mean()
