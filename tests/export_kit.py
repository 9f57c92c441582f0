"""What the tests of exported files share: networks as after training, and real digits as data of two tasks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.data import DataSet, Split, arrays
from kdcli.data.dataset import as_float
from kdcli.export import Exported
from kdcli.export.onnx import export_onnx
from kdcli.models.build import build
from kdcli.models.member import Member
from kdcli.models.registry import resolve
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


class InMemory:
    """A store of uint8 images [N, 3, H, W] without augmentation."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def batches(self, index: Tensor, view: Tensor, size: int, device: Any) -> Iterator[Tensor]:
        for rows in index.split(size):
            yield as_float(self.pixels[rows.cpu()]).to(device)


def data_set(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> DataSet:
    """A data set of ten digits from (pixels [N, 3, H, W] uint8, targets) of both parts."""
    splits = [Split(InMemory(pixels), target) for pixels, target in (train, test)]  # pyright: ignore[reportArgumentType]
    moments = (0.3, 0.3, 0.3), (0.35, 0.35, 0.35)
    size = (train[0].shape[2], train[0].shape[3])
    return DataSet(name, [str(n) for n in range(10)], None, "0" * 64, *moments, size, "none", *splits)


def digits(size: Size) -> DataSet:
    """scikit-learn's handwritten digits, resized to (height, width)."""

    def part(name: str) -> tuple[Tensor, Tensor]:
        grey = torch.from_numpy(raw.images[name]).float().expand(-1, 3, -1, -1)
        pixels = F.interpolate(grey, size=size, mode="bilinear", antialias=True).round().clamp(0, 255).to(torch.uint8)
        return pixels, torch.from_numpy(raw.labels[name])

    raw = arrays.digits()
    return data_set(f"digits at {size[0]}x{size[1]}", part("train"), part("test"))


def pairs() -> DataSet:
    """Two handwritten digits side by side, [N, 3, 8, 16]; the labels are the one or two digits that an image shows."""

    def part(name: str, n: int) -> tuple[Tensor, Tensor]:
        both = torch.randint(len(raw.labels[name]), (n, 2), generator=torch.Generator().manual_seed(0))
        pixels = torch.from_numpy(raw.images[name]).expand(-1, 3, -1, -1)
        labels = F.one_hot(torch.from_numpy(raw.labels[name]), 10)[both].amax(1)
        return torch.cat([pixels[both[:, 0]], pixels[both[:, 1]]], -1), labels.float()

    raw = arrays.digits()
    return data_set("pairs of digits", part("train", 2000), part("test", 300))


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
