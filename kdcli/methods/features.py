"""Methods that match intermediate maps stage by stage: FitNets, AT, SP, NST, VID."""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses import features as losses
from kdcli.methods import pairing
from kdcli.methods.base import Lesson, Method, Phase, SetupContext, Terms, Weight
from kdcli.models import layers

Taps = Annotated[list[str], Field(min_length=1)]
"""The student's taps, each with the teacher's tap that `pairing.pair` gives it, or with one named: `stage2:stage3`."""
KERNEL = 9
"""Largest kernel of a FitNets regressor: beyond, it would be nearly all of the parameters."""


def partners(lesson: Lesson, taps: Sequence[str] | None, option: str) -> list[tuple[str, str]]:
    """(the student's tap, the teacher's): those that an option names, or all that pair up.

    Raises RecipeError for a tap that is not there and for one without a partner.
    """
    ours, theirs = lesson.student.stages, lesson.teacher.stages
    paired = pairing.pair(ours, theirs)
    if taps is None:
        return paired
    chosen = []
    for name in taps:
        here, _, there = name.partition(":")
        here = pairing.tap(ours, here, "the student", option)
        if not there and here not in dict(paired):
            raise RecipeError(
                f"method.{option}: the student's {here} has no partner among the teacher's {len(theirs)} stages, which "
                "pair with the student's from the last backwards",
                hint=f"Use {' or '.join(one for one, _ in paired)}, or name both: {here}:{next(iter(theirs))}.",
            )
        chosen.append((here, pairing.tap(theirs, there or dict(paired)[here], "the teacher", option)))
    return chosen


class MapMethod(Method):
    """Cross-entropy, and a distance of its own summed over pairs of the student's and the teacher's maps."""

    reads_logits = False

    needs = frozenset({"maps"})
    spatial: bool = False
    """Whether it compares positions of one map with each other, so that a single one says nothing."""

    def __init__(self, taps: Sequence[str] | None, ce_weight: float, outer_weight: float, option: str = "taps") -> None:
        super().__init__()
        self.taps, self.option = taps, option
        self.ce_weight, self.outer_weight = ce_weight, outer_weight
        self.matched: list[tuple[str, str]] = []

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        self.matched = partners(lesson, self.taps, self.option)
        sizes = [layers.fit(*maps)[0].shape[2:].numel() for maps in self.maps(lesson)]
        if self.spatial and max(sizes) == 1:
            told = ", ".join(f"{here} with {there}" for here, there in self.matched)
            raise RecipeError(
                f"method.{self.option}: the maps to compare ({told}) have one position each, and {type(self).__name__} "
                "compares positions",
                hint="Larger images (--set data.image_size), earlier taps, or a method that compares values (vid, sp).",
            )

    def maps(self, lesson: Lesson) -> list[tuple[Tensor, Tensor]]:
        """The student's and the teacher's map of every pair."""
        ours, theirs = lesson.student.stages, lesson.teacher.stages
        return [(ours[here], theirs[there]) for here, there in self.matched]

    def distance(self, student: Tensor, mentor: Tensor, number: int) -> Tensor:
        """How far the maps of pair `number` are apart."""
        raise TypeError(f"{type(self).__name__} defines no distance")

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        each = [self.distance(*maps, number) for number, maps in enumerate(self.maps(lesson))]
        return {
            "hard": self.ce_weight * lesson.task.hard(lesson.student.out, lesson.target).mean(),
            "maps": self.outer_weight * torch.stack(each).sum(),
        }


class Regressor(nn.Sequential):
    """FitNets' regressor from the student's map to the teacher's: convolution, batch norm, ReLU.

    Its convolution brings the sizes together: kernel 3 at stride 2 where the student's map is exactly twice as large,
    transposed kernel 4 at stride 2 where it is half as large, otherwise a kernel of 1 + the difference. What these
    rules leave open, a smaller map that is not half as large, and a kernel above KERNEL, is resized first (averaged
    where larger, bilinear where smaller) and then passes a 1x1 convolution.
    """

    def __init__(self, student: Float[Tensor, "B C H W"], mentor: Float[Tensor, "B D h w"]) -> None:
        (cin, *ours), (cout, *theirs) = student.shape[1:], mentor.shape[1:]
        more = [a - b for a, b in zip(ours, theirs, strict=True)]
        self.size: tuple[int, int] | None = None
        if ours == [2 * n for n in theirs]:
            conv = nn.Conv2d(cin, cout, 3, stride=2, padding=1, bias=False)
        elif theirs == [2 * n for n in ours]:
            conv = nn.ConvTranspose2d(cin, cout, 4, stride=2, padding=1, bias=False)
        elif min(more) >= 0 and max(more) < KERNEL:
            conv = nn.Conv2d(cin, cout, (1 + more[0], 1 + more[1]), bias=False)
        else:
            self.size = (theirs[0], theirs[1])
            conv = nn.Conv2d(cin, cout, 1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(cout), nn.ReLU())

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if self.size is None else layers.resized_to(input, self.size))


