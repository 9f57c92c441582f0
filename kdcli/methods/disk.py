"""DiSK: a guide learns which images the student may skip, in alternation with the student."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses import disk
from kdcli.losses.disk import TeacherTarget
from kdcli.methods.base import (
    Count,
    Epochs,
    Lesson,
    Method,
    Need,
    Phase,
    Positive,
    SetupContext,
    Share,
    Temperature,
    Terms,
    Weight,
)
from kdcli.methods.classifier import borrow
from kdcli.models.outputs import Output
from kdcli.recipe import TrainConfig

FIRST_GUIDE_EPOCHS = 5  # guide epochs before the student's first round in the authors' code


class DiSK(Method):
    """Kag et al., "Scaffolding a student to instill knowledge", ICLR 2023, Eq. 1-6 and Algorithm 1.

    In each round the guide, a small network on the teacher's pooled vectors and logits, learns `inner_epochs` epochs of
    Eq. 5 with the student frozen; then the student learns as many with the guide frozen. `train.epochs` counts the
    student's; with the guide's and `warm_epochs` a run has up to warm_epochs + 2 * train.epochs. The paper starts from
    students trained on labels: name a trained one (`student = "NAME@RUN"`) or set warm_epochs.

    variant: `official` selects the forms of the authors' code: the label in the mask, its target, max_ce = 5, the
        budget against the teacher's class, a term log(1 + K g), lambda without a special last period, five guide epochs
        first. Its guide network, which reads the last map, is not rebuilt.
    """

    tasks = frozenset({"classify"})

    lambda_: Tensor
    delta: Tensor
    student_tau: Tensor
    moving: Tensor

    K: Count = 20
    """The number of classes to which the guide adds its help, the teacher's best."""
    tau: Temperature = 4.0
    """Temperature of the teacher."""
    tau_s: Temperature | Literal["search"] | None = None
    """Temperature of the student; by default tau; `search`: each round the minimiser of the training set's KL."""
    alpha: Share = 0.1
    """Weight of the labels; 1 - alpha is that of the distance."""
    lambda_min: Weight = 0.1
    """Weight of the budget at the start of a period."""
    lambda_max: Weight = 50.0
    """Weight of the budget at the end of the last period."""
    period: Count = 50
    """Rounds over which the budget's weight rises; then it starts again."""
    budget: Weight | None = None
    """delta; by default the student's error on the training set before the first round."""
    budget_min: Weight | None = None
    """delta falls to this within budget_period rounds, then starts again; by default it is constant."""
    budget_period: Count = 20
    """Rounds over which delta falls."""
    budget_decay: Share = 1.0
    """Each fall starts from this share of the height before."""
    normaliser: Literal["wrong", "batch"] = "wrong"
    """The budget's sum is divided by the number of wrong predictions (A.5) or by the batch (Eq. 3)."""
    inner_epochs: Count = 3
    """Epochs of the guide, and of the student, in a round."""
    rounds: Count | None = None
    """Algorithm 1's R, as a check: train.epochs must be rounds * inner_epochs."""
    warm_epochs: Epochs = 0
    """Epochs on labels alone before the first round."""
    distance: Literal["logits", "features", "simkd"] = "logits"
    """Eq. 4; Eq. 6 on pooled vectors with a linear map; or Eq. 6 on SimKD's projected map (mean over its elements)."""
    beta: Weight = 1.0
    """Weight of Eq. 6."""
    average: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the student, which replaces the teacher (A.8); then no mentor is needed."""
    label_in_mask: bool | None = None
    """Whether the label's class gets the guide's help too; by default the variant's."""
    teacher_target: TeacherTarget | None = None
    """The teacher's target outside the mask, see `guided_target`; by default the variant's."""
    budget_against: Literal["label", "teacher"] | None = None
    """Whether the budget's cross-entropy is with the label or the teacher's class; by default the variant's."""
    max_ce: Positive | None = None
    """Upper bound of a sample's cross-entropy in the budget; by default the variant's."""
    log_term: bool | None = None
    """Whether the guide has a term log(1 + K g); by default the variant's."""
    variant: Literal["paper", "official"] = "paper"
    """The paper's forms, or those of the authors' code."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.budget_min is not None and self.budget is None:
            raise RecipeError(
                "method.budget_min: there is no budget to fall from", hint="Set method.budget too (0.6 to 0.4)."
            )
        if self.average is not None and self.distance == "simkd":
            raise RecipeError(
                'method.average: distance = "simkd" takes over the classifier of a teacher, and with a moving average '
                "there is no other teacher",
                hint='Leave method.average out, or use distance = "logits" or "features".',
            )
        self.official = self.variant == "official"
        self.label_in_mask = self.official if self.label_in_mask is None else self.label_in_mask
        self.target_form: TeacherTarget = self.teacher_target or ("minimum" if self.official else "full")
        self.budget_against = self.budget_against or ("teacher" if self.official else "label")
        self.max_ce = self.max_ce or (5.0 if self.official else None)
        self.log_term = self.official if self.log_term is None else self.log_term
        # the hinge is of a mean over the batch, which micro-batches would change; the guide has batch norm
        self.needs = frozenset({Need.POOLED, Need.HARD_TARGET, Need.FULL_BATCHES, Need.PAIRS})
        self.needs |= {Need.MAPS} if self.distance == "simkd" else set()
        self.teachers = 0 if self.average is not None else 1
        tau_s = self.tau_s if isinstance(self.tau_s, float) else self.tau
        starts = {"lambda_": self.lambda_min, "delta": self.budget or 0.0, "moving": 0.0, "student_tau": tau_s}
        for name, start in starts.items():
            self.register_buffer(name, torch.tensor(start))
        self.plan: list[tuple[str, int, bool]] = []  # (phase, round, whether the round begins) of every epoch

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        if self.average is not None:
            self.mean_student = context.new_student(0, None)
            self.mean_student.load_state_dict(context.student.state_dict())
        teacher = lesson.teacher if self.average is None else lesson.student
        width = teacher.vectors.shape[1]
        self.guide = nn.Sequential(
            *(nn.Linear(width + teacher.out.shape[1], 64), nn.BatchNorm1d(64), nn.ReLU()),
            *(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU()),
            nn.Linear(128, 1),  # the sigmoid is in the losses, as a logarithm
        )
        if self.distance == "features":
            self.embed = nn.Linear(lesson.student.vectors.shape[1], width)  # Psi
        elif self.distance == "simkd":
            self.two_maps = borrow(context, lesson)

    def learners(self) -> dict[str, nn.Module]:
        named: dict[str, nn.Module] = {"student": self.context.student, "guide": self.guide}
        named |= {"embed": self.embed} if self.distance == "features" else {}
        return named | ({"average": self.mean_student} if self.average is not None else {})

    def phases(self, train: TrainConfig) -> list[Phase]:
        """Algorithm 1: the guide first in every round; the last round has the remaining train.epochs."""
        each = self.inner_epochs
        rounds = -(-train.epochs // each)
        if self.rounds is not None and self.rounds * each != train.epochs:
            raise RecipeError(
                f"method.rounds = {self.rounds} of {each} student epochs make {self.rounds * each} epochs, "
                f"but train.epochs = {train.epochs}",
                hint=f"--set train.epochs={self.rounds * each}, or leave method.rounds out.",
            )
        student = ("student", "embed") if self.distance == "features" else ("student",)
        phases = [Phase("warm", self.warm_epochs, ("student",), train)] if self.warm_epochs else []
        self.plan = [("warm", 0, False)] * self.warm_epochs
        for r in range(rounds):
            guiding = FIRST_GUIDE_EPOCHS if self.official and r == 0 else each
            learning = min(each, train.epochs - r * each)
            phases += [Phase("guide", guiding, ("guide",), train), Phase("student", learning, student, train)]
            self.plan += [("guide", r, k == 0) for k in range(guiding)] + [("student", r, False)] * learning
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
        """Set the student's temperature, and before the first round its error, from the training set."""
        candidates = disk.temperatures(self.tau).to(self.student_tau.device)
        slope, wrong, count = torch.zeros(len(candidates)), 0.0, 0
        for lesson in lessons:
            out = lesson.student.out
            wrong, count = wrong + float((out.argmax(-1) != lesson.target).sum()), count + len(out)
            if self.tau_s == "search":
                teacher = self._teacher(lesson).out
                slope = slope + disk.temperature_slope(out, teacher, tau=self.tau, candidates=candidates).cpu()
        if self.tau_s == "search":
            self.student_tau.fill_(disk.best_temperature(slope, candidates.cpu()))
        if self.budget is None and r == 0:
            self.delta.fill_(wrong / count)

    def _teacher(self, lesson: Lesson) -> Output:
        return lesson.teacher if self.average is None else lesson.outputs["average"]

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        hard = lesson.hard()
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
        """The distance of every sample [B], Eq. 4 or Eq. 6."""
        if self.distance == "features":
            return self.beta * disk.guided_feature_loss(
                self.embed(lesson.student.vectors), teacher.vectors, log_g.exp()
            )
        if self.distance == "simkd":
            ours, theirs = self.two_maps(lesson)
            return self.beta * disk.guided_feature_loss(ours, theirs, log_g.exp()) / ours[0].numel()
        mask = disk.guided_classes(teacher.out, lesson.target if self.label_in_mask else None, K=self.K)
        target = disk.guided_target(teacher.out, mask, tau=self.tau, form=self.target_form)
        return disk.guided_loss(lesson.student.out, target, mask, log_g, tau=self.tau, tau_s=self.student_tau)

    def _over_budget(self, lesson: Lesson, teacher: Output, g: Tensor) -> Tensor:
        """By how much the guide's help exceeds its budget, Eq. 3."""
        out = lesson.student.out
        against = teacher.out.argmax(-1) if self.budget_against == "teacher" else lesson.target
        wrong = out.argmax(-1) != lesson.target if self.normaliser == "wrong" else None
        ce = -lesson.task.log_mark(out, against)  # without label smoothing
        return disk.budget_loss(g, ce, wrong, budget=self.delta, max_ce=self.max_ce)

    @torch.no_grad()
    def after(self, lesson: Lesson) -> None:
        if self.average is None:
            return
        theirs, ours = self.mean_student.state_dict(), self.context.student.state_dict()
        for name, value in theirs.items():
            if value.is_floating_point():  # `moving` is 0 while the guide learns
                value.lerp_(ours[name].to(value.dtype), self.moving * (1 - self.average))
            else:
                value.copy_(ours[name])
