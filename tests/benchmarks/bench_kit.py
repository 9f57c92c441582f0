"""What the benchmarks share: a CIFAR classroom on noise, and a clock that takes turns."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import kdcli.models.cifar  # noqa: F401  (registers cifar_*)
from kdcli.data import Batch, DataSet, Split
from kdcli.data.dataset import Pixels
from kdcli.data.views import Views
from kdcli.mentors.classroom import Classroom
from kdcli.models import checkpoint, registry
from kdcli.models.member import Member
from kdcli.recipe import Recipe
from kdcli.system import device as devices
from kdcli.training.learner import Learner

STUDENT = "cifar_resnet20"
MENTORS = ["resnet110", "resnet8", "resnet14", "shufflenetv2", "mobilenetv2", "shufflenetv1"]  # of Table 7's first row
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGES = 1024


def arguments(text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="how often each is timed, in turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default=None)
    return parser


def start(args: argparse.Namespace) -> torch.device:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return devices.pick(args.device)


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": devices.describe(device),
        "fast bfloat16": devices.has_bf16_units(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def room(device: torch.device, mentors: list[str] | None = None, images: int = IMAGES, **keys: Any) -> Classroom:
    """A classroom on noise, norms at random: the arithmetic is CIFAR-100's, and costs the same on any images."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)
    split = Split(Pixels(pixels, Views("crop-flip", 32)), torch.arange(images) % 100)
    classes = [str(k) for k in range(100)]
    data = DataSet("noise", classes, None, "noise", MEAN, STD, (32, 32), "crop-flip", split, split, views=162)
    given = {"classroom.student": STUDENT, "data.name": "noise", "train.batch_size": 64, **keys}
    recipe = Recipe().with_(**given)
    members = [_member(f"cifar_{name}", device) for name in (MENTORS if mentors is None else mentors)]
    return Classroom(recipe, data, members, device, registry.resolve(recipe.classroom.student or STUDENT))


def _member(name: str, device: torch.device) -> Member:
    found = registry.resolve(name)
    net = registry.create(found, 100).module
    norms = [layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for layer in norms:
        torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
        layer.momentum = 1.0
    with torch.no_grad():  # statistics of its own, or a hundred layers would answer with numbers beyond all bounds
        net.train()(torch.randn(64, 3, 32, 32))
    for layer in norms:
        layer.momentum = 0.1
    member = Member(net, found, mean=MEAN, std=STD, input_size=(32, 32), interpolation="bilinear", num_classes=100)
    member.digest = checkpoint.digest(net)
    return member.to(device)


def learner(classroom: Classroom, method: str, **keys: Any) -> Learner:
    recipe = classroom.recipe.with_method(method).with_(**keys)
    one = Learner(method, recipe, classroom, steps_per_epoch=1000)
    one.begin_epoch(0, lambda: iter(()))
    return one


def batches(classroom: Classroom, size: int, device: torch.device, n: int) -> list[Batch]:
    from kdcli.data import Stream

    stream = Stream(classroom.data, size, seed=0, device=device)
    return [batch for epoch in range(-(-n // len(stream))) for batch in stream.epoch(epoch)][:n]


def alternate(
    ways: dict[str, Callable[[], Any]], rounds: int, device: torch.device, steps: dict[str, int] | None = None
) -> dict[str, list[float]]:
    """Seconds of every call, all ways called in turn, after two calls each to warm up; of a step where a call makes
    several (`steps`)."""

    def clock(step: Callable[[], Any]) -> float:
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(2):
        for step in ways.values():
            step()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, step in ways.items():
            times[name].append(clock(step) / (steps or {}).get(name, 1))
    return times


def against(times: dict[str, list[float]], base: str) -> dict[str, dict[str, Any]]:
    """Medians in milliseconds, and how many times as fast as `base`: of the medians, and quartiles round by round."""
    out = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(times[base], seconds, strict=True)]
        out[name] = {"ms": round(1000 * statistics.median(seconds), 2)}
        if name != base:
            out[name]["times as fast"] = round(statistics.median(times[base]) / statistics.median(seconds), 3)
            out[name]["quartiles"] = [round(q, 3) for q in statistics.quantiles(ratios, n=4)]
    return out
