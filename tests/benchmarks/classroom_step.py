"""Cost of one ClassroomKD training step, against a plain loop over the same networks; JSON out.

    python tests/benchmarks/classroom_step.py [--precision fp32|bf16] [--rounds 15] [--threads N]

The plain loop calls student and mentors one after another in float32 and NCHW and writes the loss as Algorithm 1 does.
Both see the same pictures and are stepped in turn within one process; what counts is the ratio of the medians. The
classroom is CIFAR's: a ResNet-20 student, mentors ResNet-110, ResNet-8, ResNet-14, ShuffleNetV2, MobileNetV2 and
ShuffleNetV1 with random weights (the cost does not depend on them), batch 64. Needs no data.
"""

import argparse
import json
import statistics
import time

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdcli.models  # noqa: F401  (registers cifar_*)
from kdcli import device as devices, names
from kdcli.classroom import Classroom, Member
from kdcli.data import Batch, DataSet, Split
from kdcli.data.base import Pixels
from kdcli.data.views import Views
from kdcli.learner import Learner
from kdcli.mentors import Mentors
from kdcli.recipe import Recipe

STUDENT = "cifar_resnet20"
MENTORS = ["resnet110", "resnet8", "resnet14", "shufflenetv2", "mobilenetv2", "shufflenetv1"]
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def plain_step(student: nn.Module, mentors: list[nn.Module], optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    """Algorithm 1, one network after another."""
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    x = (batch.pixels - mean.to(batch.pixels.device)) / std.to(batch.pixels.device)
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


def room(device: torch.device, precision: str, batch_size: int) -> tuple[Classroom, Batch]:
    """A classroom on noise: the arithmetic is that of CIFAR-100."""
    pixels = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    target = torch.arange(batch_size) % 100
    split = Split(Pixels(pixels, Views("crop-flip", 32)), target)
    classes = [str(k) for k in range(100)]
    data = DataSet("noise", classes, None, "", MEAN, STD, 32, "crop-flip", split, split)
    recipe = Recipe().with_(**{"classroom.student": STUDENT, "train.precision": precision, "data.name": "noise"})
    members = []
    for name in MENTORS:
        found = names.resolve(f"cifar_{name}")
        net = names.create(found, 100)
        members.append(
            Member(net.module, found, mean=MEAN, std=STD, input_size=32, interpolation="bilinear", num_classes=100).to(
                device
            )
        )
    batch = Batch(pixels.float() / 255, target.to(device), torch.arange(batch_size), torch.zeros(batch_size))
    return Classroom(recipe, data, members, device, names.resolve(STUDENT)), batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of kdcli's student")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = devices.pick(args.device)
    classroom, batch = room(device, args.precision, args.batch_size)
    frozen, _ = devices.precision("auto", device, frozen=True)
    plain_mentors = [timm.create_model(f"cifar_{name}", num_classes=100).to(device).eval() for name in MENTORS]
    plain_student = timm.create_model(STUDENT, num_classes=100).to(device).train()
    optimizer = torch.optim.SGD(plain_student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    learner = Learner("classroom", classroom.recipe, classroom, steps_per_epoch=1000)
    mentors = Mentors(classroom.mentors, frozen, device)
    learner.begin_epoch(0, lambda _: iter(()))
    steps = iter(range(1000))

    def ours() -> None:
        number = next(steps)
        learner.step(batch, mentors.answer(batch), 0, number, number)

    def plain() -> None:
        plain_step(plain_student, plain_mentors, optimizer, batch)

    def clock(step) -> float:
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for step in (plain, ours, plain, ours):
        step()
    times: dict[str, list[float]] = {"plain": [], "kdcli": []}
    for _ in range(args.rounds):
        times["plain"].append(clock(plain))
        times["kdcli"].append(clock(ours))
    ratios = [a / b for a, b in zip(times["plain"], times["kdcli"], strict=True)]
    print(
        json.dumps(
            {
                "device": devices.describe(device),
                "fast bfloat16": devices.has_bf16_units(device),
                "torch": torch.__version__,
                "threads": args.threads,
                "student": args.precision,
                "mentors": frozen,
                "batch": args.batch_size,
                "rounds": args.rounds,
                "plain_ms": round(1000 * statistics.median(times["plain"]), 1),
                "kdcli_ms": round(1000 * statistics.median(times["kdcli"]), 1),
                "ratio": round(statistics.median(times["plain"]) / statistics.median(times["kdcli"]), 3),
                "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
