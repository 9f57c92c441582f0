"""SHAKE: a shadow head on the teacher's maps is trained with the student, and the two teach each other."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses.shake import standardise
from kdcli.methods.base import Lesson, Method, Need, Phase, Positive, SetupContext, Temperature, Terms, Weight
from kdcli.methods.pairing import stages
from kdcli.models.layers import conv_bn_relu, resized_to

MAPS = 3


class SHAKE(Method):
    """Li and Jin 2022, "Shadow knowledge distillation": between offline distillation and online distillation.

    The shadow reads three of the teacher's maps, detached, and ends in the teacher's own frozen classifier. All logits
    are standardised per sample and multiplied by `logit_scale`, also for the cross-entropy; targets are detached. If
    the teacher has more than three stages, the last stage whose width the classifier takes and the two before it are
    read.
    """

    tasks = frozenset({"classify"})
    needs = frozenset({Need.MAPS, Need.PAIRS})

    gamma: Weight = 1.0
    """Weight of the loss with the labels."""
    beta: Weight = 1.0
    """Weight of every term with the shadow."""
    tau: Temperature = 4.0
    """Temperature of the student and the shadow."""
    logit_scale: Positive = 3.1415
    """Standard deviation of the logits after standardising."""
    eps: Positive = 1e-7
    """Added to the variance when standardising."""

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        assert lesson is not None
        assert context.teacher is not None
        maps, width = stages(lesson.teacher), context.teacher.width
        names = list(maps)
        ends = [n for n, name in enumerate(names) if maps[name].shape[1] == width and n >= MAPS - 1]
        if not ends:
            shapes = ", ".join(f"{name} {'x'.join(map(str, x.shape[1:]))}" for name, x in maps.items())
            raise RecipeError(
                f"classroom.teacher: the classifier of {context.teacher.name} takes {width} numbers, and no map "
                f"from the third on has as many channels ({shapes})",
                hint="Choose a teacher that ends in pooling and one linear layer (ResNet, RegNet, the zoo's VGG).",
            )
        self.taps = names[ends[-1] - MAPS + 1 : ends[-1] + 1]
        self.shadow = Shadow([maps[tap] for tap in self.taps])

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        task, target, maps = lesson.task, lesson.target, stages(lesson.teacher)
        assert self.context.teacher is not None
        vectors = self.shadow([maps[tap].detach() for tap in self.taps])

        def scaled(out: Tensor) -> Tensor:
            return standardise(out, logit_scale=self.logit_scale, eps=self.eps)

        student, teacher = scaled(lesson.student.out), scaled(lesson.teacher.out)
        proxy = scaled(self.context.teacher.classify(vectors))
        return {
            "hard": self.gamma * task.hard(student, target).mean(),
            "proxy": self.beta * task.soft(student, proxy.detach(), self.tau).mean(),
            "proxy_hard": self.beta * task.hard(proxy, target).mean(),
            "proxy_student": self.beta * task.soft(proxy, student.detach(), self.tau).mean(),
            "proxy_teacher": self.beta * F.mse_loss(proxy, teacher),
        }


class Shadow(nn.Module):
    """u = down(f1) + same(f2); v = down(u) + same(f3); w = keep(v), averaged over positions.

    down halves (a 3x3 convolution of stride 2) if the next map is smaller, and is resized to it if that is not exactly
    half; each convolution has batch norm and ReLU and is initialised by Kaiming fan-out.
    """

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        width = maps[-1].shape[1]
        self.down, self.same = nn.ModuleList(), nn.ModuleList()
        for before, after in pairwise(maps):
            conv = nn.Conv2d(
                before.shape[1], after.shape[1], 3, 2 if after.shape[2] < before.shape[2] else 1, 1, bias=False
            )
            self.down.append(nn.Sequential(conv, nn.BatchNorm2d(after.shape[1]), nn.ReLU()))
            self.same.append(conv_bn_relu(after.shape[1], after.shape[1]))
        self.keep = conv_bn_relu(width, width, 3)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = maps[0]
        for f, down, same in zip(maps[1:], self.down, self.same, strict=True):
            x = resized_to(down(x), (f.shape[2], f.shape[3])) + same(f)
        return self.keep(x).mean((2, 3))
