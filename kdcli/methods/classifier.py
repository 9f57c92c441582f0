"""Methods built on a classifier: the teacher's (SRRL, SimKD), or one at every stage of the student (OFA).

The file is long because the three share what a classifier must look like.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses.classifier import ofa_loss
from kdcli.methods.base import Lesson, Method, Need, Phase, Positive, SetupContext, Temperature, Terms, Weight
from kdcli.methods.pairing import last, stages
from kdcli.models.graduates import Graduate, Spec
from kdcli.models.layers import fit
from kdcli.models.member import Member

NEAR = 0.05  # largest difference of a pooled map from the classifier's input, relative to the largest value: rounding
TOKEN_GRID, TOKEN_HEADS = 7, 4


class SRRL(Method):
    """Yang et al. 2021, "Knowledge distillation via softmax regression representation learning".

    The student's vectors, brought to the teacher's width by a linear connector with batch norm and ReLU (no bias),
    are trained to match the teacher's vectors and, through the teacher's classifier, the teacher's logits (mean
    squared errors), in addition to the labels and KD.
    """

    needs = frozenset({Need.POOLED, Need.PAIRS})

    ce_weight: Weight = 1.0
    """Weight of the loss with the labels."""
    kd_weight: Weight = 1.0
    """Weight of the distillation of logits."""
    outer_weight: Weight = 1.0
    """Weight of both mean squared errors."""
    tau: Temperature = 4.0
    """Temperature of the distillation of logits."""

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        assert context.teacher is not None
        context.teacher.check_head()
        cin, cout = lesson.student.vectors.shape[1], lesson.teacher.vectors.shape[1]
        self.connector = nn.Sequential(nn.Linear(cin, cout, bias=False), nn.BatchNorm1d(cout), nn.ReLU())

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        teacher = lesson.teacher
        assert self.context.teacher is not None
        vectors = self.connector(lesson.student.vectors)
        answers = self.context.teacher.classify(vectors)  # [B, K]
        return {
            "hard": self.ce_weight * lesson.hard(),
            "teacher": self.kd_weight * lesson.task.soft(lesson.student.out, teacher.out, self.tau).mean(),
            "vectors": self.outer_weight * F.mse_loss(vectors, teacher.vectors),
            "answers": self.outer_weight * F.mse_loss(answers, teacher.out.float()),
        }


class SimKD(Method):
    """Chen et al. 2022 (arXiv 2203.14001): the student takes over the teacher's classifier and learns only its input.

    A projector behind the student's last map is trained by the mean squared error with the teacher's last map. From
    `setup` on the student is its graduate (models/graduates.py): its own layers up to the last map, the projector,
    pooling, the teacher's frozen classifier. So its logits here are the ones that are scored and shipped.
    """

    reads_logits = False
    needs = frozenset({Need.MAPS, Need.POOLED, Need.PAIRS})

    outer_weight: Weight = 1.0
    """Weight of the mean squared error."""
    ce_weight: Weight = 0.0
    """Weight of the loss with the labels."""
    kd_weight: Weight = 0.0
    """Weight of the distillation of logits."""
    tau: Temperature = 4.0
    """Temperature of the distillation of logits."""
    factor: Positive = 2.0
    """The projector's inner width is the teacher's width divided by this."""

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        self.two_maps = borrow(context, lesson, self.factor)

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        terms = {
            "hard": self.ce_weight * lesson.hard(),
            "features": self.outer_weight * F.mse_loss(*self.two_maps(lesson)),
        }
        if self.kd_weight:
            soft = lesson.task.soft(lesson.student.out, lesson.teacher.out, self.tau)
            terms["teacher"] = self.kd_weight * soft.mean()
        return terms


TwoMaps = Callable[[Lesson], tuple[Float[Tensor, "B D h w"], Float[Tensor, "B D h w"]]]
"""The last maps of a lesson, the student's and the teacher's, of equal shape."""


def borrow(context: SetupContext, lesson: Lesson, factor: float = 2.0) -> TwoMaps:
    """Turn the context's student into the graduate that ends in the teacher's classifier; returns a reader of the two
    last maps.

    Raises RecipeError if the classifier's input is not the pooled last map, so that no projector could replace it.
    """
    teacher, student = context.teacher, context.student
    assert teacher is not None
    if isinstance(student.net, Graduate):
        raise RecipeError(
            f"classroom.student: {student.name} already has the classifier of another teacher (it is a graduate)",
            hint=f"Start from the architecture itself: {student.architecture.full}@none.",
        )
    (weight, bias), tail = classifier(teacher), _before_pooling(teacher, lesson)
    size = list(last(lesson.teacher).shape[2:])
    spec = Spec(width=weight.shape[1], classes=weight.shape[0], bias=bias is not None, size=size, factor=factor)
    graduate = Graduate(student.net, spec, student.input_size, student.architecture.full)
    with torch.no_grad():
        graduate.classifier.weight.copy_(weight)
        if bias is not None:
            graduate.classifier.bias.copy_(bias)
    student.net = graduate.to(context.device)
    student.forget()

    def two_maps(lesson: Lesson) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            theirs = tail(last(lesson.teacher))
        return fit(last(lesson.student), theirs)  # a graduate's last map is the projected one

    return two_maps


def _before_pooling(teacher: Member, lesson: Lesson) -> Callable[[Tensor], Tensor]:
    """What a teacher does to its last stage's map before pooling it: nothing, or a final norm.

    Found by trying each: the map's average must be the classifier's input. Raises RecipeError if none fits.
    """
    net, x, pooled = teacher.net, last(lesson.teacher), lesson.teacher.vectors
    tail, norm = getattr(net, "tail", None), getattr(net, "norm", None)
    ways: list[Callable[[Tensor], Tensor]] = [lambda x: x]
    if isinstance(tail, nn.Module):  # the zoo's wide residual networks: final norm and ReLU
        ways.append(tail)
    if isinstance(norm, nn.Module):  # timm and torchvision, on maps or with channels last
        ways += [norm, lambda x: norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]
    for way in ways:
        try:
            given = way(x).mean((2, 3))
        except RuntimeError:  # a norm over other dimensions
            continue
        if given.shape == pooled.shape and (given - pooled).abs().max() <= NEAR * pooled.abs().max():
            return way
    width, shape = pooled.shape[1], "x".join(map(str, x.shape[1:]))
    found = (
        f"gives {x.shape[1]}: there is a layer in between"
        if x.shape[1] != width
        else "gives others: it is pooled in another way (class token), or a norm follows"
    )
    raise RecipeError(
        f"classroom.teacher: the classifier of {teacher.name} expects {width} inputs, its last map ({shape}) {found}",
        hint="Choose a teacher that ends in average pooling and one linear layer (ResNet, WRN, RegNet, Swin), or a "
        "method that does not borrow the classifier: srrl, fitnets, crd.",
    )


def classifier(member: Member) -> tuple[Float[Tensor, "K D"], Float[Tensor, " K"] | None]:
    """A mentor's last layer (weight, bias), only the data's classes, in float32."""
    head = member.head
    weight, bias = head.weight.detach().float().flatten(1), head.bias
    bias = None if bias is None else bias.detach().float()
    if member.class_index is not None:
        weight, bias = weight[member.class_index], None if bias is None else bias[member.class_index]
    return weight, bias


class OFA(Method):
    """OFA-KD, Hao et al. 2023 (arXiv 2310.19444): each stage of the student learns from the teacher's logits.

    A projector at each stage gives logits. No map of the teacher is read, so any two architectures fit. The stages of
    a convolutional student are halved once for every stage that follows, a transformer's tokens are merged to a 7x7
    grid and pass attention blocks; the projectors are dropped after training.
    """

    tasks = frozenset({"classify"})
    needs = frozenset({Need.MAPS, Need.POOLED, Need.HARD_TARGET, Need.PAIRS})

    gt: Weight = 1.0
    """Weight of the loss with the labels."""
    kd: Weight = 1.0
    """Weight of the student's own logits."""
    ofa: Weight = 1.0
    """Weight of the projectors' logits, summed over the stages."""
    eps: Positive = 1.0
    """Exponent of the class weights."""
    tau: Temperature = 1.0
    """Temperature of the teacher and the student."""
    student: Literal["auto", "cnn", "token"] = "auto"
    """Kind of projectors; `auto` takes those for tokens if the student has attention over positions."""
    stages: tuple[int, ...] = ()
    """The student's stages to use, counted from 1; empty: all."""

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        maps = list(stages(lesson.student).items())
        n = len(maps)
        chosen = self.stages or range(1, n + 1)
        if bad := [k for k in chosen if not 1 <= k <= n]:
            raise RecipeError(
                f"method.stages: {context.student.name} has no stage {bad[0]}",
                hint=f"It has {', '.join(f'{k}: {name}' for k, (name, _) in enumerate(maps, 1))}.",
            )
        tokens = _attends(context.student.net) if self.student == "auto" else self.student == "token"
        ours, theirs = lesson.student.vectors.shape[1], lesson.teacher.vectors.shape[1]
        make = _token_projector if tokens else _cnn_projector
        width = ours if tokens else max(ours, theirs)
        self.projectors = nn.ModuleDict({
            maps[k - 1][0]: make(maps[k - 1][1], width, n - k, context.task.num_classes) for k in sorted(set(chosen))
        })  # fmt: skip
        self.projectors.apply(_initialise)

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        maps = lesson.student.stages

        def ofa(out: Tensor) -> Tensor:
            return ofa_loss(out, lesson.teacher.out, lesson.target, eps=self.eps, tau=self.tau).mean()

        each = [ofa(projector(maps[name])) for name, projector in self.projectors.items()]
        return {
            "hard": self.gt * lesson.hard(),
            "teacher": self.kd * ofa(lesson.student.out),
            "stages": self.ofa * torch.stack(each).sum(),
        }


