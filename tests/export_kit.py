"""What the tests of exported files share: networks as after training, and real digits as data of two tasks."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.data import DataSet, open_data
from kdcli.data.digits import read
from kdcli.export import Exported
from kdcli.export.onnx import export_onnx
from kdcli.models.build import build
from kdcli.models.member import Member
from kdcli.models.registry import resolve
from kdcli.recipe import DataConfig
from kdcli.system.sizes import Size, pair
from kdcli.tasks import Classify, Task

CLASSES = ["ant", "bee", "cat", "dog", "élan"]
STUDENT = "cifar_resnet10_xxs"


class Student(nn.Module):
    """Normalises and resizes for itself, as a Member does."""

    def __init__(self, net: nn.Module, size: int | Size, mode: str = "bicubic", antialias: bool = True) -> None:
        super().__init__()
        self.net, self.size, self.mode, self.antialias = net, pair(size), mode, antialias
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, size=self.size, mode=self.mode, antialias=self.antialias)
        return self.net((images - self.mean) / self.std).float()


def as_if_trained(net: nn.Module) -> nn.Module:
    """Norms and biases as after training: an untrained network hides what an export loses."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            assert parameter.isfinite().all(), name
    return net


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return as_if_trained(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12), nn.Hardswish(), nn.Dropout(0.5)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
        )
    )


def images(n: int, size: int | Size = 16, seed: int = 3) -> Tensor:
    """Smooth coloured images, which are nearer to real ones than noise."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=pair(size), mode="bilinear")


def export(network: nn.Module, real: Tensor, path: Path, of: Task | None = None, **options: Any) -> Exported:
    """`export_onnx` with what the task gives it, by default classification of CLASSES."""
    of = of or Classify(len(CLASSES))
    meaning = {"task": of.name, "output_name": of.output_name, "same": of.same}
    return export_onnx(network, real, path, **{"metadata": {}, **meaning, **options})


def answers(student: nn.Module, pixels: Tensor) -> Tensor:
    """torch's outputs in eval mode; the mode is restored."""
    was = student.training
    with torch.inference_mode():
        out = student.eval()(pixels.to(next(student.parameters()).dtype))
    student.train(was)
    return out


def digits(size: Size) -> DataSet:
    """scikit-learn's handwritten digits, resized to (height, width)."""
    return open_data(DataConfig(name="digits", image_size=size, augment="none"))


def pairs(path: Path) -> DataSet:
    """Two handwritten digits side by side, [N, 3, 8, 16], written to `path` as an .npz file and opened.

    The labels are the one or two digits that an image shows. Training pairs are made of training digits,
    test pairs of test digits.
    """
    raw, rng, parts = read(DataConfig(name="digits"), []), np.random.default_rng(0), {}
    for part, n in (("train", 2000), ("test", 300)):
        left, right = rng.integers(0, len(raw.labels[part]), (2, n))
        parts[f"{part}_images"] = np.concatenate([raw.images[part][left, 0], raw.images[part][right, 0]], axis=2)
        present = np.zeros((n, 10), np.uint8)
        for side in (left, right):
            present[np.arange(n), raw.labels[part][side]] = 1
        parts[f"{part}_labels"] = present
    np.savez_compressed(path, **parts, class_names=np.array(raw.classes))
    return open_data(DataConfig(name=f"npz:{path}", image_size=(8, 16), augment="none"), task="multilabel")


def trained(data: DataSet, task: Task, steps: int = 80) -> Member:
    """A small network trained on the data: far from perfect, far above chance."""
    member = build(resolve(STUDENT), data, "student").member.train()
    optimizer = torch.optim.Adam(member.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(data.train), (64,), generator=generator)
        (batch,) = data.train.subset(rows).plain(64)
        optimizer.zero_grad()
        task.hard(member(batch.images), batch.target).mean().backward()
        optimizer.step()
    return member.eval()
