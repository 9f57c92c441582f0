"""TeKAP: noise turns one teacher into several; as a method, and around any other method that reads logits."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses import crd as losses
from kdcli.methods import fields
from kdcli.methods.base import Count, Lesson, Method, Need, Phase, SetupContext, Share, Temperature, Terms, Weight
from kdcli.methods.baselines import KD
from kdcli.methods.crd import Contrast, Momentum
from kdcli.models.member import Member
from kdcli.models.outputs import Output
from kdcli.recipe import TrainConfig


def noisy(x: Tensor, noise_weight: float, generator: torch.Generator, std: float = 1.0) -> Tensor:
    """alpha * eta + (1 - alpha) * x with eta from N(0, std^2) and alpha = `noise_weight`: the slides' noise."""
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return (1 - noise_weight) * x.float() + noise_weight * std * noise


class Perspectives(Method):
    """TeKAP around another method (`tekap = true`, or a table of these options, among that method's options).

    All terms of the method except `hard` are computed again on each of `n` copies of the mentors with fresh noise in
    their logits; features stay as they are. The sum of these terms is the term `tekap`.
    """

    n: Count = 3
    """The number of noisy copies of the mentors."""
    noise_weight: Share = 0.1
    """Share of the noise in each copy's logits."""
    weight_original: Weight = 1.0
    """Weight of the method's own terms."""
    weight_augmented: Weight = 0.8
    """Weight of the sum over the noisy copies."""
    lambda_: Share | None = None
    """Makes these two weights lambda_ and 1 - lambda_, the form of the slides."""

    def __init__(self, method: Method, **options: Any) -> None:
        super().__init__(**options)
        self.method = method
        original, augmented = self.weight_original, self.weight_augmented
        self.weights = (original, augmented) if self.lambda_ is None else (self.lambda_, 1 - self.lambda_)
        self.needs, self.teachers, self.capturable = method.needs, method.teachers, method.capturable
        self.tasks = method.tasks

    @classmethod
    def around(cls, method: Method, label: str, given: Any, where: str) -> Method:
        """This around the method called `label`: `given` is true or a table of options. Raises RecipeError."""
        if not isinstance(given, bool | dict):
            raise RecipeError(
                f"{where}: true, or a table of its options (given {given!r})",
                hint="For example: --set method.tekap.n=3",
            )
        if isinstance(method, TeKAP):
            raise RecipeError(f"{where}: method {label} is TeKAP already", hint="Leave it out.")
        if not method.reads_logits:
            raise RecipeError(
                f"{where}: it adds noise to the mentors' logits, and method {label} learns from features alone",
                hint='Leave it out; TeKAP\'s own feature form is name = "tekap", parts = "features".',
            )
        if not method.teachers:
            raise RecipeError(
                f"{where}: it adds noise to the mentors' logits, and method {label} has no mentors",
                hint="Leave it out, or choose a method that learns from mentors (kd, dkd).",
            )
        table = given if isinstance(given, dict) else {}
        return cls(method, **fields.validated("tekap", cls.options(), table, where))

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        self.method.context = context
        self.method.setup(context, lesson)

    def learners(self) -> dict[str, nn.Module]:
        return self.method.learners()

    def phases(self, train: TrainConfig) -> list[Phase]:
        return self.method.phases(train)

    def begin_epoch(self, epoch: int, train_pass: Callable[[], Iterator[Lesson]]) -> None:
        self.method.begin_epoch(epoch, train_pass)

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        copies: list[Tensor] = []
        for _ in range(self.n):
            noisy_lesson = replace(lesson, mentors=self._noisy(lesson.mentors, lesson.generator), notes={})
            terms = self.method.loss(noisy_lesson, phase)
            copies += [value for name, value in terms.items() if name != "hard"]
        own = self.method.loss(lesson, phase)  # last, so that what it keeps for `after` belongs to the real lesson
        terms = {name: value if name == "hard" else self.weights[0] * value for name, value in own.items()}
        if copies:
            terms["tekap"] = self.weights[1] * torch.stack(copies).sum()
        return terms

    def _noisy(self, mentors: list[Output], generator: torch.Generator) -> list[Output]:
        """The mentors with noise in their logits, and in those of the second view if the method reads it."""
        if not mentors:
            return []
        outs = noisy(torch.stack([mentor.out for mentor in mentors]), self.noise_weight, generator)
        copies = [replace(mentor, out=out) for mentor, out in zip(mentors, outs, strict=True)]
        views = [mentor.strong for mentor in mentors if mentor.strong is not None]
        if Need.TWO_VIEWS in self.needs:  # else a second view is there for another learner, and gets no noise
            for copy, strong in zip(copies, self._noisy(views, generator), strict=False):
                copy.strong = strong
        return copies

    def after(self, lesson: Lesson) -> None:
        self.method.after(lesson)

    def graduate(self) -> Member:
        return self.method.graduate()


