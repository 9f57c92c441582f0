"""One ClassroomKD step of a six-mentor CIFAR classroom, each of kdcli's ways against a plain loop; JSON out.

    python tests/benchmarks/step.py [--rounds 15] [--threads N] [--device cuda] [--compile]

The plain loop calls student and mentors one after another in float32 and NCHW and writes the loss as Algorithm 1 does.
All ways see the same pictures and are stepped in turn within one process; what counts is the ratio of the medians. The
classroom is that of Table 7's first row: a ResNet-20 student; ResNet-110, ResNet-8, ResNet-14, ShuffleNetV2,
MobileNetV2 and ShuffleNetV1 with random weights (the cost does not depend on them) as mentors; batch 64.

live: mentors answer every batch. compiled: mentors (and student) through torch.compile, which is timed apart. ahead:
four batches answered at once. warm bank: answers read from a bank on disk. With each way stands how far its mentors'
answers, and its loss over twenty updates, are from the plain loop's: a fast way that answered otherwise would be
worthless. Needs no data.
"""

import json
import tempfile
import time
from pathlib import Path

import bench_kit as kit
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.data import Batch
from kdcli.mentors import bank_build
from kdcli.mentors.mentors import Mentors, worth_compiling
from kdcli.system import device as devices

UPDATES = 20  # after which losses are compared


def plain_step(student: nn.Module, mentors: list[nn.Module], optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    """Algorithm 1, one network after another."""
    mean, std = (torch.tensor(x, device=batch.images.device).view(1, 3, 1, 1) for x in (kit.MEAN, kit.STD))
    x = (batch.images - mean) / std
    y_s = student(x)
    with torch.no_grad():
        answers = [mentor(x) for mentor in mentors]
        w = [torch.exp(-F.cross_entropy(y, batch.target)) for y in (y_s, *answers)]
        ranks = [len(mentors) * one / sum(w) for one in w]
    loss = ranks[0] * F.cross_entropy(y_s, batch.target)
    for y_m, r_m in zip(answers, ranks[1:], strict=True):
        if r_m > ranks[0]:
            tau = 1 + 12 * (r_m - ranks[0]) / r_m
            log_p, log_q = F.log_softmax(y_m / tau, -1), F.log_softmax(y_s / tau, -1)
            loss = loss + r_m * tau**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


class Plain:
    """The plain loop, with copies of the classroom's networks."""

    def __init__(self, classroom, device: torch.device) -> None:
        self.mentors = [member.net for member in classroom.mentors]
        self.student = timm.create_model(kit.STUDENT, num_classes=100).to(device).train()
        self.student.load_state_dict(classroom.student(0).net.state_dict())
        self.optimizer = torch.optim.SGD(self.student.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)

    def step(self, batch: Batch) -> Tensor:
        return plain_step(self.student, self.mentors, self.optimizer, batch)


def main() -> None:
    parser = kit.arguments(__doc__)
    parser.add_argument("--compile", action="store_true", help="also compiled mentors and student (minutes on a CPU)")
    args = parser.parse_args()
    device = kit.start(args)
    keys = {"train.lr": 0.01, "train.schedule": "constant", "train.precision": "fp32"}
    classroom = kit.room(device, **keys)
    frozen, _ = devices.precision("auto", device, frozen=True)
    given = kit.batches(classroom, args.batch_size, device, kit.IMAGES // args.batch_size)
    out = {**kit.machine(device), "mentors": frozen, "batch": args.batch_size, "rounds": args.rounds}

    def mentors(**options) -> Mentors:
        return Mentors(classroom.mentors, frozen, device, **options)

    with tempfile.TemporaryDirectory() as folder, _home(Path(folder)):
        banked = classroom.recipe.with_(**{"classroom.bank": True})
        warm = bank_build.open_mentors(classroom, banked)
        for batch in given:
            warm.answer(batch)  # later passes find everything there
        live, ahead = mentors(), mentors(ahead=4)
        answers = {"live": live, "ahead": ahead, "warm bank": warm}
        students = {name: {} for name in answers}
        if devices.has_bf16_units(device):
            answers |= {"live, bf16 student": live, "warm bank, bf16 student": warm}
            students |= {name: {"train.precision": "bf16"} for name in answers if name.endswith("bf16 student")}
        if args.compile:
            quick = mentors()
            began = time.perf_counter()
            names = worth_compiling(classroom.mentors, 240 * 50_000)  # what kdcli decides for the paper's training
            out["not compiled"] = quick.compile(args.batch_size, names)
            out["seconds to compile the mentors"] = round(time.perf_counter() - began, 1)
            half = {"train.precision": "bf16"} if devices.has_bf16_units(device) else {}
            answers |= {
                "live, mentors compiled": quick,
                "live, all compiled": quick,
                "warm bank, student compiled": warm,
            }
            students["live, mentors compiled"] = {}
            students["live, all compiled"] = {"train.compile": True, **half}
            students["warm bank, student compiled"] = {"train.compile": True, **half}
        reference = Plain(classroom, device)
        with torch.no_grad():
            x = given[0].images
            right = torch.stack([member(x) for member in classroom.mentors])
        losses = torch.stack([reference.step(given[n % len(given)]) for n in range(UPDATES)])
        plain, turn = Plain(classroom, device), {"n": 0}
        ways = {"plain": lambda: plain.step(given[turn["n"] % len(given)])}
        exact = {}
        for name, how in answers.items():
            learner = kit.learner(classroom, "classroom", **students[name])
            for n in range(UPDATES):
                batch = given[n % len(given)]
                learner.step(batch, how.answer(batch).outputs, 0, n, n)
            total = sum(learner.meter.means("term/").values())
            found = torch.stack([output.out for output in how.answer(given[0]).outputs])
            exact[name] = {
                "answers differ by": float((found - right).abs().max() / right.abs().max()),
                "mean loss differs by": float(abs(total - losses.mean()) / losses.mean()),
            }
            ways[name] = _way(learner, how, given, turn, how.ahead)
        out["ways"] = kit.against(kit.alternate(ways, args.rounds, device, {"ahead": ahead.ahead}), "plain")
        for name, facts in exact.items():
            out["ways"][name] |= {key: float(f"{value:.1e}") for key, value in facts.items()}
    print(json.dumps(out, indent=1))


def _way(learner, how: Mentors, given: list[Batch], turn: dict[str, int], steps: int):
    answered = how.answer_ahead(_endless(given))  # as the loop does

    def step() -> None:
        for _ in range(steps):
            n = turn["n"] = turn["n"] + 1
            batch, answers = next(answered)
            learner.step(batch, answers.outputs, 0, n, n)

    return step


def _endless(given: list[Batch]):
    while True:
        yield from given


def _home(folder: Path):
    import contextlib
    import os

    @contextlib.contextmanager
    def home():
        before = os.environ.get("KDCLI_HOME")
        os.environ["KDCLI_HOME"] = str(folder)
        yield
        if before is None:
            del os.environ["KDCLI_HOME"]
        else:
            os.environ["KDCLI_HOME"] = before

    return home()


if __name__ == "__main__":
    main()
