"""TeKAP: one teacher made several by noise, for a method of its own and around any other that hears logits."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from kdcli.losses import crd as losses
from kdcli.methods.base import Count, Lesson, Method, Phase, SetupContext, Share, Temperature, Terms, Weight
from kdcli.methods.baselines import KD
from kdcli.methods.crd import Contrast, Momentum
from kdcli.models.member import Member
from kdcli.models.outputs import Output
from kdcli.recipe import TrainConfig


def noisy(x: Tensor, noise_weight: float, generator: torch.Generator, std: float = 1.0) -> Tensor:
    """alpha * eta + (1 - alpha) * x with eta from N(0, std^2), alpha being `noise_weight`: the slides' distortion."""
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return (1 - noise_weight) * x.float() + noise_weight * std * noise


class Perspectives(Method):
    """TeKAP around another method (`tekap = true`, or a table of these options, beside that method's own).

    What the method teaches (every term but `hard`) is computed once more on each of `n` copies of the mentors with
    fresh noise in their logits; features stay as they are. The sum of these terms is the term `tekap`.

    weight_original, weight_augmented: of the method's own teaching and of that sum; with `lambda_` they are lambda_ and
    1 - lambda_, the slides' form.
    """

    def __init__(
        self,
        method: Method,
        n: Count = 3,
        noise_weight: Share = 0.1,
        weight_original: Weight = 1.0,
        weight_augmented: Weight = 0.8,
        lambda_: Share | None = None,
    ) -> None:
        super().__init__()
        self.method, self.n, self.noise_weight = method, n, noise_weight
        self.weights = (weight_original, weight_augmented) if lambda_ is None else (lambda_, 1 - lambda_)
        self.needs, self.teachers, self.capturable = method.needs, method.teachers, method.capturable
        self.tasks = method.tasks

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
        again: list[Tensor] = []
        for _ in range(self.n):
            noisy_lesson = replace(lesson, mentors=self._noisy(lesson.mentors, lesson.generator), notes={})
            terms = self.method.loss(noisy_lesson, phase)
            again += [value for name, value in terms.items() if name != "hard"]
        own = self.method.loss(lesson, phase)  # last, for what it keeps for `after` is to be of this lesson
        terms = {name: value if name == "hard" else self.weights[0] * value for name, value in own.items()}
        if again:
            terms["tekap"] = self.weights[1] * torch.stack(again).sum()
        return terms

    def _noisy(self, mentors: list[Output], generator: torch.Generator) -> list[Output]:
        if not mentors:
            return []
        outs = noisy(torch.stack([mentor.out for mentor in mentors]), self.noise_weight, generator)
        strong = [mentor.strong for mentor in mentors]  # another learner may need it: then no noise is drawn for it
        if "two_views" in self.needs:
            strong = self._noisy([one for one in strong if one is not None], generator)
        return [replace(mentor, out=out, strong=s) for mentor, out, s in zip(mentors, outs, strong, strict=True)]

    def after(self, lesson: Lesson) -> None:
        self.method.after(lesson)

    def graduate(self) -> Member:
        return self.method.graduate()


