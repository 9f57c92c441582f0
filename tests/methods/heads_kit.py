"""Small networks of every family, and real lessons of them, for methods that read maps and heads."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from net_kit import SIZE, K, member
from torch import Tensor, nn

from kdcli.methods import Lesson, Method, Phase, SetupContext
from kdcli.models.member import Member
from kdcli.recipe import TrainConfig
from kdcli.tasks import Classify

CPU = torch.device("cpu")
PAIRS = [
    ("zoo", "wide"), ("zoo", "torchvision"), ("torchvision", "wrn"), ("timm", "zoo"), ("conv_head", "timm"),
    ("vit", "wide"), ("swin", "torchvision"), ("torchvision_vit", "timm"), ("zoo", "swin"),
]  # fmt: skip
"""(student, teacher), three stages against four, convolutions against attention."""
TOKEN_TEACHERS = [("zoo", "vit"), ("swin", "vit"), ("timm", "torchvision_vit")]


class Class:
    """A method with a student and a teacher, set up on one lesson, and lessons for it."""

    def __init__(
        self, method: Method, student: str = "zoo", teacher: str | Member = "wide", batch: int = 6, **train: Any
    ) -> None:
        self.method: Any = method
        self.batch = batch
        self.student: Any = member(student, 1)
        self.teacher: Any = member(teacher, 2) if isinstance(teacher, str) else teacher
        self.teacher.requires_grad_(False).eval()
        self.task, self.pixels = (
            Classify(K),
            torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)),
        )
        self.target = torch.arange(batch) % K
        self.config = TrainConfig(**{"batch_size": batch, "epochs": 4, **train})
        data = SimpleNamespace(train=range(24), classes=[str(k) for k in range(K)])
        method.context = SetupContext(
            self.student, [self.teacher], cast(Any, data), self.task, self.config, CPU, cast(Any, None)
        )
        self.student.eval()
        with torch.no_grad():
            method.setup(method.context, self.lesson(2))
        self.student.train()
        method.train()
        self.phases = method.phases(self.config)

    def lesson(self, count: int | None = None) -> Lesson:
        n, needs = count or self.batch, self.method.needs
        with torch.no_grad():
            teacher = self.teacher.see(self.pixels[:n], needs)
        student = self.student.see(self.pixels[:n], needs)
        index, generator = torch.arange(n), torch.Generator().manual_seed(0)
        return Lesson(self.target[:n], index, 0.0, 0, self.task, generator, student, {"student": student}, [teacher])

    @property
    def main(self) -> Phase:
        return self.phases[-1]

    def loss(self, phase: Phase | None = None) -> dict[str, Tensor]:
        return self.method.loss(self.lesson(), phase or self.main)

    def learning(self) -> list[Tensor]:
        return [*self.student.parameters(), *self.method.parameters()]

    def steps(self, phase: Phase | None = None, count: int = 12, lr: float = 5e-3) -> list[float]:
        """The loss before each of some Adam steps over everything that learns."""
        adam, losses = torch.optim.Adam(self.learning(), lr), []
        for _ in range(count):
            adam.zero_grad()
            loss = torch.stack(list(self.loss(phase).values())).sum()
            loss.backward()
            adam.step()
            losses.append(loss.item())
        return losses


def check_isolated(room: Class, phase: Phase | None = None) -> None:
    """Finite terms; gradient reaches the student and the method's own parameters, never the unchanged teacher."""
    before = {name: x.clone() for name, x in room.teacher.state_dict().items()}
    terms = room.loss(phase)
    assert all(x.shape == () and x.dtype == torch.float32 and torch.isfinite(x) for x in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    grads = [p.grad for p in room.learning() if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert all(p.grad is None for p in room.teacher.parameters())
    assert not room.teacher.training
    for name, x in room.teacher.state_dict().items():
        assert torch.equal(x, before[name]), name


def reached(module: nn.Module) -> float:
    """The share of a module's parameters that some gradient reached."""
    grads = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters()]
    return sum(grads) / len(grads)
