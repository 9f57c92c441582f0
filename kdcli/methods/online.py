"""Students that teach each other, without a mentor: DML, ONE, OKDDip, FFL.

In the branch form (`form = "branches"`, ONE always) all share the student's first layers, and each has its own copy of
the rest of the network, with its own initial weights; the first is the student itself. In the network form each is a
whole network. FFM (Li et al. 2020) is missing: its fusion layers and its diversity term are not published.

The file is long because the four share both forms.
"""

from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from kdcli.errors import RecipeError
from kdcli.losses.online import attended, gated, mutual_loss, peer_loss, ramp
from kdcli.methods import pairing
from kdcli.methods.base import Count, Lesson, Method, Need, Phase, SetupContext, Temperature, Terms
from kdcli.models import layers
from kdcli.models.member import Member
from kdcli.models.split import Tail
from kdcli.system import device as devices

Many = Annotated[int, Field(ge=2)]
Ramp = Annotated[float, Field(ge=0)]
APART = 1_000_003  # between the seeds of students that learn together, since those of `--seeds` are consecutive


class Answer(NamedTuple):
    """The output of one of the students for the batch."""

    out: Float[Tensor, "B K"]
    vectors: Float[Tensor, "B D"] | None
    last: Float[Tensor, "B C H W"] | None  # the last map before pooling


