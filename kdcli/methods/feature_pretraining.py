"""Methods that put a stage before the training: factor transfer's paraphraser, activation boundaries.

The initial stage comes on top of the recipe's epochs, as in the papers: 30 more by default (`init_epochs`), at a
constant rate. `kdcli check` and the progress bar count both.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses.feature_pretraining import boundary_loss, factor_loss
from kdcli.methods.base import Epochs, Lesson, Method, Phase, SetupContext, Temperature, Terms, Weight
from kdcli.methods.pairing import last, pair
from kdcli.models.layers import fit
from kdcli.recipe import TrainConfig

AB_SCALE = 3 / 1000  # of the published recipe
SLOPE = 0.1


class FT(Method):
    """Factor transfer: what a paraphraser makes of the teacher's last map, a translator makes of the student's.

    Kim et al. 2018 (arXiv 1802.04977). First the paraphraser learns to reconstruct the teacher's map from a factor of
    fewer channels, without labels; then it is frozen, and student and translator learn CE and the factor loss.

    init_lr: the paraphraser's rate (SGD); left out 0.01 for residual students, else the recipe's, as published.
    factor: the factor's share of the teacher's channels.
    variant: `paper` compares the normalised factors, `official` (the public re-implementation) their attention maps.
    """

    reads_logits = False

    needs = frozenset({"maps", "pairs"})

    def __init__(
        self,
        outer_weight: Weight = 200.0,
        ce_weight: Weight = 1.0,
        kd_weight: Weight = 0.0,
        tau: Temperature = 4.0,
        p1: Annotated[float, Field(ge=1)] = 2.0,
        p2: Annotated[float, Field(ge=1)] = 1.0,
        factor: Annotated[float, Field(gt=0, le=1)] = 0.5,
        init_epochs: Epochs = 30,
        init_lr: Annotated[float, Field(gt=0)] | None = None,
        variant: Literal["paper", "official"] = "paper",
    ) -> None:
        super().__init__()
        self.outer_weight, self.ce_weight, self.kd_weight, self.tau = outer_weight, ce_weight, kd_weight, tau
        self.p1, self.p2, self.factor = p1, p2, factor
        self.init_epochs, self.init_lr = init_epochs, init_lr
        self.variant: Literal["paper", "official"] = variant

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        ours, theirs = last(lesson.student), last(lesson.teacher)
        if (
            self.variant == "official"
            and min(ours.shape[2], theirs.shape[2]) * min(ours.shape[3], theirs.shape[3]) == 1
        ):
            raise RecipeError(
                "method.variant: the official form compares where factors are strong, and the last maps are pooled to "
                f"maps of one position ({context.student.name}'s is {ours.shape[2]}x{ours.shape[3]}, the teacher's "
                f"{theirs.shape[2]}x{theirs.shape[3]})",
                hint='Use variant = "paper", or larger pictures (data.image_size).',
            )
        s, c = ours.shape[1], theirs.shape[1]
        k = max(int(c * self.factor), 1)
        encoder = _layers(nn.Conv2d, [(c, c), (c, k), (k, k)])
        decoder = _layers(nn.ConvTranspose2d, [(k, k), (k, c), (c, c)])
        self.paraphraser = nn.Sequential(encoder, decoder)
        for layer in self.paraphraser.modules():  # without norms torch's own start takes hundreds of updates to leave
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                fan = "fan_out" if isinstance(layer, nn.ConvTranspose2d) else "fan_in"  # of what a pixel is summed from
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
        theirs, hard = last(lesson.teacher), lesson.task.hard(lesson.student.out, lesson.target).mean()
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
            terms["teacher"] = (
                self.kd_weight * lesson.task.soft(lesson.student.out, lesson.teacher.out, self.tau).mean()
            )
        return terms


class AB(Method):
    """Activation boundaries: the student's neurons learn first when to fire, as the teacher's do, and then the classes.

    Heo et al. 2019 (arXiv 1811.03233). In the initial stage the student learns from the teacher's pre-activation maps
    alone, through a 1x1 convolution with batch norm per stage; afterwards by cross-entropy (and KD where `kd_weight`
    says so). Stages are paired from the last backwards, a pair weighs half of the next one; a stage that ends in no
    activation (a transformer's block) gives its map.
    """

    reads_logits = False

    needs = frozenset({"maps", "pre", "pairs"})

    def __init__(
        self,
        margin: Annotated[float, Field(gt=0)] = 1.0,
        ce_weight: Weight = 1.0,
        kd_weight: Weight = 0.0,
        tau: Temperature = 4.0,
        init_epochs: Epochs = 30,
    ) -> None:
        super().__init__()
        self.margin, self.ce_weight, self.kd_weight, self.tau = margin, ce_weight, kd_weight, tau
        self.init_epochs = init_epochs

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
        hard = lesson.task.hard(lesson.student.out, lesson.target).mean()
        if phase.name == "boundaries":
            ours, theirs = lesson.student.stages, lesson.teacher.stages
            each = []
            for i, ((s, t), connector) in enumerate(zip(self.pairs, self.connectors, strict=True)):
                ahead = boundary_loss(*fit(connector(ours[s]), theirs[t]), margin=self.margin)
                each.append(2.0 ** (i - len(self.pairs) + 1) * ahead)
            return {"hard": 0 * hard, "boundaries": AB_SCALE * torch.stack(each).sum()}
        terms = {"hard": self.ce_weight * hard}
        if self.kd_weight:
            terms["teacher"] = (
                self.kd_weight * lesson.task.soft(lesson.student.out, lesson.teacher.out, self.tau).mean()
            )
        return terms


def initial(train: TrainConfig, epochs: int) -> TrainConfig:
    """How an initial stage of so many epochs is trained: as the rest, at a constant rate."""
    steady = {"schedule": "constant", "warmup_epochs": 0, "min_lr": 0.0, "decay_epochs": []}
    return train.model_copy(update={"epochs": max(epochs, 1), **steady})


def _before(stages: dict[str, Tensor], tap: str) -> str:
    """The tap before a stage's last activation."""
    return f"{tap}.pre" if f"{tap}.pre" in stages else tap


def _layers(
    conv: type[nn.Conv2d | nn.ConvTranspose2d], widths: list[tuple[int, int]], norm: bool = False
) -> nn.Sequential:
    """3x3 convolutions that keep the size, each with LeakyReLU 0.1, with `norm` batch norm before it."""
    layers: list[nn.Module] = []
    for cin, cout in widths:
        layers += [conv(cin, cout, 3, 1, 1), *([nn.BatchNorm2d(cout)] if norm else []), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)
