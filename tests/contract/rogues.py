"""Methods that each break one rule of the contract, and some that keep them all. Loaded by file name, like a user's."""

import random
from typing import Any

import torch
from torch import nn

from kdcli.methods import Lesson, Method, Need, Phase, Terms


class Honest(Method):
    """Two learners that teach each other and learn from the teacher, with an adapter, a memory and noise."""

    capturable = False

    weight: float = 1.0
    """Weight of the mutual term."""
    tau: float = 2.0
    """Temperature of all."""

    def setup(self, context, lesson) -> None:
        self.adapter = nn.Linear(10, 10)
        self.peer = context.new_student(7, None)
        self.register_buffer("memory", torch.zeros(10, device=context.device))

    def learners(self):
        return {"student": self.context.student, "peer": self.peer}

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        task, student, peer = lesson.task, lesson.outputs["student"].out, lesson.outputs["peer"].out
        both = task.soft(student, peer.detach(), self.tau).mean() + task.soft(peer, student.detach(), self.tau).mean()
        adapted = self.adapter(student.float().tanh())
        noise = torch.randn(adapted.shape, generator=lesson.generator, device=adapted.device)
        return {
            "hard": task.hard(student, lesson.target).mean() + task.hard(peer, lesson.target).mean(),
            "mutual": self.weight * both,
            "adapter": 0.1 * (adapted - self.memory + 0.01 * noise).square().mean(),
            "teacher": task.soft(student, lesson.mentors_out[0], self.tau).mean(),
        }

    def after(self, lesson: Lesson) -> None:
        with torch.no_grad():
            self.memory.lerp_(lesson.student.out.float().mean(0), 0.1)


class Plain(Method):
    """The loss with the labels, and what a subclass adds to it."""

    teachers = 0

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        return {"hard": lesson.task.hard(lesson.student.out, lesson.target).mean(), **self.more(lesson)}

    def more(self, lesson: Lesson) -> Terms:
        return {}


class NoHard(Plain):
    def loss(self, lesson, phase):
        return {"teacher": super().loss(lesson, phase)["hard"]}


class Vector(Plain):
    def loss(self, lesson, phase):
        return {"hard": lesson.task.hard(lesson.student.out, lesson.target)}


class LowTerm(Plain):
    def loss(self, lesson, phase):
        return {"hard": super().loss(lesson, phase)["hard"].bfloat16()}


class LongNote(Plain):
    def more(self, lesson):
        lesson.notes["rank"] = torch.zeros(9)
        return {}


class NotOneNote(Plain):
    def more(self, lesson):
        lesson.notes["rank"] = torch.tensor(torch.nan)
        return {}


class Overflows(Plain):
    def more(self, lesson):
        return {"teacher": 1e-3 * lesson.student.out.float().exp().mean()}


class NoRoot(Plain):
    """sqrt's gradient at zero."""

    def more(self, lesson):
        return {
            "spread": 1e-3 * (lesson.student.out.float() - lesson.student.out[:, :1].float()).norm(dim=-1).sqrt().mean()
        }


class LowArithmetic(Plain):
    def more(self, lesson):
        return {"size": lesson.student.out.square().mean().float()}


class ReadsItem(Plain):
    def more(self, lesson):
        return {"size": 1e-3 * lesson.student.out.float().square().mean() * float(lesson.target.sum().item() >= 0)}


class Branches(Plain):
    def more(self, lesson):
        return {"size": lesson.student.out.float().square().mean() * (2e-3 if lesson.student.out.mean() > 0 else 1e-3)}


class Masks(Plain):
    def more(self, lesson):
        return {"size": 1e-3 * lesson.student.out[lesson.target >= 0].float().square().mean()}


class ReadsBuffer(Plain):
    def setup(self, context, lesson):
        self.register_buffer("weight", torch.tensor(1e-3, device=context.device))

    def more(self, lesson):
        return {"size": self.weight.item() * lesson.student.out.float().square().mean()}


class ReadsAfter(Plain):
    def after(self, lesson):
        lesson.student.out.detach().sum().item()


