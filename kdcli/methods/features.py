"""Methods that match intermediate maps stage by stage: FitNets, AT, SP, NST, VID."""

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses import features as losses
from kdcli.methods import pairing
from kdcli.methods.base import Lesson, Method, Need, Phase, Positive, SetupContext, Terms, Weight
from kdcli.models import layers

Taps = Annotated[tuple[str, ...], Field(min_length=1)]
"""The student's taps, each with the teacher's tap that `pairing.pair` finds, or with a named one: `stage2:stage3`."""
KERNEL = 9
"""Largest kernel of a FitNets regressor: a larger one would hold nearly all of the parameters."""


def partners(lesson: Lesson, taps: tuple[str, ...] | None, option: str) -> list[tuple[str, str]]:
    """(the student's tap, the teacher's): those that an option names, or all that pair up.

    Raises RecipeError for a tap that does not exist and for one without a partner.
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
                "are paired with the student's from the last one backwards",
                hint=f"Use {' or '.join(one for one, _ in paired)}, or name both: {here}:{next(iter(theirs))}.",
            )
        chosen.append((here, pairing.tap(theirs, there or dict(paired)[here], "the teacher", option)))
    return chosen


class MapMethod(Method):
    """The loss with the labels, and a distance summed over pairs of the student's and the teacher's maps."""

    reads_logits = False
    needs = frozenset({Need.MAPS})
    spatial: ClassVar[bool] = False
    """Whether it compares the positions of a map with each other, so that a map of one position carries nothing."""
    option: ClassVar[str] = "taps"
    """The option that names the pairs."""

    ce_weight: Weight = 1.0
    """Weight of the loss with the labels."""
    outer_weight: Weight = 1.0
    """Weight of the distance."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.matched: list[tuple[str, str]] = []

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        named = getattr(self, self.option)
        self.matched = partners(lesson, (named,) if isinstance(named, str) else named, self.option)
        sizes = [layers.fit(*maps)[0].shape[2:].numel() for maps in self.maps(lesson)]
        if self.spatial and max(sizes) == 1:
            pairs = ", ".join(f"{here} with {there}" for here, there in self.matched)
            raise RecipeError(
                f"method.{self.option}: the maps to compare ({pairs}) have one position each, and "
                f"{type(self).__name__} compares positions",
                hint="Larger images (--set data.image_size), earlier taps, or a method that compares values (vid, sp).",
            )

    def maps(self, lesson: Lesson) -> list[tuple[Tensor, Tensor]]:
        """The student's and the teacher's map of every pair."""
        ours, theirs = lesson.student.stages, lesson.teacher.stages
        return [(ours[here], theirs[there]) for here, there in self.matched]

    def distance(self, student: Tensor, mentor: Tensor, number: int) -> Tensor:
        """The distance between the maps of pair `number`."""
        raise TypeError(f"{type(self).__name__} defines no distance")

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        each = [self.distance(*maps, number) for number, maps in enumerate(self.maps(lesson))]
        return {"hard": self.ce_weight * lesson.hard(), "maps": self.outer_weight * torch.stack(each).sum()}


class Regressor(nn.Sequential):
    """FitNets' regressor from the student's map to the teacher's: convolution, batch norm, ReLU.

    The convolution also matches the sizes: kernel 3 at stride 2 where the student's map is exactly twice as large,
    transposed kernel 4 at stride 2 where it is half as large, else a kernel of 1 + the difference. In the cases that
    these rules leave open, a smaller map that is not half as large and a kernel above KERNEL, the map is resized first
    (averaged where larger, bilinear where smaller) and then passes a 1x1 convolution.
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
    """Hints, Romero et al. 2015 (arXiv 1412.6550): mean squared error between the regressor's output and the hint.

    Trained jointly with the task, not in two stages, as in the CIFAR recipe. The regressor ends in a ReLU, so a
    teacher's map with negative values (tokens, linear bottlenecks) can be matched only where it is positive.
    """

    needs = frozenset({Need.MAPS, Need.PAIRS})
    option = "tap"

    tap: str = "stage2"
    """The student's guided stage, with its partner, or `stage2:stage3` to name both."""
    outer_weight: Weight = 100.0

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        super().setup(context, lesson)
        assert lesson is not None
        self.regressor = Regressor(*self.maps(lesson)[0])

    def distance(self, student: Tensor, mentor: Tensor, number: int) -> Tensor:
        return F.mse_loss(self.regressor(student), mentor)


class AT(MapMethod):
    """Attention transfer, Zagoruyko and Komodakis 2017 (arXiv 1612.03928), over all stages that pair up.

    The larger map is average-pooled to the size of the smaller one.
    """

    spatial = True

    p: Annotated[float, Field(ge=1)] = 2.0
    """Power of the activations."""
    taps: Taps | None = None
    """The student's stages, each with its partner or as `stage2:stage3`; by default all that pair up."""
    outer_weight: Weight = 1000.0

    def distance(self, student: Tensor, mentor: Tensor, number: int) -> Tensor:
        return losses.attention_loss(*layers.fit(student, mentor), p=self.p)


class SP(MapMethod):
    """Similarity-preserving distillation, Tung and Mori 2019 (arXiv 1907.09682), on the last map before pooling.

    Maps may have any sizes, because only samples are compared.
    """

    needs = frozenset({Need.MAPS, Need.FULL_BATCHES, Need.PAIRS})
    option = "tap"

    tap: str = "last"
    """The student's stage, with its partner, or `stage2:stage3` to name both."""
    outer_weight: Weight = 3000.0

    def distance(self, student: Tensor, mentor: Tensor, number: int) -> Tensor:
        return losses.similarity_loss(student, mentor)


class NST(MapMethod):
    """Neuron selectivity transfer, Huang and Wang 2017 (arXiv 1707.01219), with the polynomial kernel of degree 2 and
    offset 0, over all stages that pair up.

    The larger map is average-pooled to the size of the smaller one.
    """

    spatial = True

    taps: Taps | None = None
    """The student's stages, each with its partner or as `stage2:stage3`; by default all that pair up."""
    outer_weight: Weight = 50.0

    def distance(self, student: Tensor, mentor: Tensor, number: int) -> Tensor:
        return losses.selectivity_loss(*layers.fit(student, mentor))


class VID(MapMethod):
    """Variational information distillation, Ahn et al. 2019 (arXiv 1904.05835), over all stages that pair up.

    Three 1x1 convolutions (of the teacher's width, ReLU in between, no biases) predict the teacher's map, with one
    learned variance per channel. The larger map is average-pooled to the size of the smaller one. The term may be
    negative: it is the logarithm of a likelihood.
    """

    init_variance: Positive = 5.0
    """Variance of every channel at the start."""
    eps: Positive = 1e-5
    """Lower bound of the variances."""
    taps: Taps | None = None
    """The student's stages, each with its partner or as `stage2:stage3`; by default all that pair up."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.init_variance <= self.eps:
            raise RecipeError(
                f"method.init_variance: {self.init_variance} is not above eps = {self.eps}, the least variance",
                hint="The paper's values are 5 and 1e-5.",
            )

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
