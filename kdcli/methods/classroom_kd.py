"""ClassroomKD: mentors are ranked by how well they answer the current batch, and only those above the student teach."""

from typing import Any, ClassVar, Literal

import torch

from kdcli.errors import RecipeError
from kdcli.losses import classroom_kd as losses
from kdcli.losses.logits import dtkd_loss, dynamic_temperatures
from kdcli.methods.base import Lesson, Method, Need, Phase, Temperature, Terms


class ClassroomKD(Method):
    """Sarode et al. 2024 (arXiv 2409.20237), Eq. 1-14 and Algorithm 1.

    variant: `official` is what the authors' code computes: shares rounded to two decimals, a mentor level with the
        student is active, alpha is the student's mark.
    """

    cures: ClassVar[dict[Need, str]] = {Need.FULL_BATCHES: "--set method.ranking=sample"}

    tau: Temperature = 12.0
    """Base temperature of the mentors and the student."""
    beta: float = 1.0
    """Weight of the mentors' terms (Eq. 10)."""
    delta: float = 0.0
    """Weight of an additional plain distillation from the teacher (Eq. 11)."""
    ranking: Literal["batch", "sample", "position"] = "batch"
    """Rank once per batch (Eq. 4-5), for each sample, or by position (method B, Eq. 13-14)."""
    mark_mean: Literal["geometric", "arithmetic"] = "geometric"
    """How the marks of a batch become one: geometric mean (Algorithm 1) or arithmetic mean (Eq. 4)."""
    filter: Literal["rank", "none"] = "rank"
    """Which mentors teach: those ranked above the student (Eq. 6), or all."""
    mentoring: Literal["adaptive", "fixed", "dtkd"] = "adaptive"
    """Temperatures: by the gap (Eq. 8-9), always tau (official: 1), or DTKD's for each sample (Table 5)."""
    gap: Literal["max", "mentor", "student"] = "max"
    """What the difference of ranks is divided by in Eq. 8."""
    alpha: Literal["rank", "mark"] | None = None
    """Weight of the task loss: the student's rank (Eq. 10) or its mark; by default the variant's."""
    lambda_: float = 0.1
    """Step between positions in Eq. 14."""
    variant: Literal["paper", "official"] = "paper"
    """The paper's equations, or what the authors' code computes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.official = self.variant == "official"
        if self.official and self.ranking != "batch":
            raise RecipeError(
                f"method.variant: the authors' code ranks whole batches; ranking = {self.ranking!r} has no official "
                "form",
                hint='Use variant = "paper" with this ranking, or ranking = "batch".',
            )
        self.alpha = self.alpha or ("mark" if self.official else "rank")
        if self.mentoring == "dtkd":  # which reads the largest logit of a softmax
            self.tasks = frozenset({"classify"})
        self.needs = frozenset({Need.HARD_TARGET})
        if self.ranking != "sample":  # one mean over the batch decides for all its samples
            self.needs |= {Need.FULL_BATCHES}

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        task, target = lesson.task, lesson.target
        y_s, y_m = lesson.student.out.float(), lesson.mentors_out  # [B, K], [M, B, K]

        with torch.no_grad():  # ranks, gates and temperatures are constants to the gradient
            log_w = task.log_mark(torch.cat([y_s[None], y_m.float()]), target)  # Eq. 1-3: [M+1, B], student first
            if self.ranking != "sample":
                log_w = losses.log_batch_mark(log_w, mark_mean=self.mark_mean)[:, None]  # Eq. 4: [M+1, 1]
            if self.ranking == "position":
                r = losses.rank_by_position(log_w, lambda_=self.lambda_)  # Eq. 13-14
            else:
                r = losses.rank_by_share(log_w, decimals=2 if self.official else None)  # Eq. 5
            r_s, r_m = r[0], r[1:]
            active = r_m >= r_s if self.official else r_m > r_s  # Eq. 6
            if self.filter == "none":
                active = torch.ones_like(active)
            gap = losses.performance_gap(r_m, r_s, gap=self.gap)  # Eq. 8
            if self.mentoring == "adaptive":
                tau = 1 + gap * self.tau  # Eq. 9
            else:
                tau = torch.full_like(gap, 1.0 if self.official else self.tau)
            alpha = r_s if self.alpha == "rank" else log_w[0].exp()
            lesson.notes |= {
                "rank": r.mean(-1),
                "mark": log_w.exp().mean(-1),
                "active": active.float().mean(-1),
            }

        hard = task.hard(y_s, target)  # [B]
        if self.mentoring == "dtkd":  # as in DTKD, the gradient flows through the student's temperature
            tau_s, tau = dynamic_temperatures(y_s, y_m, tau=self.tau)
            soft = dtkd_loss(y_s, y_m, tau_s=tau_s, tau_m=tau)  # [M, B]
        else:
            soft = task.soft(y_s, y_m, tau)  # Eq. 7: [M, B]
        lesson.notes["temperature"] = tau.detach().mean(-1)
        terms = {
            "hard": (alpha * hard).mean(),
            "mentors": self.beta * (active * r_m * soft).sum(0).mean(),  # Eq. 10
        }
        if self.delta:  # Eq. 11: plain distillation from the teacher, added to the classroom's
            terms["hard"] = terms["hard"] + self.delta * hard.mean()
            terms["teacher"] = self.delta * task.soft(y_s, y_m[0], 1.0).mean()
        return terms
