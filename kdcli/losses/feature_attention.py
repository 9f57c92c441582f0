"""Feature losses with an attention: over stages (SemCKD), over positions (SMKD)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def similarity(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B B"]:
    """The Gram matrix of a batch's flattened maps, from which SemCKD computes queries and keys."""
    flat = x.flatten(1)
    return flat @ flat.T


def stage_attention(
    query: Float[Tensor, "S B D"], key: Float[Tensor, "T B D"], *, soft: float = 1.0
) -> Float[Tensor, "B S T"]:
    """The weight of each teacher stage for each student stage and sample; sums to 1 over the teacher's stages.

    SemCKD, Chen et al. 2021 (arXiv 2012.03236): softmax over t of query . key / soft.
    """
    return F.softmax(torch.einsum("sbd,tbd->bst", query, key) / soft, dim=-1)


def semckd_loss(attention: Float[Tensor, "B S T"], distance: Float[Tensor, "B S T"]) -> Float[Tensor, ""]:
    """sum_{b,s,t} attention * distance / (B * S); `distance` is the mean squared error of each pair and sample."""
    return (attention * distance).sum(-1).mean()


def spatial_matching(
    query: Float[Tensor, "B C H W"],
    key: Float[Tensor, "B C H W"],
    value: Float[Tensor, "B C H W"],
    *,
    form: Literal["official", "transposed"] = "official",
) -> Float[Tensor, "B C H W"]:
    """The student's map for comparison with the teacher's: every position is a mixture of all student positions.

    One-to-all spatial matching, Lin et al. 2022 (TaT, arXiv 2205.10793): query and value come from the student, key is
    the teacher's map. `official`, the authors' code: A = softmax over the teacher's positions j of query_i . key_j, and
    position i becomes sum_j A_ij value_j. `transposed`, the paper's text: softmax over the student's positions i, and
    the teacher's position j is matched by sum_i A_ij value_i. Neither is scaled.
    """
    q, k, v = query.flatten(2), key.flatten(2), value.flatten(2)  # [B, C, N]
    score = torch.einsum("bci,bcj->bij", q, k)
    if form == "official":
        mixed = torch.einsum("bij,bcj->bci", F.softmax(score, dim=2), v)
    else:
        mixed = torch.einsum("bij,bci->bcj", F.softmax(score, dim=1), v)
    return mixed.unflatten(2, query.shape[2:])
