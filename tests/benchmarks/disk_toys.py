"""DiSK's two toy problems (Kag et al., ICLR 2023, Sec. 2, Appendix A.1-A.2): in which minimum does each training end?

    python tests/benchmarks/disk_toys.py intervals|gaussians [--runs 100] [--out FILE.json] [--plot FILE.png]
    python tests/benchmarks/disk_toys.py intervals --search     looks for what the appendix leaves open; slow

Plain cross-entropy, KD and DiSK from `runs` initialisations on one data set; a table beside the published Table 1, with
95 % Wilson intervals. All runs are one tensor program, [R, ...] in front of everything, on the losses of kdcli.losses.

What the appendix does not say, and what was taken (found with --search, see SEARCHED below): see `Intervals` and
`Gaussians`.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.losses import disk, soft_loss

METHODS = ("ce", "kd", "disk")
Params = list[Tensor]


@dataclass(frozen=True)
class Setting:
    """What the appendix scans; its stated defaults but for alpha and tau, of which it states none."""

    alpha: float = 0.1
    tau: float = 4.0
    tau_s: float | None = None  # tau
    K: int = 2
    lambda_min: float = 0.1
    lambda_max: float = 50.0
    budget: float = 0.0
    period: int = 50
    rounds: int = 200
    inner: int = 3  # "three gradient steps"
    epochs: int = 200  # of cross-entropy and KD
    batch: int = 1000  # of their steps; DiSK's are over all the data


GRID: dict[str, list[Any]] = {  # Appendix A.1
    "alpha": [0.0, 0.1, 0.5, 0.9],
    "tau": [1.0, 2.0, 4.0],
    "tau_s": [1.0, 2.0, 4.0],
    "K": [1, 2, 3],
    "lambda_min": [0.01, 0.1, 1.0, 5.0, 10.0],
    "lambda_max": [1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0],
    "budget": [0.1, 0.05, 0.0],
    "period": [20, 50],
}


class Toy:
    """A data set, a teacher, and students and guides of which `runs` learn at once."""

    classes: int
    minima: tuple[str, ...]
    published: dict[str, tuple[int, ...]]
    x: Tensor
    y: Tensor

    def student(self, runs: int, g: torch.Generator) -> Params:
        raise NotImplementedError

    def logits(self, params: Params, x: Tensor) -> Tensor:
        raise NotImplementedError

    def project(self, params: Params) -> None:
        """After every step: back into the function class."""

    def teach(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's logits [N, C] and features [N, D]."""
        raise NotImplementedError

    def classify(self, params: Params) -> Tensor:
        """[R] in which of `minima` each run is; len(minima) for elsewhere."""
        raise NotImplementedError

    def guide(self, runs: int, g: torch.Generator) -> Params:
        raise NotImplementedError

    def log_g(self, params: Params, given: Tensor) -> Tensor:
        raise NotImplementedError


def linear(runs: int, cin: int, cout: int, g: torch.Generator) -> Params:
    """Weight and bias as nn.Linear starts them."""
    bound = 1 / math.sqrt(cin)
    return [(2 * torch.rand(runs, cout, k, generator=g) - 1) * bound for k in (cin, 1)]


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[R, N, cin] or [N, cin] -> [R, N, cout]."""
    return x @ weight.mT + bias.mT


def norm_relu(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Batch norm over all the given data, then ReLU."""
    mean, var = x.mean(-2, keepdim=True), x.var(-2, keepdim=True, unbiased=False)
    return F.relu((x - mean) / (var + 1e-5).sqrt() * gain + bias)


