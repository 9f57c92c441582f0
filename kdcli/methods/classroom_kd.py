"""ClassroomKD: mentors are ranked on what they get right just now, and only the better ones teach."""

from typing import ClassVar, Literal

import torch

from kdcli import losses
from kdcli.errors import RecipeError
from kdcli.methods.base import Lesson, Method, Need, Phase, Temperature, Terms


class ClassroomKD(Method):
    """Sarode et al. 2024, arXiv 2409.20237, Eq. 1-14 and Algorithm 1.

    ranking: `batch` ranks once per batch (Eq. 4-5), `sample` every sample for itself (the abstract's words), `position`
        is method B (Eq. 13-14).
    mark_mean: how a batch's marks become one: `geometric` (Algorithm 1) or `arithmetic` (Eq. 4).
    filter: `rank` lets only mentors above the student teach (Eq. 6), `none` all.
    mentoring: `adaptive` temperatures (Eq. 8-9), `fixed` at tau (at 1 in the official variant, as the code has it), or
        `dtkd` (Table 5): every sample's own, DTKD's, for the student and each mentor, around tau (theirs: 4).
    gap: what the difference of ranks is divided by in Eq. 8.
    alpha: weight of the task loss: the student's `rank` (Eq. 10) or its `mark`; left out, what the variant says.
    beta, delta: Eq. 10-11. lambda_: the step between places in Eq. 14.
    variant: `official` is what the authors' code evaluates: shares rounded to two decimals, a mentor level with the
        student is active, alpha is the student's mark (papers.md section 2.1).
    """

    symmetric = True
    cures: ClassVar[dict[Need, str]] = {Need.FULL_BATCHES: "--set method.ranking=sample"}

    def __init__(
        self,
        tau: Temperature = 12.0,
        beta: float = 1.0,
        delta: float = 0.0,
        ranking: Literal["batch", "sample", "position"] = "batch",
        mark_mean: Literal["geometric", "arithmetic"] = "geometric",
        filter: Literal["rank", "none"] = "rank",
        mentoring: Literal["adaptive", "fixed", "dtkd"] = "adaptive",
        gap: Literal["max", "mentor", "student"] = "max",
        alpha: Literal["rank", "mark"] | None = None,
        lambda_: float = 0.1,
        variant: Literal["paper", "official"] = "paper",
    ) -> None:
        super().__init__()
        if variant == "official" and ranking != "batch":
            raise RecipeError(
                f"method.variant: the authors' code ranks whole batches; ranking = {ranking!r} has no official form",
                hint='Use variant = "paper" with this ranking, or ranking = "batch".',
            )
        self.tau, self.beta, self.delta, self.lambda_ = tau, beta, delta, lambda_
        self.ranking, self.filter, self.mentoring, self.official = ranking, filter, mentoring, variant == "official"
        self.mark_mean: Literal["geometric", "arithmetic"] = mark_mean
        self.gap: Literal["max", "mentor", "student"] = gap
        if mentoring == "dtkd":  # which reads the largest logit of a softmax
            self.tasks = frozenset({"classify"})
        self.alpha = alpha or ("mark" if self.official else "rank")
        # one average over the batch decides for all its samples, so micro-batches would be other batches
        self.needs = frozenset({"hard_target"} if ranking == "sample" else {"hard_target", "full_batches"})

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        task, target = lesson.task, lesson.target
        y_s, y_m = lesson.student.out.float(), lesson.mentors_out  # [B, K], [M, B, K]

        with torch.no_grad():  # ranks, gates and temperatures are plain numbers to the gradient
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
        if self.mentoring == "dtkd":  # as DTKD has it, the gradient flows through the student's temperature
            tau_s, tau = losses.dynamic_temperatures(y_s, y_m, tau=self.tau)
            soft = losses.dtkd_loss(y_s, y_m, tau_s=tau_s, tau_m=tau)  # [M, B]
        else:
            soft = task.soft(y_s, y_m, tau)  # Eq. 7: [M, B]
        lesson.notes["temperature"] = tau.detach().mean(-1)
        terms = {
            "hard": (alpha * hard).mean(),
            "mentors": self.beta * (active * r_m * soft).sum(0).mean(),  # Eq. 10
        }
        if self.delta:  # Eq. 11: plain distillation from the teacher beside the classroom
            terms["hard"] = terms["hard"] + self.delta * hard.mean()
            terms["teacher"] = self.delta * task.soft(y_s, y_m[0], 1.0).mean()
        return terms