def _attends(net: nn.Module) -> bool:
    """Whether the positions of an image attend to each other: any kind of transformer."""
    return any(type(one).__name__.endswith(("Attention", "AttentionV2", "MixerBlock")) for one in net.modules())


def _cnn_projector(x: Tensor, width: int, left: int, classes: int) -> nn.Module:
    """A stage's map is halved once for each of the `left` stages after it, to `width` channels, pooled, classified."""
    channels = x.shape[1]
    layers: list[nn.Module] = []
    for n in range(left):
        cout = width if n == left - 1 else 2 * channels
        layers.append(_halved(channels, cout))
        channels = cout
    if not left:
        layers.append(nn.Conv2d(channels, width, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def _halved(cin: int, cout: int) -> nn.Module:
    """Two separable convolutions, the first one with stride 2."""

    def separable(a: int, b: int, stride: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(a, a, 3, stride, 1, groups=a, bias=False)
        return [depthwise, nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    return nn.Sequential(*separable(cin, cin, 2), *separable(cin, cout, 1))


def _token_projector(x: Tensor, width: int, left: int, classes: int) -> nn.Module:
    """A stage's tokens are merged to a 7x7 grid, pass attention blocks, are averaged and classified."""
    merges = max(int(math.log2(max(min(x.shape[2:]) / TOKEN_GRID, 1))), 0)
    layers: list[nn.Module] = [Merge(x.shape[1] if n == 0 else width, width) for n in range(merges)]
    if not merges and x.shape[1] != width:
        layers.append(nn.Conv2d(x.shape[1], width, 1))
    heads = math.gcd(TOKEN_HEADS, width)
    blocks = [
        nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        for _ in range(max(left, 1))
    ]
    return nn.Sequential(*layers, Tokens(), *blocks, Mean(), nn.Linear(width, classes))


class Merge(nn.Module):
    """Merges 2x2 tokens into one: concatenated, normalised, projected. An odd side is padded with zeros."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * cin), nn.Linear(4 * cin, cout, bias=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        merged = F.pixel_unshuffle(x, 2).permute(0, 2, 3, 1)
        return self.reduce(self.norm(merged)).permute(0, 3, 1, 2)


class Tokens(nn.Module):
    """Flattens a grid into a sequence of tokens."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N C"]:
        return x.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    """Averages tokens."""

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B C"]:
        return x.mean(1)


def _initialise(module: nn.Module) -> None:
    """Convolutions: Kaiming fan-out; linear layers: truncated normal with standard deviation 0.02; biases: zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.trunc_normal_(module.in_proj_weight, std=0.02)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
