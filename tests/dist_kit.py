"""What the tests of ranks share: small trainings that any number of ranks can run, and the processes that run them."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_kit as kit
import torch
from torch import Tensor, nn

from kdcli import methods
from kdcli.data import open_data
from kdcli.errors import RecipeError
from kdcli.methods.base import Lesson, Method, Phase, Terms
from kdcli.recipe import DataConfig, Recipe
from kdcli.system import distributed, shards
from kdcli.training.evaluate import outputs
from kdcli.workflows import groups

TIMEOUT = 240.0
NORM_FREE = "timm:test_nfnet@none"


class Odd(Method):
    """All that a method may have and the built-in ones have not: parameters of its own, noise, a memory, two phases."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Linear(10, 10)
        self.memory: Tensor
        self.register_buffer("memory", torch.zeros(10))

    def phases(self, train: Any) -> list[Phase]:
        slower = train.model_copy(update={"lr": train.lr / 2})
        return [Phase("one", 1, ("student",), train), Phase("two", 1, ("student",), slower)]

    def loss(self, lesson: Lesson, phase: Phase) -> Terms:
        out = lesson.student.out.float()
        noise = torch.randn(out.shape, generator=lesson.generator)
        apart = torch.cdist(out, out.detach()).mean()  # every sample with every other
        taught = (self.adapter(out) - lesson.mentors_out[0] - 0.1 * noise).square().mean()
        self.memory += out.detach().mean(0)
        return {"hard": lesson.task.hard(out, lesson.target).mean(), "taught": 0.1 * taught, "apart": 0.01 * apart}


methods.METHODS["odd"] = "dist_kit:Odd"

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "ranks over the whole batch": ("classroom", {"train.batch_size": 9}),  # 30 images: the last batch has three
    "micro-batches": ("kd", {"train.accumulate": 2, "train.clip_grad": 1.0, "train.ema": 0.9}),
    "mixed images": ("aver", {"train.mixup": 0.2, "train.cutmix": 1.0, "train.label_smoothing": 0.1}),
    "mixed micro-batches": ("kd", {"train.mixup": 0.2, "train.accumulate": 2}),
    "a held-out slice": ("nokd", {"data.holdout": 0.1, "train.drop_last": True}),
    "a method with everything": ("odd", {}),
    "maps of the whole batch": ("vid", {"train.batch_size": 9}),
    "a memory of samples": ("crd", {"train.batch_size": 9, "train.lr": 0.005}),
    "batch norm": ("classroom", {"classroom.student": "cifar_resnet10_xxs"}),
    "batch norm at rest": ("nokd", {"classroom.student": "cifar_resnet10_xxs", "train.lr": 0.0}),
}


def recipe(name: str) -> Recipe:
    method, over = RECIPES[name]
    return kit.recipe(method, **{"classroom.student": NORM_FREE, "train.epochs": 2, **over})


def trained(name: str, folder: Path) -> dict[str, Any]:
    """What one training came to, as this rank has it."""
    config = recipe(name)
    room = groups.open_classroom(config, kit.CPU)
    run = distributed.on_rank0(lambda: kit.Run(folder))
    session = groups.open_session({config.method.name: config}, room, run, {config.method.name: run})
    groups.start(session, "distill", room)
    kit.drive(groups.go(session))
    learner = session.learners[0]
    test = open_data(DataConfig(name="digits", image_size=8)).test
    state = learner.state()
    return {
        "learners": state["learners"][next(iter(state["learners"]))],
        "method": state["method"],
        "rows": run.metrics(),
        "answers": outputs(learner.graduate(), test, kit.CPU, 50),
        "own": len(shards.turns(len(test), 50)[distributed.rank()]),
        "noise": [learner.generator.initial_seed(), torch.default_generator.initial_seed()],
    }


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun, or a cluster's own launcher, tells a process."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    own = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {
        **os.environ,
        **{key: str(value) for key, value in own.items()},
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def in_ranks(folder: Path, world: int = 2) -> list[dict[str, Any]]:
    """Run this file in processes that find each other; what every rank has of every training in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [folder / f"rank-{rank}.txt" for rank in range(world)]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=environment(rank, world, port),
            stderr=word.open("w"),  # a pipe would fill up, and its rank stop, while the first is waited for
        )
        for rank, word in enumerate(words)
    ]
    codes = [process.wait(TIMEOUT) for process in ranks]
    assert codes == [0] * world, "\n".join(word.read_text() for word in words)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(world)]


def near(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    distributed.join(torch.device("cpu"))
    found: dict[str, Any] = {name: trained(name, out / name.replace(" ", "-")) for name in RECIPES}
    try:
        distributed.check_equal({"data": "the same", "teacher": f"of rank {distributed.rank()}"})
    except RecipeError as error:
        found["unlike"] = error.message
    torch.save(found, out / f"rank-{distributed.rank()}.pt")
    distributed.shutdown()
