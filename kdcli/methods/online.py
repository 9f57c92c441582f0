"""Students that teach each other, without any mentor: DML, ONE, OKDDip, FFL.

In the branch form (`form = "branches"`, ONE always) all share the student's beginning and each has its own copy of the
rest of its network, from other initial weights; the student itself is the first. In the network form each is a whole
network of its own. FFM (Li et al. 2020) is not here: its fusion layers and its diversity term are published nowhere.
"""

from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses.online import attended, gated, mutual_loss, peer_loss, ramp
from kdcli.methods import pairing
from kdcli.methods.base import Lesson, Method, Phase, SetupContext, Temperature, Terms
from kdcli.models import layers
from kdcli.models.member import Member
from kdcli.models.split import Tail
from kdcli.system import device as devices

Many = Annotated[int, Field(ge=2)]
Epochs = Annotated[float, Field(ge=0)]
APART = 1_000_003  # between the seeds of students that learn together: those of `--seeds` lie side by side


class Answer(NamedTuple):
    """What one of the students says to the batch."""

    out: Float[Tensor, "B K"]
    vectors: Float[Tensor, "B D"] | None
    last: Float[Tensor, "B C H W"] | None  # the last map before pooling


class Cohort(Method):
    """Students that learn together: the student, and others who are whole networks or branches of it.

    split: the stage after which branches part, `auto` the last but one. needs: what the equation asks of every answer.
    """

    teachers = 0
    tasks = frozenset({"classify"})

    def __init__(
        self, others: int, form: str, cohort: tuple[str, ...], split: str, ramp_epochs: float, needs: frozenset[str]
    ) -> None:
        super().__init__()
        self.count, self.cohort, self.split, self.ramp_epochs = len(cohort) or others, cohort, split, ramp_epochs
        self.branching = form == "branches"
        if self.branching and cohort:
            raise RecipeError(
                "method.cohort: branches are of the student's own architecture",
                hint="--set method.form=networks lets every student have its own, or leave method.cohort out.",
            )
        self.needs = needs | ({"maps"} if self.branching else set())
        self.capturable = not ramp_epochs  # the ramp reads the epoch
        self.others: dict[str, Member] = {}
        self.branches, self.rests = nn.ModuleList(), []

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        specs = self.cohort or (None,) * self.count
        seats = [context.new_student(context.train.seed + APART * n, spec) for n, spec in enumerate(specs, 1)]
        if not self.branching:
            self.others = {f"student{n}": member for n, member in enumerate(seats, 2)}
            return
        assert lesson is not None
        stages = lesson.student.stages
        self.tap = [*stages][-2] if self.split == "auto" else pairing.tap(stages, self.split, "the student", "split")
        self.precision, _ = devices.precision(context.train.precision, context.device, frozen=False)  # as the student's
        self.branches = nn.ModuleList(seats)
        self.rests: list[Tail] = []
        for member in seats:
            rest = Tail(member.net, member.head, member.input_size, member.name, self.tap)
            rest.share_beginning(context.student.net)
            self.rests.append(rest)

    def learners(self) -> dict[str, nn.Module]:
        return {"student": self.context.student, **self.others}

    def answers(self, lesson: Lesson) -> list[Answer]:
        """Every student's, the student's own first."""
        views = [lesson.student, *(lesson.outputs[name] for name in self.others)]
        found = []
        for view in views:
            stages = view.stages if "maps" in self.needs else {}
            vectors = view.vectors if "pooled" in self.needs else None
            found.append(Answer(view.out, vectors, [*stages.values()][-1] if stages else None))
        if self.rests:
            x, precision = lesson.student.stages[self.tap], self.precision
            with torch.autocast(x.device.type, devices.dtype_of(precision), enabled=precision != "fp32"):
                found += [Answer(*rest(x)) for rest in self.rests]
        return found

    def hard(self, lesson: Lesson, *outs: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
        """The sum of all students' cross-entropies."""
        return torch.stack([lesson.task.hard(out, lesson.target).mean() for out in outs]).sum()

    def member(self, number: int) -> Member:
        """The student of that number, 0 the student itself, as a network of its own."""
        others = [*self.others.values(), *self.branches]
        return ([self.context.student, *others])[number]  # pyright: ignore[reportReturnType]

    def check_keep(self, keep: int) -> None:
        """Raise RecipeError unless there is a student of that number."""
        if keep > self.count:
            raise RecipeError(
                f"method.keep = {keep}: there are {self.count + 1} students, the first is 0",
                hint=f"0 to {self.count}.",
            )


class DML(Cohort):
    """Zhang et al. 2018, "Deep Mutual Learning", arXiv 1706.00384.

    students: how many; or cohort: the others' architectures. form: everyone learns from every other (`pairwise`), or
    all from the others' mean logits (`ensemble`). The paper has no temperature (tau = 1); 3 is the benchmark's.
    variant: `official` is OKDDip's code, in which gradient flows into the targets too.
    """

    def __init__(
        self,
        students: Many = 2,
        cohort: tuple[str, ...] = (),
        tau: Temperature = 3.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        form: Literal["pairwise", "ensemble"] = "pairwise",
        variant: Literal["paper", "official"] = "paper",
    ) -> None:
        super().__init__(students - 1, "networks", cohort, "auto", 0, frozenset())
        self.tau, self.alpha, self.beta = tau, alpha, beta
        self.pairwise, self.through = form == "pairwise", variant == "official"

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        outs = torch.stack([answer.out.float() for answer in self.answers(lesson)])
        mutual = mutual_loss(outs, tau=self.tau, pairwise=self.pairwise, through=self.through)
        return {"hard": self.alpha * self.hard(lesson, *outs), "peers": self.beta * mutual.mean()}


class ONE(Cohort):
    """Lan et al. 2018, "Knowledge Distillation by On-the-Fly Native Ensemble", arXiv 1806.04606.

    branches: how many, the student's own end among them. A gate on the shared map weighs their logits to the ensemble
    that teaches each. keep: the branch that is scored and ships. ramp_epochs: over which the teaching grows; 0: none.
    """

    runs_networks = True

    def __init__(
        self,
        branches: Many = 3,
        tau: Temperature = 3.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        ramp_epochs: Epochs = 80.0,
        keep: Annotated[int, Field(ge=0)] = 0,
        split: str = "auto",
    ) -> None:
        needs = frozenset({"pairs"})  # the gate's batch norm sees one number per image
        super().__init__(branches - 1, "branches", (), split, ramp_epochs, needs)
        self.tau, self.alpha, self.beta, self.keep = tau, alpha, beta, keep
        self.check_keep(keep)

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        super().setup(context, lesson)
        assert lesson is not None
        n, width = self.count + 1, lesson.student.stages[self.tap].shape[1]
        self.gate = nn.Sequential(nn.Linear(width, n), nn.BatchNorm1d(n), nn.ReLU(), nn.Softmax(-1))

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        outs = torch.stack([answer.out.float() for answer in self.answers(lesson)])
        gate = self.gate(lesson.student.stages[self.tap].mean((2, 3)))  # [B, N]
        ensemble = gated(outs, gate)
        taught = peer_loss(outs, ensemble.detach().expand_as(outs), tau=self.tau).mean(-1).sum()
        return {
            "hard": self.alpha * self.hard(lesson, *outs, ensemble),
            "ensemble": self.beta * ramp(lesson.epoch, epochs=self.ramp_epochs) * taught,
        }

    def graduate(self) -> Member:
        return self.member(self.keep)


class OKDDip(Cohort):
    """Chen et al. 2020, "Online Knowledge Distillation with Diverse Peers", arXiv 1912.00350.

    students: how many, the leader among them; the leader is the student, and alone ships. Each peer aims at its own
    mixture of all peers' logits, by an attention that learns through these aims; the leader at their plain mean.
    key_factor: how much shorter queries and keys are than the vectors. ramp_epochs: over which the teaching grows.
    """

    runs_networks = True

    def __init__(
        self,
        students: Annotated[int, Field(ge=3)] = 4,
        form: Literal["branches", "networks"] = "branches",
        tau: Temperature = 3.0,
        alpha: float = 1.0,
        ramp_epochs: Epochs = 80.0,
        key_factor: Annotated[int, Field(ge=1)] = 8,
        split: str = "auto",
    ) -> None:
        needs = frozenset() if form == "branches" else frozenset({"pooled"})  # a branch says what it pools anyway
        super().__init__(students - 1, form, (), split, ramp_epochs, needs)
        self.tau, self.alpha, self.key_factor = tau, alpha, key_factor

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        super().setup(context, lesson)
        width = context.student.width
        short = max(width // self.key_factor, 1)
        self.query, self.key = (nn.Linear(width, short, bias=False) for _ in range(2))

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        leader, *peers = self.answers(lesson)
        outs = torch.stack([peer.out.float() for peer in peers])
        h = torch.stack([peer.vectors.float() for peer in peers if peer.vectors is not None])
        aims = attended(outs, self.query(h), self.key(h))
        taught = peer_loss(outs, aims, tau=self.tau).mean(-1).sum()
        led = peer_loss(leader.out, outs.mean(0), tau=self.tau).mean()
        share = self.alpha * ramp(lesson.epoch, epochs=self.ramp_epochs)
        return {
            "hard": self.hard(lesson, leader.out, *outs),
            "peers": share * taught,
            "leader": share * led,
        }


class FFL(Cohort):
    """Kim et al. 2020, "Feature Fusion for Online Mutual Knowledge Distillation", arXiv 1904.09058.

    The students' last maps are fused, and the fusion's classifier teaches each; the mean of their logits teaches it.
    students: how many; or cohort: the others' architectures (form = "networks"). keep: which of them is scored and
    ships; the fused classifier never does. One optimiser for all: the authors decay the fusion's weights less.
    """

    runs_networks = True

    def __init__(
        self,
        students: Many = 2,
        cohort: tuple[str, ...] = (),
        form: Literal["branches", "networks"] = "branches",
        tau: Temperature = 3.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        ramp_epochs: Epochs = 80.0,
        keep: Annotated[int, Field(ge=0)] = 0,
        split: str = "auto",
    ) -> None:
        super().__init__(students - 1, form, cohort, split, ramp_epochs, frozenset({"maps", "pairs"}))
        self.tau, self.alpha, self.beta, self.keep = tau, alpha, beta, keep
        self.check_keep(keep)

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        super().setup(context, lesson)
        assert lesson is not None
        if not all(rest.has_last_map for rest in self.rests):
            raise RecipeError(
                f"method: the rest of {context.student.name} does not pass its last map on, so there is nothing to fuse",
                hint="--set method.form=networks",
            )
        width = [*lesson.student.stages.values()][-1].shape[1]
        shapes = [[*member.taps().values()][-3] for member in self.others.values()]  # before pooled and logits
        wide = width * (1 + len(self.rests)) + sum(shape[0] for shape in shapes)
        self.fusion = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, context.task.num_classes),
        )  # fmt: skip

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        answers = self.answers(lesson)
        outs = torch.stack([answer.out.float() for answer in answers])
        maps = [answer.last.float() for answer in answers if answer.last is not None]
        size = (min(x.shape[2] for x in maps), min(x.shape[3] for x in maps))
        fused = self.fusion(torch.cat([layers.pooled_to(x, size) for x in maps], 1))
        taught = peer_loss(outs, fused.detach().expand_as(outs), tau=self.tau).mean(-1).sum()
        fusing = peer_loss(fused, outs.detach().mean(0), tau=self.tau).mean()
        share = self.beta * ramp(lesson.epoch, epochs=self.ramp_epochs)
        return {
            "hard": self.alpha * self.hard(lesson, *outs, fused),
            "fusion": share * taught,
            "mean": share * fusing,
        }

    def graduate(self) -> Member:
        return self.member(self.keep)
