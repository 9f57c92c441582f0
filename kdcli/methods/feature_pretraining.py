"""Methods with a stage before the training: FT (factor transfer's paraphraser) and AB (activation boundaries).

The initial stage is in addition to the recipe's epochs, as in the papers: 30 more by default (`init_epochs`), at a
constant learning rate. `kdcli check` and the progress bar count both.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses.feature_pretraining import boundary_loss, factor_loss
from kdcli.methods.base import Epochs, Lesson, Method, Need, Phase, Positive, SetupContext, Temperature, Terms, Weight
from kdcli.methods.pairing import last, pair
from kdcli.models.layers import fit
from kdcli.recipe import TrainConfig

AB_SCALE = 3 / 1000  # of the published recipe
SLOPE = 0.1


class FT(Method):
    """Factor transfer, Kim et al. 2018 (arXiv 1802.04977): a paraphraser encodes the teacher's last map, a translator
    the student's, and the two codes are compared.

    First the paraphraser learns to reconstruct the teacher's map from a factor with fewer channels, without labels;
    then it is frozen, and student and translator learn the labels and the factor loss.
    """

    reads_logits = False
    needs = frozenset({Need.MAPS, Need.PAIRS})

    outer_weight: Weight = 200.0
    """Weight of the factor loss."""
    ce_weight: Weight = 1.0
    """Weight of the loss with the labels."""
    kd_weight: Weight = 0.0
    """Weight of the distillation of logits."""
    tau: Temperature = 4.0
    """Temperature of the distillation of logits."""
    p1: Annotated[float, Field(ge=1)] = 2.0
    """Power of the activations in the official form."""
    p2: Annotated[float, Field(ge=1)] = 1.0
    """Power of the difference."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Channels of the factor, as a share of the teacher's."""
    init_epochs: Epochs = 30
    """Epochs of the paraphraser, before the recipe's."""
    init_lr: Positive | None = None
    """Learning rate of the paraphraser (SGD); by default 0.01 for residual students, else the recipe's."""
    variant: Literal["paper", "official"] = "paper"
    """Compare the normalised factors, or their attention maps (the public re-implementation)."""

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        ours, theirs = last(lesson.student), last(lesson.teacher)
        if (
            self.variant == "official"
            and min(ours.shape[2], theirs.shape[2]) * min(ours.shape[3], theirs.shape[3]) == 1
        ):
            raise RecipeError(
                "method.variant: the official form compares the positions of maps, and the last maps are pooled to one "
                f"position ({context.student.name}'s is {ours.shape[2]}x{ours.shape[3]}, the teacher's "
                f"{theirs.shape[2]}x{theirs.shape[3]})",
                hint='Use variant = "paper", or larger images (data.image_size).',
            )
        s, c = ours.shape[1], theirs.shape[1]
        k = max(int(c * self.factor), 1)
        encoder = _layers(nn.Conv2d, [(c, c), (c, k), (k, k)])
        decoder = _layers(nn.ConvTranspose2d, [(k, k), (k, c), (c, c)])
        self.paraphraser = nn.Sequential(encoder, decoder)
        for layer in self.paraphraser.modules():  # torch's default is too small without norms
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                fan = "fan_out" if isinstance(layer, nn.ConvTranspose2d) else "fan_in"  # inputs per position
                nn.init.kaiming_normal_(layer.weight, SLOPE, fan)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.translator = _layers(nn.Conv2d, [(s, s), (s, k), (k, k)], norm=True)
        residual = any(word in context.student.architecture.arch for word in ("resnet", "wrn"))
        self.init_lr = self.init_lr or (0.01 if residual else context.train.lr)

    def learners(self) -> dict[str, nn.Module]:
        return {"student": self.context.student, "paraphraser": self.paraphraser}

    def phases(self, train: TrainConfig) -> list[Phase]:
        first = initial(train, self.init_epochs)
        sgd = {"optimizer": "sgd", "nesterov": False, "momentum": 0.9, "weight_decay": 5e-4, "lr": self.init_lr}
        phases = [Phase("paraphraser", self.init_epochs, ("paraphraser",), first.model_copy(update=sgd))]
        return [*phases[: self.init_epochs], Phase("main", train.epochs, ("student",), train)]

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        theirs, hard = last(lesson.teacher), lesson.hard()
        if phase.name == "paraphraser":
            return {"hard": 0 * hard, "reconstruction": F.mse_loss(self.paraphraser(theirs), theirs)}
        with torch.no_grad():
            factor = self.paraphraser[0](theirs)
        ours, factor = fit(self.translator(last(lesson.student)), factor)
        terms = {
            "hard": self.ce_weight * hard,
            "factors": self.outer_weight * factor_loss(ours, factor, p1=self.p1, p2=self.p2, variant=self.variant),
        }
        if self.kd_weight:
            soft = lesson.task.soft(lesson.student.out, lesson.teacher.out, self.tau)
            terms["teacher"] = self.kd_weight * soft.mean()
        return terms