class Cohort(Method):
    """Students that learn together: the student, and others that are whole networks or branches of it."""

    teachers = 0
    tasks = frozenset({"classify"})

    def gather(
        self, others: int, *, branching: bool, needs: set[Need], cohort: tuple[str, ...] = (), ramp_epochs: float = 0.0
    ) -> None:
        """Set the learners. Called by `__init__`.

        others: the number of students without the student itself; `cohort` names their architectures instead.
        branching: whether they are branches of the student. needs: what the equation reads of every student.
        """
        self.count, self.architectures, self.branching = len(cohort) or others, cohort, branching
        if branching and cohort:
            raise RecipeError(
                "method.cohort: branches have the student's own architecture",
                hint="--set method.form=networks lets every student have its own, or leave method.cohort out.",
            )
        self.needs = frozenset(needs | ({Need.MAPS} if branching else set()))
        self.capturable = not ramp_epochs  # the ramp reads the epoch
        self.others: dict[str, Member] = {}
        self.copies, self.rests = nn.ModuleList(), []

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        specs = self.architectures or (None,) * self.count
        members = [context.new_student(context.train.seed + APART * n, spec) for n, spec in enumerate(specs, 1)]
        if not self.branching:
            self.others = {f"student{n}": member for n, member in enumerate(members, 2)}
            return
        assert lesson is not None
        stages = lesson.student.stages
        split: str = getattr(self, "split", "auto")
        self.tap = [*stages][-2] if split == "auto" else pairing.tap(stages, split, "the student", "split")
        self.precision, _ = devices.precision(context.train.precision, context.device, frozen=False)  # the student's
        self.copies = nn.ModuleList(members)
        self.rests: list[Tail] = []
        for member in members:
            rest = Tail(member.net, member.head, member.input_size, member.name, self.tap)
            rest.share_beginning(context.student.net)
            self.rests.append(rest)

    def learners(self) -> dict[str, nn.Module]:
        return {"student": self.context.student, **self.others}

    def answers(self, lesson: Lesson) -> list[Answer]:
        """The answer of every student, the student itself first."""
        outputs = [lesson.student, *(lesson.outputs[name] for name in self.others)]
        found = []
        for output in outputs:
            stages = output.stages if Need.MAPS in self.needs else {}
            vectors = output.vectors if Need.POOLED in self.needs else None
            found.append(Answer(output.out, vectors, [*stages.values()][-1] if stages else None))
        if self.rests:
            x, precision = lesson.student.stages[self.tap], self.precision
            with torch.autocast(x.device.type, devices.dtype_of(precision), enabled=precision != "fp32"):
                found += [Answer(*rest(x)) for rest in self.rests]
        return found

    def hard(self, lesson: Lesson, *outs: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
        """The sum of the students' losses with the labels."""
        return torch.stack([lesson.task.hard(out, lesson.target).mean() for out in outs]).sum()

    def member(self, number: int) -> Member:
        """The student with that number, 0 being the student itself, as a whole network."""
        others = [*self.others.values(), *self.copies]
        return ([self.context.student, *others])[number]  # pyright: ignore[reportReturnType]

    def check_keep(self, keep: int) -> None:
        """Raise RecipeError unless there is a student with that number."""
        if keep > self.count:
            raise RecipeError(
                f"method.keep = {keep}: there are {self.count + 1} students, counted from 0", hint=f"0 to {self.count}."
            )


class DML(Cohort):
    """Zhang et al. 2018, "Deep Mutual Learning" (arXiv 1706.00384).

    The paper has no temperature (tau = 1); 3 is the benchmark's.
    """

    students: Many = 2
    """The number of students, the student included."""
    cohort: tuple[str, ...] = ()
    """Architectures of the other students, instead of their number."""
    tau: Temperature = 3.0
    """Temperature of all students."""
    alpha: float = 1.0
    """Weight of the losses with the labels."""
    beta: float = 1.0
    """Weight of the mutual loss."""
    form: Literal["pairwise", "ensemble"] = "pairwise"
    """Whether each learns from every other student, or from the mean of the others' logits."""
    variant: Literal["paper", "official"] = "paper"
    """`official` is OKDDip's code, in which gradient flows into the targets too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gather(self.students - 1, branching=False, needs=set(), cohort=self.cohort)

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        outs = torch.stack([answer.out.float() for answer in self.answers(lesson)])
        mutual = mutual_loss(outs, tau=self.tau, pairwise=self.form == "pairwise", through=self.variant == "official")
        return {"hard": self.alpha * self.hard(lesson, *outs), "peers": self.beta * mutual.mean()}


class ONE(Cohort):
    """Lan et al. 2018, "Knowledge Distillation by On-the-Fly Native Ensemble" (arXiv 1806.04606).

    A gate on the shared map weights the branches' logits to the ensemble that teaches each branch.
    """

    runs_networks = True

    branches: Many = 3
    """The number of branches, the student's own included."""
    tau: Temperature = 3.0
    """Temperature of the ensemble and the branches."""
    alpha: float = 1.0
    """Weight of the losses with the labels."""
    beta: float = 1.0
    """Weight of the ensemble's teaching."""
    ramp_epochs: Ramp = 80.0
    """Epochs over which the teaching grows to its full weight; 0: none."""
    keep: Annotated[int, Field(ge=0)] = 0
    """The branch that is evaluated and ships, counted from 0 (the student's own)."""
    split: str = "auto"
    """The stage after which the branches part; `auto`: the last but one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        needs = {Need.PAIRS}  # the gate's batch norm sees one number per image
        self.gather(self.branches - 1, branching=True, needs=needs, ramp_epochs=self.ramp_epochs)
        self.check_keep(self.keep)

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        super().setup(context, lesson)
        assert lesson is not None
        n, width = self.count + 1, lesson.student.stages[self.tap].shape[1]
        self.gate = nn.Sequential(nn.Linear(width, n), nn.BatchNorm1d(n), nn.ReLU(), nn.Softmax(-1))

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        outs = torch.stack([answer.out.float() for answer in self.answers(lesson)])
        gate = self.gate(lesson.student.stages[self.tap].mean((2, 3)))  # [B, N]
        ensemble = gated(outs, gate)
        soft = peer_loss(outs, ensemble.detach().expand_as(outs), tau=self.tau).mean(-1).sum()
        return {
            "hard": self.alpha * self.hard(lesson, *outs, ensemble),
            "ensemble": self.beta * ramp(lesson.epoch, epochs=self.ramp_epochs) * soft,
        }

    def graduate(self) -> Member:
        return self.member(self.keep)


class OKDDip(Cohort):
    """Chen et al. 2020, "Online Knowledge Distillation with Diverse Peers" (arXiv 1912.00350).

    Each peer learns from its own mixture of all peers' logits, weighted by an attention that is trained through these
    targets; the leader, which is the student and the only one shipped, learns from their mean.
    """

    runs_networks = True

    students: Annotated[int, Field(ge=3)] = 4
    """The number of students, the leader included."""
    form: Literal["branches", "networks"] = "branches"
    """Whether the students share their first layers or are whole networks."""
    tau: Temperature = 3.0
    """Temperature of all students."""
    alpha: float = 1.0
    """Weight of the teaching."""
    ramp_epochs: Ramp = 80.0
    """Epochs over which the teaching grows to its full weight; 0: none."""
    key_factor: Count = 8
    """The length of queries and keys is that of the pooled vectors divided by this."""
    split: str = "auto"
    """The stage after which the branches part; `auto`: the last but one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        branching = self.form == "branches"
        needs: set[Need] = set() if branching else {Need.POOLED}  # a branch gives its pooled vectors in any case
        self.gather(self.students - 1, branching=branching, needs=needs, ramp_epochs=self.ramp_epochs)

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        super().setup(context, lesson)
        width = context.student.width
        short = max(width // self.key_factor, 1)
        self.query, self.key = (nn.Linear(width, short, bias=False) for _ in range(2))

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        leader, *peers = self.answers(lesson)
        outs = torch.stack([peer.out.float() for peer in peers])
        h = torch.stack([peer.vectors.float() for peer in peers if peer.vectors is not None])
        targets = attended(outs, self.query(h), self.key(h))
        mutual = peer_loss(outs, targets, tau=self.tau).mean(-1).sum()
        led = peer_loss(leader.out, outs.mean(0), tau=self.tau).mean()
        share = self.alpha * ramp(lesson.epoch, epochs=self.ramp_epochs)
        return {
            "hard": self.hard(lesson, leader.out, *outs),
            "peers": share * mutual,
            "leader": share * led,
        }


class FFL(Cohort):
    """Kim et al. 2020, "Feature Fusion for Online Mutual Knowledge Distillation" (arXiv 1904.09058).

    The students' last maps are fused, and the classifier of the fusion teaches each student; the mean of their logits
    teaches the classifier, which is never shipped. One optimizer trains all; the authors use less weight decay
    for the fusion.
    """

    runs_networks = True

    students: Many = 2
    """The number of students, the student included."""
    cohort: tuple[str, ...] = ()
    """Architectures of the other students (form = "networks"), instead of their number."""
    form: Literal["branches", "networks"] = "branches"
    """Whether the students share their first layers or are whole networks."""
    tau: Temperature = 3.0
    """Temperature of the students and the fused classifier."""
    alpha: float = 1.0
    """Weight of the losses with the labels."""
    beta: float = 1.0
    """Weight of the teaching."""
    ramp_epochs: Ramp = 80.0
    """Epochs over which the teaching grows to its full weight; 0: none."""
    keep: Annotated[int, Field(ge=0)] = 0
    """The student that is evaluated and ships, counted from 0 (the student itself)."""
    split: str = "auto"
    """The stage after which the branches part; `auto`: the last but one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gather(
            self.students - 1, branching=self.form == "branches", needs={Need.MAPS, Need.PAIRS}, cohort=self.cohort,
            ramp_epochs=self.ramp_epochs,
        )  # fmt: skip
        self.check_keep(self.keep)

    def setup(self, context: SetupContext, lesson: Lesson | None) -> None:
        super().setup(context, lesson)
        assert lesson is not None
        if not all(rest.has_last_map for rest in self.rests):
            raise RecipeError(
                f"method.form: the branches of {context.student.name} do not return their last map, which is fused",
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
        fusion = peer_loss(outs, fused.detach().expand_as(outs), tau=self.tau).mean(-1).sum()
        mean = peer_loss(fused, outs.detach().mean(0), tau=self.tau).mean()
        share = self.beta * ramp(lesson.epoch, epochs=self.ramp_epochs)
        return {
            "hard": self.alpha * self.hard(lesson, *outs, fused),
            "fusion": share * fusion,
            "mean": share * mean,
        }

    def graduate(self) -> Member:
        return self.member(self.keep)