class FitNets(MapMethod):
    """Hints, Romero et al. 2015, arXiv 1412.6550: mean squared error between a regressor's answer and the hint.

    Trained jointly with the task, not in two stages, as the CIFAR recipe does. tap: the student's guided stage; see
    `Taps`. The regressor ends in a ReLU, so a teacher's map that has negative values (tokens, linear bottlenecks) is
    met only where it is positive.
    """

    needs = frozenset({"maps", "pairs"})

    def __init__(self, tap: str = "stage2", ce_weight: Weight = 1.0, outer_weight: Weight = 100.0) -> None:
        super().__init__([tap], ce_weight, outer_weight, "tap")

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        super().setup(context, lesson)
        assert lesson is not None
        self.regressor = Regressor(*self.maps(lesson)[0])

    def distance(self, student: Tensor, mentor: Tensor, number: int) -> Tensor:
        return F.mse_loss(self.regressor(student), mentor)


class AT(MapMethod):
    """Attention transfer, Zagoruyko and Komodakis 2017, arXiv 1612.03928, over all stages that pair up.

    The larger map is average-pooled to the smaller. p: the power of activations.
    """

    spatial = True

    def __init__(
        self,
        p: Annotated[float, Field(ge=1)] = 2.0,
        taps: Taps | None = None,
        ce_weight: Weight = 1.0,
        outer_weight: Weight = 1000.0,
    ) -> None:
        super().__init__(taps, ce_weight, outer_weight)
        self.p = p

    def distance(self, student: Tensor, mentor: Tensor, number: int) -> Tensor:
        return losses.attention_loss(*layers.fit(student, mentor), p=self.p)


class SP(MapMethod):
    """Similarity-preserving distillation, Tung and Mori 2019, arXiv 1907.09682, on the last map before pooling.

    Maps may be of any sizes, for only samples are compared.
    """

    needs = frozenset({"maps", "full_batches", "pairs"})

    def __init__(self, tap: str = "last", ce_weight: Weight = 1.0, outer_weight: Weight = 3000.0) -> None:
        super().__init__([tap], ce_weight, outer_weight, "tap")

    def distance(self, student: Tensor, mentor: Tensor, number: int) -> Tensor:
        return losses.similarity_loss(student, mentor)


class NST(MapMethod):
    """Neuron selectivity transfer, Huang and Wang 2017, arXiv 1707.01219, with the polynomial kernel of degree 2 and
    offset 0, over all stages that pair up.

    The larger map is average-pooled to the smaller.
    """

    spatial = True

    def __init__(self, taps: Taps | None = None, ce_weight: Weight = 1.0, outer_weight: Weight = 50.0) -> None:
        super().__init__(taps, ce_weight, outer_weight)

    def distance(self, student: Tensor, mentor: Tensor, number: int) -> Tensor:
        return losses.selectivity_loss(*layers.fit(student, mentor))


class VID(MapMethod):
    """Variational information distillation, Ahn et al. 2019, arXiv 1904.05835, over all stages that pair up.

    Three 1x1 convolutions (the teacher's width, ReLU between, no biases) predict the teacher's map, with one learned
    variance per channel that starts at init_variance and stays above eps. The larger map is average-pooled to the
    smaller. The term may be negative: it is a likelihood's logarithm.
    """

    def __init__(
        self,
        init_variance: Annotated[float, Field(gt=0)] = 5.0,
        eps: Annotated[float, Field(gt=0)] = 1e-5,
        taps: Taps | None = None,
        ce_weight: Weight = 1.0,
        outer_weight: Weight = 1.0,
    ) -> None:
        super().__init__(taps, ce_weight, outer_weight)
        if init_variance <= eps:
            raise RecipeError(
                f"method.init_variance: {init_variance} is not above eps = {eps}, which every variance is",
                hint="The paper's are 5 and 1e-5.",
            )
        self.init_variance, self.eps = init_variance, eps

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        super().setup(context, lesson)
        assert lesson is not None
        start = losses.log_scale(self.init_variance, eps=self.eps)
        self.means, self.log_scales = nn.ModuleList(), nn.ParameterList()
        for student, mentor in self.maps(lesson):
            c, d = student.shape[1], mentor.shape[1]
            first, *rest = (nn.Conv2d(width, d, 1, bias=False) for width in (c, d, d))
            self.means.append(nn.Sequential(first, nn.ReLU(), rest[0], nn.ReLU(), rest[1]))
            self.log_scales.append(nn.Parameter(start.repeat(d)))

    def distance(self, student: Tensor, mentor: Tensor, number: int) -> Tensor:
        student, mentor = layers.fit(student, mentor)
        variance = losses.channel_variance(self.log_scales[number], eps=self.eps)
        return losses.variational_loss(self.means[number](student), mentor, variance)
