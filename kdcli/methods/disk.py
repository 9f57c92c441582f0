"""DiSK: a guide learns which images the student may pass over, in turns with the student."""

from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses import disk, log_mark
from kdcli.losses.disk import TeacherTarget
from kdcli.methods.base import Count, Lesson, Method, Phase, SetupContext, Share, Temperature, Terms, Weight
from kdcli.methods.classifier import borrow
from kdcli.models.outputs import Output
from kdcli.recipe import TrainConfig

Positive = Annotated[float, Field(gt=0)]
FIRST_GUIDE_EPOCHS = 5  # in the authors' code the guide has these before the student's first round


class DiSK(Method):
    """Kag et al., "Scaffolding a student to instill knowledge", ICLR 2023, Eq. 1-6 and Algorithm 1.

    Each round the guide, a small network on the teacher's pooled vectors and logits, learns `inner_epochs` epochs of
    Eq. 5 with the student frozen; then the student learns as many with the guide frozen. `train.epochs` counts the
    student's; with the guide's and `warm_epochs` a run has up to warm_epochs + 2 * train.epochs. The paper warm-starts
    its students on labels: name a trained one (`student = "NAME@RUN"`) or set warm_epochs.

    K: classes to which the guide adds its help, the teacher's best; label_in_mask: the label's too.
    tau, tau_s: temperatures; tau_s left out is tau, `search` the minimiser of the KL over the training set, each round.
    alpha: weight of cross-entropy, 1 - alpha that of the distance.
    lambda_min, lambda_max, period: the budget's weight over rounds; the last period ends at lambda_max.
    budget: delta, which left out is the student's error on the training set before the first round. With budget_min it
        falls to that in `budget_period` rounds, and again, each time from `budget_decay` of its last height.
    normaliser: the budget's sum is divided by the wrong predictions (A.5) or by the batch (Eq. 3).
    rounds: Algorithm 1's R, for a check; train.epochs must be rounds * inner_epochs.
    distance: `logits` is Eq. 4; `features` Eq. 6 of pooled vectors, the student's through a linear map; `simkd` Eq. 6
        of SimKD's projected map (mean over its elements), whose classifier the student takes over; beta: its weight.
    average: decay of the student's moving average, which then is the teacher (A.8); no mentor is needed.
    variant: `official` is the authors' code (papers.md section 4) in what decides about forms: the label in the mask,
        its target, max_ce = 5, budget against the teacher's class, a term log(1 + K g), lambda without a special last
        period, five guide epochs first. Its guide network, which reads the last map, is not rebuilt.
    """

    tasks = frozenset({"classify"})

    lambda_: Tensor
    delta: Tensor
    student_tau: Tensor
    moving: Tensor

    def __init__(
        self,
        K: Count = 20,
        tau: Temperature = 4.0,
        tau_s: Temperature | Literal["search"] | None = None,
        alpha: Share = 0.1,
        lambda_min: Weight = 0.1,
        lambda_max: Weight = 50.0,
        period: Count = 50,
        budget: Weight | None = None,
        budget_min: Weight | None = None,
        budget_period: Count = 20,
        budget_decay: Share = 1.0,
        normaliser: Literal["wrong", "batch"] = "wrong",
        inner_epochs: Count = 3,
        rounds: Count | None = None,
        warm_epochs: Annotated[int, Field(ge=0)] = 0,
        distance: Literal["logits", "features", "simkd"] = "logits",
        beta: Weight = 1.0,
        average: Annotated[float, Field(gt=0, lt=1)] | None = None,
        label_in_mask: bool | None = None,
        teacher_target: TeacherTarget | None = None,
        budget_against: Literal["label", "teacher"] | None = None,
        max_ce: Positive | None = None,
        log_term: bool | None = None,
        variant: Literal["paper", "official"] = "paper",
    ) -> None:
        super().__init__()
        if budget_min is not None and budget is None:
            raise RecipeError("method.budget_min: nothing to fall from", hint="Give method.budget too (0.6 to 0.4).")
        if average is not None and distance == "simkd":
            raise RecipeError(
                "method.average: SimKD takes over a teacher's classifier, and a moving average is no other teacher",
                hint='Leave method.average out, or use distance = "logits" or "features".',
            )
        official = variant == "official"
        self.K, self.tau, self.tau_s, self.alpha = K, tau, tau_s, alpha
        self.lambda_min, self.lambda_max, self.period = lambda_min, lambda_max, period
        self.budget, self.budget_min = budget, budget_min
        self.budget_period, self.budget_decay, self.normaliser = budget_period, budget_decay, normaliser
        self.inner_epochs, self.rounds, self.warm_epochs = inner_epochs, rounds, warm_epochs
        self.distance, self.beta, self.decay, self.official = distance, beta, average, official
        self.label_in_mask = official if label_in_mask is None else label_in_mask
        self.teacher_target: TeacherTarget = teacher_target or ("minimum" if official else "full")
        self.budget_against = budget_against or ("teacher" if official else "label")
        self.max_ce = max_ce or (5.0 if official else None)
        self.log_term = official if log_term is None else log_term
        # the hinge is of a mean over the batch, so micro-batches would be others; the guide has batch norm
        self.needs = frozenset({"pooled", "hard_target", "full_batches", "pairs"})
        self.needs |= {"maps"} if distance == "simkd" else set()
        self.teachers = 0 if average is not None else 1  # pyright: ignore[reportIncompatibleVariableOverride]
        for name, start in [("lambda_", lambda_min), ("delta", budget or 0.0), ("moving", 0.0)]:
            self.register_buffer(name, torch.tensor(start))
        self.register_buffer("student_tau", torch.tensor(tau_s if isinstance(tau_s, float) else tau))
        self.plan: list[tuple[str, int, bool]] = []  # of every epoch: its phase, its round, whether the round begins

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        if self.decay is not None:
            self.average = context.new_student(0, None)
            self.average.load_state_dict(context.student.state_dict())
        taught = lesson.teacher if self.decay is None else lesson.student
        width = taught.vectors.shape[1]
        self.guide = nn.Sequential(
            *(nn.Linear(width + taught.out.shape[1], 64), nn.BatchNorm1d(64), nn.ReLU()),
            *(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU()),
            nn.Linear(128, 1),  # its sigmoid is in the losses, as a logarithm
        )
        if self.distance == "features":
            self.embed = nn.Linear(lesson.student.vectors.shape[1], width)  # Psi
        elif self.distance == "simkd":
            self.two_maps = borrow(context, lesson)

    def learners(self) -> dict[str, nn.Module]:
        named: dict[str, nn.Module] = {"student": self.context.student, "guide": self.guide}
        named |= {"embed": self.embed} if self.distance == "features" else {}
        return named | ({"average": self.average} if self.decay is not None else {})

    def phases(self, train: TrainConfig) -> list[Phase]:
        """Algorithm 1: the guide first in every round; the last round has what is left of train.epochs."""
        each = self.inner_epochs
        rounds = -(-train.epochs // each)
        if self.rounds is not None and self.rounds * each != train.epochs:
            raise RecipeError(
                f"method.rounds = {self.rounds} of {each} student epochs are {self.rounds * each}, "
                f"but train.epochs = {train.epochs}",
                hint=f"--set train.epochs={self.rounds * each}, or leave method.rounds out.",
            )
        student = ("student", "embed") if self.distance == "features" else ("student",)
        phases = [Phase("warm", self.warm_epochs, ("student",), train)] if self.warm_epochs else []
        self.plan = [("warm", 0, False)] * self.warm_epochs
        for r in range(rounds):
            alone = FIRST_GUIDE_EPOCHS if self.official and r == 0 else each
            own = min(each, train.epochs - r * each)
            phases += [Phase("guide", alone, ("guide",), train), Phase("student", own, student, train)]
            self.plan += [("guide", r, k == 0) for k in range(alone)] + [("student", r, False)] * own
        return phases

    def begin_epoch(self, epoch: int, train_pass: Callable[[], Iterator[Lesson]]) -> None:
        name, r, begins = self.plan[epoch]
        self.moving.fill_(float(name != "guide"))
        if not begins:
            return
        weight = disk.lambda_at(
            r, self.plan[-1][1] + 1, lambda_min=self.lambda_min, lambda_max=self.lambda_max, period=self.period,
            last_monotone=not self.official,
        )  # fmt: skip
        self.lambda_.fill_(weight)
        if self.budget is not None and self.budget_min is not None:
            falling = {"period": self.budget_period, "decay": self.budget_decay}
            self.delta.fill_(disk.budget_at(r, budget_max=self.budget, budget_min=self.budget_min, **falling))
        if self.tau_s == "search" or (self.budget is None and r == 0):
            self._measure(train_pass(), r)

    def _measure(self, lessons: Iterator[Lesson], r: int) -> None:
        """The student's temperature, and before the first round its error, over the training set."""
        candidates = disk.temperatures(self.tau).to(self.student_tau.device)
        slope, wrong, count = torch.zeros(len(candidates)), 0.0, 0
        for lesson in lessons:
            out = lesson.student.out
            wrong, count = wrong + float((out.argmax(-1) != lesson.target).sum()), count + len(out)
            if self.tau_s == "search":
                taught = self._teacher(lesson).out
                slope = slope + disk.temperature_slope(out, taught, tau=self.tau, candidates=candidates).cpu()
        if self.tau_s == "search":
            self.student_tau.fill_(disk.best_temperature(slope, candidates.cpu()))
        if self.budget is None and r == 0:
            self.delta.fill_(wrong / count)

    def _teacher(self, lesson: Lesson) -> Output:
        return lesson.teacher if self.decay is None else lesson.outputs["average"]

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        hard = lesson.task.hard(lesson.student.out, lesson.target).mean()
        if phase.name == "warm":
            return {"hard": hard}
        teacher, guiding = self._teacher(lesson), phase.name == "guide"
        with torch.set_grad_enabled(guiding):
            z = self.guide(torch.cat([teacher.vectors, teacher.out.float()], -1))[:, 0]
            log_g = nn.functional.logsigmoid(z)
        g = log_g.exp()
        terms = {"hard": self.alpha * hard, "teacher": (1 - self.alpha) * self._distance(lesson, teacher, log_g).mean()}
        if guiding:  # the student is not trained on the budget
            terms["budget"] = self.lambda_ * self._over_budget(lesson, teacher, g)  # Eq. 5
            if self.log_term:
                terms["log_term"] = (1 - self.alpha) * (self.K * g).log1p().mean()
        lesson.notes |= {"guide": g.detach().mean(), "lambda": self.lambda_, "delta": self.delta}
        lesson.notes["tau_s"] = self.student_tau
        return terms

    def _distance(self, lesson: Lesson, teacher: Output, log_g: Tensor) -> Tensor:
        """[B], Eq. 4 or Eq. 6."""
        if self.distance == "features":
            return self.beta * disk.guided_feature_loss(
                self.embed(lesson.student.vectors), teacher.vectors, log_g.exp()
            )
        if self.distance == "simkd":
            ours, theirs = self.two_maps(lesson)
            return self.beta * disk.guided_feature_loss(ours, theirs, log_g.exp()) / ours[0].numel()
        mask = disk.guided_classes(teacher.out, lesson.target if self.label_in_mask else None, K=self.K)
        target = disk.guided_target(teacher.out, mask, tau=self.tau, form=self.teacher_target)
        return disk.guided_loss(lesson.student.out, target, mask, log_g, tau=self.tau, tau_s=self.student_tau)

    def _over_budget(self, lesson: Lesson, teacher: Output, g: Tensor) -> Tensor:
        """How far beyond its budget the guide helps, Eq. 3."""
        out = lesson.student.out
        against = teacher.out.argmax(-1) if self.budget_against == "teacher" else lesson.target
        wrong = out.argmax(-1) != lesson.target if self.normaliser == "wrong" else None
        return disk.budget_loss(g, -log_mark(out, against), wrong, budget=self.delta, max_ce=self.max_ce)

    @torch.no_grad()
    def after(self, lesson: Lesson) -> None:
        if self.decay is None:
            return
        theirs, ours = self.average.state_dict(), self.context.student.state_dict()
        for name, value in theirs.items():
            if value.is_floating_point():  # a guide's update moves nothing
                value.lerp_(ours[name].to(value.dtype), self.moving * (1 - self.decay))
            else:
                value.copy_(ours[name])
