"""What the engine's tests share: a zoo of quick mentors for the digits, small recipes, and ways to drive a session."""

import atexit
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdcli import recipe as recipes
from kdcli.data import open_data
from kdcli.mentors.classroom import Classroom
from kdcli.models import cards, registry
from kdcli.models.cards import Card
from kdcli.recipe import DataConfig, Recipe
from kdcli.training import loop
from kdcli.training.run import Run
from kdcli.training.session import EpochEnd, Session, Step
from kdcli.workflows import compare, groups
from kdcli.workflows.compare import Comparison

CPU = torch.device("cpu")
STEPS = 4  # updates in an epoch of the recipe below: 30 images in batches of 8, the last of 6
MENTORS = ("cifar_resnet8", "cifar_resnet14")


def random_weights(arch: str, seed: int) -> dict[str, Tensor]:
    """Finite weights that no two seeds share, with norms that are not at rest."""
    torch.manual_seed(seed)
    module = registry.create(registry.resolve(arch), 10).module
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
            layer.running_mean.normal_(std=0.2)
            layer.running_var.uniform_(0.5, 1.5)
    return module.state_dict()


def add_mentor(arch: str, seed: int) -> Card:
    """Put random weights for the digits into the zoo of the KDCLI_HOME now in force."""
    card = Card(
        name=f"{arch} on digits",
        architecture=f"zoo:{arch}",
        dataset="digits",
        data_hash=open_data(DataConfig(name="digits")).hash,
        num_classes=10,
        image_size=8,
        mean=(0.3, 0.3, 0.3),
        std=(0.4, 0.4, 0.4),
        epoch=None,
    )
    return cards.add(random_weights(arch, seed), card)


@cache
def home() -> Path:
    """A KDCLI_HOME whose zoo knows MENTORS, made once for a test process."""
    folder = Path(tempfile.mkdtemp(prefix="kdcli-engine-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    before = os.environ.get("KDCLI_HOME")
    os.environ["KDCLI_HOME"] = str(folder)
    for seed, arch in enumerate(MENTORS):
        add_mentor(arch, seed)
    if before is None:
        del os.environ["KDCLI_HOME"]
    else:
        os.environ["KDCLI_HOME"] = before
    return folder


def recipe(method: str = "nokd", **over: Any) -> Recipe:
    """Two epochs of four updates on 30 digits of 8 pixels, in float32."""
    tables = {
        "data": {"name": "digits", "per_class": 3, "image_size": 8},
        "classroom": {
            "student": "cifar_resnet10_xxs",
            "teacher": MENTORS[1],
            "peers": [MENTORS[0]],
            "precision": "fp32",
        },
        "method": {"name": method},
        "train": {"epochs": 2, "batch_size": 8, "lr": 0.05, "schedule": "constant", "precision": "fp32"},
    }
    return recipes.from_dict(tables, "test").with_(**over)


def classroom(config: Recipe) -> Classroom:
    return groups.open_classroom(config, CPU)


def session(
    config: Recipe, path: Path, *, resume: bool = False, keep: set[int] | None = None, room: Classroom | None = None
) -> Session:
    """One learner of the recipe's method, its folder laid out unless it is to be resumed."""
    room = room or classroom(config)
    run = Run(path)
    name = config.method.name
    opened = groups.open_session({name: config}, room, run, {name: run}, keep)
    if not resume:
        groups.start(opened, "distill", room)
    return opened


def drive(events: Iterator[Any], each: Callable[[Any], object] = lambda event: None) -> list[Any]:
    """Run a training to its end, showing every event to `each`."""
    out = []
    for event in events:
        out.append(event)
        each(event)
    return out


def trained(config: Recipe, path: Path, **options: Any) -> Run:
    """A finished run of the recipe."""
    opened = session(config, path, **options)
    drive(groups.go(opened))
    return opened.run


def follow(classroom: Classroom, events: Iterator[Any], label: str) -> None:
    """What a workflow reports to, where nothing is to be shown."""
    drive(events)


def session_of(events: Iterator[Any]) -> Session:
    """The session that a `follow` was given the training of."""
    return inspect.getgeneratorlocals(events)["session"]  # pyright: ignore[reportArgumentType]


def compared(
    config: Recipe, path: Path, methods: list[str], seeds: list[int], each: Callable[[Any], object] = lambda event: None
) -> Comparison:
    """A finished compare; every event of its trainings is shown to `each`."""
    return compare.compare(
        config, methods, seeds, CPU, lambda classroom, events, label: drive(events, each) and None, out=str(path)
    )


def at(epoch: int, batch: int, do: Callable[[Step], object]) -> Callable[[Any], None]:
    """For `drive`: call `do` after one batch (both counted from 1); batch 0 is the end of the epoch."""

    def each(event: Any) -> None:
        if not isinstance(event, Step | EpochEnd):
            return
        if (event.epoch, event.batch if isinstance(event, Step) else 0) == (epoch, batch):
            do(event)  # pyright: ignore

    return each


def student(run: Run) -> dict[str, Tensor]:
    return load_file(run.path / "student.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states hold the same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def state(learner: loop.Learner) -> dict[str, Tensor]:
    """A copy of a learner's student as it is now, under the names it ships with."""
    return {k: v.detach().clone() for k, v in learner.student.net.state_dict().items()}