class Intervals(Toy):
    """1D, two intervals to be told with one.

    The appendix leaves open: kappa, the initialisation, the numbers of f*, and how the probability h becomes logits.
    """

    classes = 2
    minima = ("(2,3)", "(2,7)", "(5,7)")
    published = {"ce": (35, 64, 1), "kd": (30, 67, 3), "disk": (9, 1, 90)}

    def __init__(self, seed: int = 0, kappa: float = 5.0, head: str = "bounded", init: str = "uniform") -> None:
        self.kappa, self.head, self.init = kappa, head, init
        g = torch.Generator().manual_seed(seed)
        (self.x, self.y), self.test, self.valid = (self._draw(n, g) for n in (1000, 100, 100))
        self.truth = torch.tensor([2.0, 3.0, 5.0, 7.0])

    @staticmethod
    def _draw(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        blue, red = 3 * torch.rand(n // 2, generator=g), 6 * torch.rand(n - n // 2, generator=g)
        blue = torch.where(blue < 1, 2 + blue, 4 + blue)
        red = torch.where(red < 2, red, torch.where(red < 4, red + 1, red + 3))
        return torch.cat([blue, red]), torch.cat([torch.ones(len(blue)), torch.zeros(len(red))]).long()

    def student(self, runs: int, g: torch.Generator) -> Params:
        u = torch.rand(2, runs, generator=g)
        kind, _, number = self.init.partition(":")
        if kind == "uniform":
            a, b = (9 * u).sort(0).values
        elif kind == "near":  # a near the left end, b anywhere to its right
            a = float(number) * u[0]
            b = a + (9 - a) * u[1]
        elif kind == "from":
            a = float(number) * u[0]
            b = 9 * u[1]
            a, b = torch.minimum(a, b), torch.maximum(a, b)
        elif kind == "wide":
            a, b = 4.5 * u[0], 4.5 + 4.5 * u[1]
        elif kind == "unit":
            a, b = u.sort(0).values
        else:
            raise ValueError(kind)
        return [a, b]

    def h(self, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return torch.sigmoid(self.kappa * (x - a[:, None])) - torch.sigmoid(self.kappa * (x - b[:, None]))

    def _as_logits(self, h: Tensor) -> Tensor:
        if self.head == "bounded":
            return torch.stack([1 - h, h], -1)
        h = h.clamp(1e-6, 1 - 1e-6)
        return torch.stack([(1 - h).log(), h.log()], -1)

    def logits(self, params: Params, x: Tensor) -> Tensor:
        return self._as_logits(self.h(*params, x))

    def project(self, params: Params) -> None:
        a, b = params
        a.clamp_(0, 9)
        b.clamp_(0, 9)
        torch.maximum(a, b, out=b)

    def teach(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, d = self.truth
        h = torch.cat([self.h(a[None], b[None], x), self.h(c[None], d[None], x)])
        return self._as_logits(h.sum(0)), h.T

    def classify(self, params: Params) -> Tensor:
        ends = torch.stack(params, -1)
        places = torch.tensor([[2.0, 3.0], [2.0, 7.0], [5.0, 7.0]])
        far, at = (ends[:, None] - places).abs().amax(-1).min(-1)
        return torch.where(far < 1.0, at, 3)

    def guide(self, runs: int, g: torch.Generator) -> Params:
        return linear(runs, 4, 1, g)

    def log_g(self, params: Params, given: Tensor) -> Tensor:
        return F.logsigmoid(affine(given, *params)[..., 0])


def run(toy: Toy, method: str, s: Setting, runs: int, seed: int) -> Params:
    g = torch.Generator().manual_seed(seed)
    student = [p.requires_grad_() for p in toy.student(runs, g)]
    opt = torch.optim.SGD(student, lr=0.1, momentum=0.9, weight_decay=0.01)
    with torch.no_grad():
        teacher, features = toy.teach(toy.x)

    def step(optimizer: torch.optim.Optimizer, each: Tensor) -> None:
        optimizer.zero_grad()
        each.sum().backward()  # runs do not touch each other
        optimizer.step()
        with torch.no_grad():
            toy.project(student)

    def hard(out: Tensor, y: Tensor) -> Tensor:
        return -F.log_softmax(out, -1).gather(-1, y.expand(out.shape[:-1])[..., None])[..., 0]

    n = len(toy.x)
    if method != "disk":
        for _ in range(s.epochs):
            order = torch.randperm(n, generator=g) if s.batch < n else torch.arange(n)
            for rows in order.split(s.batch):
                out = toy.logits(student, toy.x[rows])
                loss = hard(out, toy.y[rows]).mean(-1)
                if method == "kd":  # Eq. 1
                    kl = soft_loss(out, teacher[rows], tau=s.tau).mean(-1)
                    loss = s.alpha * loss + (1 - s.alpha) * kl
                step(opt, loss)
        return [p.detach() for p in student]
    tau_s = s.tau_s or s.tau
    guide = [p.requires_grad_() for p in toy.guide(runs, g)]
    opt_g = torch.optim.SGD(guide, lr=0.1, momentum=0.9, weight_decay=0.01)
    given = torch.cat([features, teacher], -1)
    mask = disk.guided_classes(teacher, K=s.K)
    target = disk.guided_target(teacher, mask, tau=s.tau)
    for r in range(s.rounds):
        weight = disk.lambda_at(r, s.rounds, lambda_min=s.lambda_min, lambda_max=s.lambda_max, period=s.period)
        with torch.no_grad():
            out = toy.logits(student, toy.x)
            ce, wrong = hard(out, toy.y), out.argmax(-1) != toy.y
        for _ in range(s.inner):
            log_g = toy.log_g(guide, given)
            dist = disk.guided_loss(out, target, mask, log_g, tau=s.tau, tau_s=tau_s).mean(-1)
            over = disk.budget_loss(log_g.exp(), ce, wrong, budget=s.budget)
            step(opt_g, (1 - s.alpha) * dist + weight * over)  # Eq. 5
        with torch.no_grad():
            log_g = toy.log_g(guide, given)
        for _ in range(s.inner):
            out = toy.logits(student, toy.x)
            dist = disk.guided_loss(out, target, mask, log_g, tau=s.tau, tau_s=tau_s).mean(-1)
            step(opt, s.alpha * hard(out, toy.y).mean(-1) + (1 - s.alpha) * dist)
    return [p.detach() for p in student] + [p.detach() for p in guide]


def counts(toy: Toy, params: Params) -> list[int]:
    return torch.bincount(toy.classify(params), minlength=len(toy.minima) + 1).tolist()