class ReadsEpoch(Plain):
    def more(self, lesson):
        return {"size": 1e-3 * (1 + lesson.epoch) * lesson.student.out.float().square().mean()}


class Counts(Plain):
    """Counts on the host, where the count is not saved."""

    def setup(self, context, lesson):
        self.calls = 0

    def more(self, lesson):
        self.calls += 1
        return {"size": 1e-3 * self.calls * lesson.student.out.float().square().mean()}


class Undetached(Honest):
    def loss(self, lesson, phase):
        student, peer = lesson.outputs["student"].out, lesson.outputs["peer"].out
        return {**super().loss(lesson, phase), "mutual": lesson.task.soft(student, peer, 1.0).mean()}


class Climbs(Plain):
    def loss(self, lesson, phase):
        return {"hard": 10 - super().loss(lesson, phase)["hard"]}


class Stubborn(Plain):
    """The loss falls, but the student does not learn the task."""

    def loss(self, lesson, phase):
        wrong = lesson.task.hard(lesson.student.out, (lesson.target + 1) % 10).mean()
        return {"hard": 0 * super().loss(lesson, phase)["hard"], "wrong": wrong}


class Meddles(Plain):
    """Changes a mentor."""

    def after(self, lesson):
        with torch.no_grad():
            next(self.context.mentors[0].parameters()).mul_(1.01)


class Wakes(Plain):
    """Registers a mentor as a submodule, which puts it in training mode."""

    def setup(self, context, lesson):
        if context.mentors:
            self.borrowed = context.mentors[0].net


class Reaches(Honest):
    """Changes a learner that its phase does not name."""

    def phases(self, train):
        return [Phase("alone", train.epochs, ("student",), train)]

    def after(self, lesson):
        with torch.no_grad():
            next(self.peer.parameters()).mul_(1.01)


class Lazy(Plain):
    """Names a learner that no term reaches."""

    def setup(self, context, lesson):
        self.extra = nn.Linear(4, 4)

    def learners(self):
        return {"student": self.context.student, "extra": self.extra}


class Forgets(Plain):
    """A moving average that is not a buffer."""

    def setup(self, context, lesson):
        self.average = torch.zeros(10, device=context.device)

    def more(self, lesson):
        return {"size": 1e-2 * (lesson.student.out.float() - self.average).square().mean()}

    def after(self, lesson):
        self.average.lerp_(lesson.student.out.detach().float().mean(0), 0.5)


class Gambles(Plain):
    def more(self, lesson):
        return {"noise": random.random() * 1e-3 * lesson.student.out.float().square().mean()}


class ClassNumbers(Plain):
    def more(self, lesson):
        return {"true": 1e-2 * lesson.student.out.float().gather(-1, lesson.target[:, None]).square().mean()}


class Refuses(ClassNumbers):
    needs = frozenset({Need.HARD_TARGET})


class Couples(Plain):
    def more(self, lesson):
        out = lesson.student.out.float()
        return {"spread": 1e-2 * (out - out.mean(0)).square().mean()}


class Declares(Couples):
    needs = frozenset({Need.FULL_BATCHES})


class Divides(Plain):
    """The unbiased variance of one image is 0 / 0."""

    needs = frozenset({Need.FULL_BATCHES})

    def more(self, lesson):
        return {"spread": 1e-2 * lesson.student.out.float().var(0).mean()}


class TwoMentors(Plain):
    def more(self, lesson):
        return {"peer": lesson.task.soft(lesson.student.out, lesson.mentors_out[1], 4.0).mean()}


class Untyped(Plain):
    weight: Any = 1.0


class Ships(Plain):
    """The graduate has a layer that the saved file does not hold."""

    def graduate(self):
        return self.context.student.with_net(nn.Sequential(self.context.student.net, nn.Linear(10, 3)))


class Draws(Plain):
    """Draws noise from its lesson's generator."""

    def more(self, lesson):
        return {"noise": torch.randn((), generator=lesson.generator, device=lesson.student.out.device)}


class Paired(Divides):
    needs = frozenset({Need.FULL_BATCHES, Need.PAIRS})
