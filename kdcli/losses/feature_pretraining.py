"""The losses of methods with a stage of their own: factor transfer and activation boundaries."""

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

    `paper` normalises the factors themselves; `official`, the public re-implementation, the mean over channels of
    their p1-th powers. The mean over elements stands for the paper's norm, so that one weight serves all sizes.
    """

    def normal(x: Tensor) -> Tensor:
        x = x.abs().pow(p1).mean(1) if variant == "official" else x
        return F.normalize(x.flatten(1), dim=1)

    return (normal(student) - normal(mentor)).abs().pow(p2).mean()


def boundary_loss(
    student: Float[Tensor, "B C H W"], mentor: Float[Tensor, "B C H W"], *, margin: float = 1.0
) -> Float[Tensor, ""]:
    """How far the student's pre-activations are from the mentor's side of zero by a margin, per sample.

    AB, Heo et al. 2019 (arXiv 1811.03233), Eq. 5: (s + m)^2 where s > -m and t <= 0, (s - m)^2 where s <= m and t > 0,
    summed over a sample's elements.
    """
    wrong = torch.where(mentor > 0, F.relu(margin - student), F.relu(margin + student))
    return wrong.square().flatten(1).sum(1).mean()