class AB(Method):
    """Activation boundaries, Heo et al. 2019 (arXiv 1811.03233): the student's neurons first learn to be active where
    the teacher's are, then the classes.

    In the initial stage the student learns only from the teacher's pre-activation maps, through a 1x1 convolution with
    batch norm per stage; then from the labels (and KD, with `kd_weight`). Stages are paired from the last one
    backwards, and each pair has half the weight of the next one; of a stage without a final activation (a transformer's
    block) its map is used.
    """

    reads_logits = False
    needs = frozenset({Need.MAPS, Need.PRE, Need.PAIRS})

    margin: Positive = 1.0
    """Distance that pre-activations keep from zero."""
    ce_weight: Weight = 1.0
    """Weight of the loss with the labels."""
    kd_weight: Weight = 0.0
    """Weight of the distillation of logits."""
    tau: Temperature = 4.0
    """Temperature of the distillation of logits."""
    init_epochs: Epochs = 30
    """Epochs of the initial stage, before the recipe's."""

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        ours, theirs = lesson.student.stages, lesson.teacher.stages
        self.pairs = [(_before(ours, s), _before(theirs, t)) for s, t in pair(ours, theirs)]
        self.connectors = nn.ModuleList([
            nn.Sequential(nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout))
            for cin, cout in ((ours[s].shape[1], theirs[t].shape[1]) for s, t in self.pairs)
        ])  # fmt: skip

    def phases(self, train: TrainConfig) -> list[Phase]:
        phases = [Phase("boundaries", self.init_epochs, ("student",), initial(train, self.init_epochs))]
        return [*phases[: self.init_epochs], Phase("main", train.epochs, ("student",), train)]

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        hard = lesson.hard()
        if phase.name == "boundaries":
            ours, theirs = lesson.student.stages, lesson.teacher.stages
            each = []
            for i, ((s, t), connector) in enumerate(zip(self.pairs, self.connectors, strict=True)):
                ahead = boundary_loss(*fit(connector(ours[s]), theirs[t]), margin=self.margin)
                each.append(2.0 ** (i - len(self.pairs) + 1) * ahead)
            return {"hard": 0 * hard, "boundaries": AB_SCALE * torch.stack(each).sum()}
        terms = {"hard": self.ce_weight * hard}
        if self.kd_weight:
            soft = lesson.task.soft(lesson.student.out, lesson.teacher.out, self.tau)
            terms["teacher"] = self.kd_weight * soft.mean()
        return terms


def initial(train: TrainConfig, epochs: int) -> TrainConfig:
    """The settings of an initial stage of so many epochs: those of the recipe with a constant learning rate."""
    steady = {"schedule": "constant", "warmup_epochs": 0, "min_lr": 0.0, "decay_epochs": []}
    return train.model_copy(update={"epochs": max(epochs, 1), **steady})


def _before(stages: dict[str, Tensor], tap: str) -> str:
    """The tap before the last activation of a stage."""
    return f"{tap}.pre" if f"{tap}.pre" in stages else tap


def _layers(
    conv: type[nn.Conv2d | nn.ConvTranspose2d], widths: list[tuple[int, int]], norm: bool = False
) -> nn.Sequential:
    """3x3 convolutions that keep the size, each followed by batch norm (with `norm`) and LeakyReLU 0.1."""
    layers: list[nn.Module] = []
    for cin, cout in widths:
        layers += [conv(cin, cout, 3, 1, 1), *([nn.BatchNorm2d(cout)] if norm else []), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)
