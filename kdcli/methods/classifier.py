"""Methods that lean on a classifier: the teacher's own (SRRL, SimKD), or one at every stage of the student (OFA)."""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses.classifier import ofa_loss
from kdcli.methods.base import Lesson, Method, Phase, SetupContext, Temperature, Terms, Weight
from kdcli.methods.pairing import last, stages
from kdcli.models.graduates import Graduate, Spec
from kdcli.models.layers import fit
from kdcli.models.member import Member

NEAR = 0.05  # of the largest number: how far a pooled map may be from the classifier's input, for precision's sake
TOKEN_GRID, TOKEN_HEADS = 7, 4


class SRRL(Method):
    """The student's vectors, brought to the teacher's width, must be answered by the teacher's classifier as its own.

    Yang et al. 2021, "Knowledge distillation via softmax regression representation learning": a linear connector with
    batch norm and ReLU (no bias), mean squared error of vectors and of logits, beside CE and KD (papers.md 4 and 5).
    """

    needs = frozenset({"pooled", "pairs"})

    def __init__(
        self, ce_weight: Weight = 1.0, kd_weight: Weight = 1.0, outer_weight: Weight = 1.0, tau: Temperature = 4.0
    ) -> None:
        super().__init__()
        self.ce_weight, self.kd_weight, self.outer_weight, self.tau = ce_weight, kd_weight, outer_weight, tau

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        assert context.teacher is not None
        context.teacher.check_head()
        cin, cout = lesson.student.vectors.shape[1], lesson.teacher.vectors.shape[1]
        self.connector = nn.Sequential(nn.Linear(cin, cout, bias=False), nn.BatchNorm1d(cout), nn.ReLU())

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        out, teacher = lesson.student.out.float(), lesson.teacher
        assert self.context.teacher is not None
        vectors = self.connector(lesson.student.vectors)
        answered = self.context.teacher.classify(vectors)  # by the teacher, from the student's vectors
        return {
            "hard": self.ce_weight * lesson.task.hard(out, lesson.target).mean(),
            "teacher": self.kd_weight * lesson.task.soft(out, teacher.out, self.tau).mean(),
            "vectors": self.outer_weight * F.mse_loss(vectors, teacher.vectors),
            "answers": self.outer_weight * F.mse_loss(answered, teacher.out.float()),
        }


class SimKD(Method):
    """The student takes over the teacher's classifier and learns the map that goes into it, nothing else.

    Chen et al. 2022 (arXiv 2203.14001): a projector behind the student's last map, mean squared error with the
    teacher's. From `setup` on the student is its graduate (models/graduates.py): its own layers up to the last map, the
    projector, pooling, the teacher's frozen classifier. So its logits here are the ones that are scored and shipped.
    """

    reads_logits = False

    needs = frozenset({"maps", "pooled", "pairs"})

    def __init__(
        self,
        outer_weight: Weight = 1.0,
        ce_weight: Weight = 0.0,
        kd_weight: Weight = 0.0,
        tau: Temperature = 4.0,
        factor: Annotated[float, Field(gt=0)] = 2.0,
    ) -> None:
        super().__init__()
        self.outer_weight, self.ce_weight, self.kd_weight = outer_weight, ce_weight, kd_weight
        self.tau, self.factor = tau, factor

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        self.two_maps = borrow(context, lesson, self.factor)

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        out, teacher = lesson.student.out.float(), lesson.teacher
        terms = {
            "hard": self.ce_weight * lesson.task.hard(out, lesson.target).mean(),
            "features": self.outer_weight * F.mse_loss(*self.two_maps(lesson)),
        }
        if self.kd_weight:
            terms["teacher"] = self.kd_weight * lesson.task.soft(out, teacher.out, self.tau).mean()
        return terms


TwoMaps = Callable[[Lesson], tuple[Float[Tensor, "B D h w"], Float[Tensor, "B D h w"]]]
"""A lesson's last maps, the student's and the teacher's, of one shape."""


