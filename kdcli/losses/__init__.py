"""The losses as pure functions, one equation each, a file per family.

The student comes first, then the mentor [B, K] or the mentors [M, B, K], then the target; hyper-parameters are
keyword-only and named as in the papers. Everything is computed in float32 and stays finite, gradient included, for
logits up to 1e4: probabilities are only ever touched as log-softmax and log-sum-exp.
"""

from kdcli.losses.classroom_kd import (
    GAP_LIMIT,
    log_batch_mark,
    log_mark,
    performance_gap,
    rank_by_position,
    rank_by_share,
    soft_loss,
)
from kdcli.losses.logits import dist_loss, dkd_loss, nkd_loss, wsld_loss
from kdcli.losses.multilevel import batch_level_loss, class_level_loss
from kdcli.losses.temperature import dtkd_loss, dynamic_temperatures, reversal, reversed_gradient

__all__ = [
    "GAP_LIMIT",
    "batch_level_loss",
    "class_level_loss",
    "dist_loss",
    "dkd_loss",
    "dtkd_loss",
    "dynamic_temperatures",
    "log_batch_mark",
    "log_mark",
    "nkd_loss",
    "performance_gap",
    "rank_by_position",
    "rank_by_share",
    "reversal",
    "reversed_gradient",
    "soft_loss",
    "wsld_loss",
]
