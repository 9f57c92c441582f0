"""DiSK: distillation in which a guide lets a small student skip what it cannot learn (Kag et al., ICLR 2023).

The guide's decision g in (0, 1) is given as its logarithm, so that log(s + g) is a log-sum-exp and has a gradient
however small both are. Tensors may have further dimensions in front, [*R, B, C]: many runs at once.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

TeacherTarget = Literal["full", "minimum", "zero"]


def guided_classes(
    teacher: Float[Tensor, "*R B C"], target: Int[Tensor, " B"] | None = None, *, K: int
) -> Bool[Tensor, "*R B C"]:
    """1[y in top_K(t(x))] of Eq. 4: the classes to which the guide's help is added; with `target` the label's too."""
    best = teacher.topk(min(K, teacher.shape[-1]), dim=-1).indices
    mask = torch.zeros_like(teacher, dtype=torch.bool).scatter(-1, best, True)
    if target is not None:
        mask = mask.scatter(-1, target.expand(teacher.shape[:-1])[..., None], True)
    return mask


def guided_target(
    teacher: Float[Tensor, "*R B C"], mask: Bool[Tensor, "*R B C"], *, tau: float, form: TeacherTarget = "full"
) -> Float[Tensor, "*R B C"]:
    """The target of the student: `full` is t^tau over all classes, as in Eq. 4.

    The authors' code has two other forms: outside the mask the teacher's logit is replaced by the smallest of its raw
    logits (`minimum`) or by 0 (`zero`), and after the softmax the probabilities of those classes are dropped without
    renormalising.
    """
    z = teacher.float()
    if form == "full":
        return F.softmax(z / tau, dim=-1)
    outside = z.amin(-1, keepdim=True) if form == "minimum" else torch.zeros_like(z)
    return F.softmax(torch.where(mask, z / tau, outside), dim=-1) * mask


def guided_loss(
    student: Float[Tensor, "*R B C"],
    target: Float[Tensor, "*R B C"],
    mask: Bool[Tensor, "*R B C"],
    log_g: Float[Tensor, "*R B"],
    *,
    tau: float,
    tau_s: float | Float[Tensor, ""],
) -> Float[Tensor, "*R B"]:
    """-tau tau_s sum_y t_y log(s_y + 1[y in top_K] g) of every sample; `target` is a `guided_target`.

    A cross-entropy without renormalisation: it is negative where s + g is above 1.
    """
    log_s = F.log_softmax(student.float() / tau_s, dim=-1)
    log_h = torch.where(mask, torch.logaddexp(log_s, log_g[..., None]), log_s)
    return -tau * tau_s * (target * log_h).sum(-1)  # Eq. 4


def budget_loss(
    g: Float[Tensor, "*R B"],
    cross_entropy: Float[Tensor, "*R B"],
    wrong: Bool[Tensor, "*R B"] | None = None,
    *,
    budget: float | Float[Tensor, ""],
    max_ce: float | None = None,
) -> Float[Tensor, "*R"]:
    """[mean of g * cross-entropy - delta]_+: the guide's help is limited, and meant for wrong predictions.

    With `wrong` the sum is divided by the number of wrong predictions (appendix A.5), at least 1. `max_ce` bounds the
    cross-entropy of a sample, as the authors' code does (5).
    """
    count = g.shape[-1] if wrong is None else wrong.sum(-1).clamp_min(1)
    ce = cross_entropy if max_ce is None else cross_entropy.clamp_max(max_ce)
    return F.relu((g * ce).sum(-1) / count - budget)  # Eq. 3


def guided_feature_loss(
    student: Float[Tensor, "B *D"], teacher: Float[Tensor, "B *D"], g: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """(1 - g) ||Psi(f_s) - f_t||^2 of every sample: the guide reduces the weight of a sample.

    The minus sign of the equation in the paper would push the features apart and is taken for a misprint.
    """
    return (1 - g) * (student.float() - teacher.float()).square().flatten(1).sum(-1)  # Eq. 6


def lambda_at(
    round_: int, rounds: int, *, lambda_min: float, lambda_max: float, period: int, last_monotone: bool = True
) -> float:
    """The weight of the budget in round `round_` (from 0) of `rounds`: Algorithm 1, lines 3 and 8.

    It rises along a half cosine and falls back to lambda_min after every `period` rounds. `last_monotone`: the last
    period, however long, reaches lambda_max in the last round, so that training ends within the budget.
    """
    start = (rounds - 1) // period * period
    at, length = round_ % period, period
    if last_monotone and round_ >= start:
        at, length = round_ - start, rounds - 1 - start
    share = at / length if length else 1.0
    return lambda_min + (lambda_max - lambda_min) * (1 - math.cos(math.pi * share)) / 2


def budget_at(round_: int, *, budget_max: float, budget_min: float, period: int, decay: float = 1.0) -> float:
    """delta in round `round_` (from 0).

    It falls along a half cosine and starts again, each time from `decay` times the height before. The paper keeps delta
    constant; the authors' code goes from 0.6 to 0.4 in 20 rounds with decay 0.9.
    """
    top = budget_max * decay ** (round_ // period)
    return top + (budget_min - top) * (1 - math.cos(math.pi * (round_ % period) / period)) / 2


def temperatures(tau: float, n: int = 65) -> Float[Tensor, " n"]:
    """Student temperatures for `best_temperature`: tau / 16 to 16 tau, evenly spaced in the logarithm."""
    return tau * torch.logspace(-4, 4, n, base=2.0)


def temperature_slope(
    student: Float[Tensor, "B C"], teacher: Float[Tensor, "B C"], *, tau: float, candidates: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """d/d(1/tau') of sum_i KL(t^tau || s^tau'), at each candidate tau'.

    KL is convex in 1/tau', so its only minimum is where this sum over the training set changes its sign.
    """
    z, t = student.double(), F.softmax(teacher.double() / tau, dim=-1)
    wanted = (t * z).sum(-1).sum()
    given = torch.stack([(F.softmax(z / each, dim=-1) * z).sum(-1).sum() for each in candidates.unbind()])
    return given - wanted


def best_temperature(slope: Float[Tensor, " n"], candidates: Float[Tensor, " n"]) -> float:
    """tau_{t,s,D} = argmin over tau' of sum_i KL(t^tau || s^tau') (below Eq. 4), from the summed slopes.

    The candidates ascend; if the minimum is outside their range, the nearer end.
    """
    rising = slope > 0  # 1/tau' is too large: the minimum is at a higher temperature
    at = int(rising.sum())
    if at in (0, len(candidates)):
        return float(candidates[min(at, len(candidates) - 1)])
    low, high = float(slope[at - 1]), float(slope[at])
    share = low / (low - high)
    x0, x1 = 1 / float(candidates[at - 1]), 1 / float(candidates[at])
    return 1 / (x0 + (x1 - x0) * share)
