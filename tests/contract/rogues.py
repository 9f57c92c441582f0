"""Methods that each break one rule of the contract, and some that keep them all. Loaded by file name, as a user's."""

import random

import torch
from torch import nn

from kdcli.methods import Lesson, Method, Phase, Terms


class Honest(Method):
    """Two learners that teach each other and hear the teacher, with an adapter, a memory and noise."""

    capturable = False

    def __init__(self, weight: float = 1.0, tau: float = 2.0) -> None:
        super().__init__()
        self.weight, self.tau = weight, tau

    def setup(self, room, lesson) -> None:
        self.adapter = nn.Linear(10, 10)
        self.peer = room.seat(7, None)
        self.register_buffer("memory", torch.zeros(10, device=room.device))

    def learners(self):
        return {"student": self.room.student, "peer": self.peer}

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
    """Cross-entropy, and what a rogue adds to it."""

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
    def setup(self, room, lesson):
        self.register_buffer("weight", torch.tensor(1e-3, device=room.device))

    def more(self, lesson):
        return {"size": self.weight.item() * lesson.student.out.float().square().mean()}


class ReadsAfter(Plain):
    def after(self, lesson):
        lesson.student.out.detach().sum().item()


class ReadsEpoch(Plain):
    def more(self, lesson):
        return {"size": 1e-3 * (1 + lesson.epoch) * lesson.student.out.float().square().mean()}


class Counts(Plain):
    """On the host, where it is not saved."""

    def setup(self, room, lesson):
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
    """The loss falls, but what is learned is not the task."""

    def loss(self, lesson, phase):
        wrong = lesson.task.hard(lesson.student.out, (lesson.target + 1) % 10).mean()
        return {"hard": 0 * super().loss(lesson, phase)["hard"], "wrong": wrong}


class Meddles(Plain):
    """Teaches a mentor."""

    def after(self, lesson):
        with torch.no_grad():
            next(self.room.mentors[0].parameters()).mul_(1.01)


class Wakes(Plain):
    """Makes a mentor a part of itself, which puts it in training mode."""

    def setup(self, room, lesson):
        if room.mentors:
            self.borrowed = room.mentors[0].net


class Reaches(Honest):
    """Changes a learner that its phase does not name."""

    def phases(self, train):
        return [Phase("alone", train.epochs, ("student",), train)]

    def after(self, lesson):
        with torch.no_grad():
            next(self.peer.parameters()).mul_(1.01)


class Lazy(Plain):
    """Names a learner that nothing teaches."""

    def setup(self, room, lesson):
        self.extra = nn.Linear(4, 4)

    def learners(self):
        return {"student": self.room.student, "extra": self.extra}


class Forgets(Plain):
    """A moving average that is no buffer."""

    def setup(self, room, lesson):
        self.average = torch.zeros(10, device=room.device)

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
    needs = frozenset({"hard_target"})


class Couples(Plain):
    def more(self, lesson):
        out = lesson.student.out.float()
        return {"spread": 1e-2 * (out - out.mean(0)).square().mean()}


class Declares(Couples):
    needs = frozenset({"full_batches"})


class Divides(Plain):
    """The unbiased variance of one image is 0 / 0."""

    needs = frozenset({"full_batches"})

    def more(self, lesson):
        return {"spread": 1e-2 * lesson.student.out.float().var(0).mean()}


class TwoMentors(Plain):
    def more(self, lesson):
        return {"peer": lesson.task.soft(lesson.student.out, lesson.mentors_out[1], 4.0).mean()}


class Untyped(Plain):
    def __init__(self, weight=1.0) -> None:
        super().__init__()


class Ships(Plain):
    """Another than it scored: a part that the kept file has no place for."""

    def graduate(self):
        return self.room.student.with_net(nn.Sequential(self.room.student.net, nn.Linear(10, 3)))


class Draws(Plain):
    """From its lesson's generator, as TeKAP's noisy mentors do."""

    def more(self, lesson):
        return {"noise": torch.randn((), generator=lesson.generator, device=lesson.student.out.device)}


class Paired(Divides):
    needs = frozenset({"full_batches", "pairs"})