class TeKAP(Method):
    """Hossain et al. 2025, Single Teacher, Multiple Perspectives (ICLR 2025): logits, features (on CRD), or both.

    tau, n, noise_weight: of the distillation, how many noisy teachers, how much of each is noise.
    weight_original, weight_augmented: of the teacher's own KL and of the sum over the noisy ones, as in the authors'
        code; with `lambda_` they are lambda_ and 1 - lambda_, the slides' form.
    feature_n, feature_noise_weight, feature_noise_std: the same of penultimate vectors; the noise is scaled by both.
        Without `lambda_` the feature term is the code's: CRD called once for the teacher and once for each noisy one,
        each call remembering its embeddings before the next, but with the first call's student part in all of them.
        With it: lambda_ times CRD plus 1 - lambda_ times its sum over the noisy ones, and the memories move once.
    ce_weight, logit_weight, feature_weight: the outer weights; left out, the authors' for these parts: 0.1 and 0.9 for
        logits, 1 and 0.8 for features, 1, 1 and 0.8 for both.
    feat_dim, nce_k, temperature, momentum: CRD's.
    """

    symmetric = True

    def __init__(
        self,
        parts: Literal["logits", "features", "both"] = "logits",
        tau: Temperature = 4.0,
        n: Count = 3,
        noise_weight: Share = 0.1,
        weight_original: Weight = 1.0,
        weight_augmented: Weight = 0.8,
        lambda_: Share | None = None,
        feature_n: Count = 1,
        feature_noise_weight: Share = 0.1,
        feature_noise_std: Weight = 0.1,
        ce_weight: Weight | None = None,
        logit_weight: Weight | None = None,
        feature_weight: Weight | None = None,
        feat_dim: Count = 128,
        nce_k: Count = 16384,
        temperature: Temperature = 0.07,
        momentum: Momentum = 0.5,
    ) -> None:
        super().__init__()
        usual = {"logits": (0.1, 0.9, 0.0), "features": (1.0, 0.0, 0.8), "both": (1.0, 1.0, 0.8)}[parts]
        given = (ce_weight, logit_weight, feature_weight)
        ce, logit, feature = (one if value is None else value for value, one in zip(given, usual, strict=True))
        self.ce_weight, self.feature_weight, self.lambda_ = ce, feature, lambda_
        self.feature_n, self.feature_noise = feature_n, (feature_noise_weight, feature_noise_std)
        self.memory = (feat_dim, nce_k, temperature, momentum)
        self.logits = self.contrast = None
        if parts != "features":
            plain = KD(tau, alpha=ce, beta=logit)
            self.logits = Perspectives(plain, n, noise_weight, weight_original, weight_augmented, lambda_)
        self.features = parts != "logits"
        if self.features:
            self.needs = frozenset({"pooled", "index", "hard_target", "full_batches"})
            self.tasks = frozenset({"classify"})
            self.met: list[tuple[Tensor, Tensor]] = []  # each call's embeddings, from `loss` to `after`

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        if self.features:
            assert lesson is not None
            dims = (lesson.student.vectors.shape[1], lesson.teacher.vectors.shape[1])
            self.contrast = Contrast(context, dims, *self.memory)

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        if self.logits is not None:
            terms = self.logits.loss(lesson, phase)
        else:
            terms = {"hard": self.ce_weight * lesson.task.hard(lesson.student.out, lesson.target).mean()}
        if self.contrast is not None:
            terms["contrast"] = self.feature_weight * self._contrast(self.contrast, lesson)
        return terms

    def _contrast(self, contrast: Contrast, lesson: Lesson) -> Tensor:
        """CRD with the teacher and with each of its noisy copies, all against the same rows."""
        ours, theirs, rows = lesson.student.vectors, lesson.teacher.vectors, contrast.rows(lesson)
        a, b = contrast.embed(ours, theirs)
        student, teacher = contrast.parts(a, b, rows)
        self.met, memory, parts = [(a.detach(), b.detach())], contrast.student_memory, []
        for _ in range(self.feature_n):
            weight, std = self.feature_noise
            _, b_i = contrast.embed(ours, noisy(theirs, weight, lesson.generator, std))
            if self.lambda_ is None:  # the code's second call meets what the first has remembered
                memory = updated(contrast, memory, a.detach(), rows[:, 0])
                self.met.append((a.detach(), b_i.detach()))
            scores = losses.log_scores(b_i, memory, rows, temperature=contrast.temperature) - contrast.log_z[1]
            parts.append(losses.contrast(scores, nce_k=contrast.nce_k, n_data=contrast.n_data))
        if self.lambda_ is None:
            return (1 + self.feature_n) * student + teacher + torch.stack(parts).sum()
        augmented = self.feature_n * student + torch.stack(parts).sum()
        return self.lambda_ * (student + teacher) + (1 - self.lambda_) * augmented

    def after(self, lesson: Lesson) -> None:
        if self.contrast is not None:
            for a, b in self.met:
                self.contrast.remember(a, b, lesson)


@torch.no_grad()
def updated(contrast: Contrast, memory: Tensor, new: Tensor, own: Tensor) -> Tensor:
    """A copy of the memory as it will be once it has met the batch, whose rows are `own`: the step is not over yet."""
    return memory.index_copy(0, own, losses.remembered(memory[own], new, momentum=contrast.momentum))