class TeKAP(Method):
    """Hossain et al. 2025, Single Teacher, Multiple Perspectives (ICLR 2025): logits, features (on CRD), or both.

    Without `lambda_` the feature term is that of the authors' code: CRD is called once for the teacher and once for
    each noisy copy, and each call stores its embeddings before the next one, but the student part of the first call is
    used in all of them. With it the term is lambda_ times CRD plus 1 - lambda_ times the sum over the noisy copies, and
    the memories are updated once.
    """

    parts: Literal["logits", "features", "both"] = "logits"
    """What the student learns from."""
    tau: Temperature = 4.0
    """Temperature of the distillation of logits."""
    n: Count = 3
    """The number of noisy teachers."""
    noise_weight: Share = 0.1
    """Share of the noise in a noisy teacher's logits."""
    weight_original: Weight = 1.0
    """Weight of the teacher's own KL."""
    weight_augmented: Weight = 0.8
    """Weight of the sum over the noisy teachers."""
    lambda_: Share | None = None
    """Makes these two weights lambda_ and 1 - lambda_, the form of the slides."""
    feature_n: Count = 1
    """The number of noisy copies of the penultimate vectors."""
    feature_noise_weight: Share = 0.1
    """Share of the noise in a noisy vector."""
    feature_noise_std: Weight = 0.1
    """Standard deviation of that noise."""
    ce_weight: Weight | None = None
    """Weight of the labels; by default the authors': 0.1 for logits, else 1."""
    logit_weight: Weight | None = None
    """Weight of the logit part; by default the authors': 0.9 for logits, 1 for both."""
    feature_weight: Weight | None = None
    """Weight of the feature part; by default the authors': 0.8."""
    feat_dim: Count = 128
    """CRD: length of the embeddings."""
    nce_k: Count = 16384
    """CRD: negatives per sample."""
    temperature: Temperature = 0.07
    """CRD: temperature of the scores."""
    momentum: Momentum = 0.5
    """CRD: momentum of the memories."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        usual = {"logits": (0.1, 0.9, 0.0), "features": (1.0, 0.0, 0.8), "both": (1.0, 1.0, 0.8)}[self.parts]
        given = (self.ce_weight, self.logit_weight, self.feature_weight)
        self.outer = [one if value is None else value for value, one in zip(given, usual, strict=True)]
        self.logits = self.contrast = None
        if self.parts != "features":
            self.logits = Perspectives(
                KD(tau=self.tau, alpha=self.outer[0], beta=self.outer[1]),
                **{key: getattr(self, key) for key in Perspectives.options()},
            )
        self.features = self.parts != "logits"
        if self.features:
            self.needs = frozenset({Need.POOLED, Need.INDEX, Need.HARD_TARGET, Need.FULL_BATCHES})
            self.tasks = frozenset({"classify"})
            self.embedded: list[tuple[Tensor, Tensor]] = []  # of each call, from `loss` to `after`

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        if self.features:
            assert lesson is not None
            dims = (lesson.student.vectors.shape[1], lesson.teacher.vectors.shape[1])
            self.contrast = Contrast(context, dims, self.feat_dim, self.nce_k, self.temperature, self.momentum)

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        if self.logits is not None:
            terms = self.logits.loss(lesson, phase)
        else:
            terms = {"hard": self.outer[0] * lesson.hard()}
        if self.contrast is not None:
            terms["contrast"] = self.outer[2] * self._contrast(self.contrast, lesson)
        return terms

    def _contrast(self, contrast: Contrast, lesson: Lesson) -> Tensor:
        """CRD with the teacher and with each of its noisy copies, all against the same rows of the memories."""
        ours, theirs, rows = lesson.student.vectors, lesson.teacher.vectors, contrast.rows(lesson)
        a, b = contrast.embed(ours, theirs)
        student, teacher = contrast.parts(a, b, rows)
        self.embedded, memory, parts = [(a.detach(), b.detach())], contrast.student_memory, []
        for _ in range(self.feature_n):
            noisy_vectors = noisy(theirs, self.feature_noise_weight, lesson.generator, self.feature_noise_std)
            _, b_i = contrast.embed(ours, noisy_vectors)
            if self.lambda_ is None:  # in the code each call reads the memories that the call before has updated
                memory = updated(contrast, memory, a.detach(), rows[:, 0])
                self.embedded.append((a.detach(), b_i.detach()))
            scores = losses.log_scores(b_i, memory, rows, temperature=contrast.temperature) - contrast.log_z[1]
            parts.append(losses.contrast(scores, nce_k=contrast.nce_k, n_data=contrast.n_data))
        if self.lambda_ is None:
            return (1 + self.feature_n) * student + teacher + torch.stack(parts).sum()
        augmented = self.feature_n * student + torch.stack(parts).sum()
        return self.lambda_ * (student + teacher) + (1 - self.lambda_) * augmented

    def after(self, lesson: Lesson) -> None:
        if self.contrast is not None:
            for a, b in self.embedded:
                self.contrast.remember(a, b, lesson)


@torch.no_grad()
def updated(contrast: Contrast, memory: Tensor, new: Tensor, rows: Tensor) -> Tensor:
    """A copy of the memory with the `rows` of the batch updated; the memory itself changes only after the step."""
    return memory.index_copy(0, rows, losses.remembered(memory[rows], new, momentum=contrast.momentum))