def borrow(context: SetupContext, lesson: Lesson, factor: float = 2.0) -> TwoMaps:
    """Make the context's student the graduate that ends in its teacher's classifier; gives what reads their last maps.

    Raises RecipeError where the classifier is not given the pooled last map, so that no projector could feed it.
    """
    teacher, student = context.teacher, context.student
    assert teacher is not None
    if isinstance(student.net, Graduate):
        raise RecipeError(
            f"classroom.student: {student.name}'s weights are a graduate's, which has a borrowed classifier already",
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
    """What a teacher does to its last stage's map before pooling it: nothing, or a last norm of its own.

    Found by trying: the map's average must be what its classifier is given. Raises RecipeError where none is.
    """
    net, x, pooled = teacher.net, last(lesson.teacher), lesson.teacher.vectors
    tail, norm = getattr(net, "tail", None), getattr(net, "norm", None)
    ways: list[Callable[[Tensor], Tensor]] = [lambda x: x]
    if isinstance(tail, nn.Module):  # the zoo's: a wide residual network's last norm and ReLU
        ways.append(tail)
    if isinstance(norm, nn.Module):  # timm's and torchvision's, of maps or with channels last
        ways += [norm, lambda x: norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]
    for way in ways:
        try:
            given = way(x).mean((2, 3))
        except RuntimeError:  # a norm over other dimensions
            continue
        if given.shape == pooled.shape and (given - pooled).abs().max() <= NEAR * pooled.abs().max():
            return way
    width, shape = pooled.shape[1], "x".join(map(str, x.shape[1:]))
    what = (
        f"{x.shape[1]} on average: a layer lies between them"
        if x.shape[1] != width
        else f"{width} others on average: its pooling is another (a class token), or a norm lies between them"
    )
    raise RecipeError(
        f"classroom.teacher: {teacher.name}'s classifier takes {width} numbers, its last map ({shape}) gives {what}",
        hint="Choose a teacher that ends in average pooling and one linear layer (ResNet, WRN, RegNet, Swin), or a "
        "method that needs no such classifier: srrl, fitnets, crd.",
    )


def classifier(member: Member) -> tuple[Float[Tensor, "K D"], Float[Tensor, " K"] | None]:
    """A mentor's last layer, of the data's classes only, in float32."""
    head = member.head
    weight, bias = head.weight.detach().float().flatten(1), head.bias
    bias = None if bias is None else bias.detach().float()
    if member.class_index is not None:
        weight, bias = weight[member.class_index], None if bias is None else bias[member.class_index]
    return weight, bias


class OFA(Method):
    """Every stage of the student answers through a projector of its own, and is taught by the teacher's last answer.

    OFA-KD, Hao et al. 2023 (arXiv 2310.19444): no map of the teacher's is looked at, so any two architectures fit.
    A convolutional student's stages are halved once for every stage that is left, a transformer's tokens are merged
    to a 7x7 grid and pass attention blocks; projectors are left behind after training.

    student: which projectors; `auto` takes those for tokens where the student has attention over positions.
    stages: which of the student's stages, from 1; all when empty.
    """

    tasks = frozenset({"classify"})

    needs = frozenset({"maps", "pooled", "hard_target", "pairs"})

    def __init__(
        self,
        gt: Weight = 1.0,
        kd: Weight = 1.0,
        ofa: Weight = 1.0,
        eps: Annotated[float, Field(gt=0)] = 1.0,
        tau: Temperature = 1.0,
        student: Literal["auto", "cnn", "token"] = "auto",
        stages: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.gt, self.kd, self.ofa, self.eps, self.tau = gt, kd, ofa, eps, tau
        self.kind, self.stages = student, list(stages)

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        maps = list(stages(lesson.student).items())
        n = len(maps)
        self.stages = self.stages or list(range(1, n + 1))
        if bad := [k for k in self.stages if not 1 <= k <= n]:
            raise RecipeError(
                f"method.stages: {context.student.name} has no stage {bad[0]}",
                hint=f"It has {', '.join(f'{k}: {name}' for k, (name, _) in enumerate(maps, 1))}.",
            )
        tokens = _attends(context.student.net) if self.kind == "auto" else self.kind == "token"
        ours, theirs = lesson.student.vectors.shape[1], lesson.teacher.vectors.shape[1]
        make = _token_projector if tokens else _cnn_projector
        width = ours if tokens else max(ours, theirs)
        self.projectors = nn.ModuleDict({
            maps[k - 1][0]: make(maps[k - 1][1], width, n - k, context.task.num_classes) for k in sorted(set(self.stages))
        })  # fmt: skip
        self.projectors.apply(_initialise)

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        out, teacher, maps = lesson.student.out, lesson.teacher.out, lesson.student.stages

        def taught(answer: Tensor) -> Tensor:
            return ofa_loss(answer, teacher, lesson.target, eps=self.eps, tau=self.tau).mean()

        each = [taught(projector(maps[name])) for name, projector in self.projectors.items()]
        return {
            "hard": self.gt * lesson.task.hard(out, lesson.target).mean(),
            "teacher": self.kd * taught(out),
            "stages": self.ofa * torch.stack(each).sum(),
        }


def _attends(net: nn.Module) -> bool:
    """Whether positions of the image attend to each other: a transformer of any kind."""
    return any(type(one).__name__.endswith(("Attention", "AttentionV2", "MixerBlock")) for one in net.modules())


def _cnn_projector(x: Tensor, width: int, left: int, classes: int) -> nn.Module:
    """A stage's map halved once for each of the `left` stages after it, to `width` channels, pooled, classified."""
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
    """Two separable convolutions, the first with stride 2."""

    def separable(a: int, b: int, stride: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(a, a, 3, stride, 1, groups=a, bias=False)
        return [depthwise, nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    return nn.Sequential(*separable(cin, cin, 2), *separable(cin, cout, 1))


def _token_projector(x: Tensor, width: int, left: int, classes: int) -> nn.Module:
    """A stage's tokens merged to a 7x7 grid, through attention blocks, averaged, classified."""
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
    """Four neighbouring tokens become one: concatenated, normalised, projected. An odd side is padded with zeros."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * cin), nn.Linear(4 * cin, cout, bias=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        merged = F.pixel_unshuffle(x, 2).permute(0, 2, 3, 1)
        return self.reduce(self.norm(merged)).permute(0, 3, 1, 2)


class Tokens(nn.Module):
    """A grid as a row of tokens."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N C"]:
        return x.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    """Tokens averaged."""

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B C"]:
        return x.mean(1)


def _initialise(module: nn.Module) -> None:
    """Convolutions Kaiming fan-out, linear layers a truncated normal of deviation 0.02, biases zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.trunc_normal_(module.in_proj_weight, std=0.02)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
