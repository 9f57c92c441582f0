"""Methods of maps, relations and contrast between real networks: zoo, timm, torchvision, CNN and transformer."""

from functools import cache

import pytest
import torch

from kdcli.data import DataSet, Stream, open_data
from kdcli.mentors.classroom import Classroom
from kdcli.mentors.mentors import Mentors
from kdcli.models import registry
from kdcli.models.member import Member
from kdcli.recipe import DataConfig, from_dict
from kdcli.training.learner import Learner
from kdcli.training.meters import EpochMeter

CPU = torch.device("cpu")
MAPS, POOLED = ["fitnets", "at", "sp", "nst", "vid"], ["pkt", "rkd", "crd"]
PAIRS = [  # student, teacher, image size
    ("zoo:cifar_resnet8", "zoo:cifar_resnet14", 16),  # 3 stages with 3
    ("zoo:cifar_resnet8", "timm:resnet18", 64),  # 3 with 4, sizes 64 to 16 with 8 to 2
    ("timm:mobilenetv3_small_100", "zoo:cifar_resnet8", 64),  # 4 with 3
    ("zoo:cifar_resnet8", "timm:test_vit", 32),
    ("timm:test_vit", "torchvision:shufflenet_v2_x0_5", 64),
    ("torchvision:shufflenet_v2_x0_5", "timm:test_vit", 64),
]


@cache
def digits(size: int) -> DataSet:
    return open_data(DataConfig(name="digits", per_class=2, image_size=size, augment="none"))


def member(spec: str, size: int, seed: int) -> Member:
    """A network with norms that are not at rest, which would hide errors."""
    torch.manual_seed(seed)
    name = registry.resolve(spec)
    net = registry.create(name, 10)
    for layer in net.module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, std=0.2)
    size_, half = net.input_size if net.fixed_size else (size, size), (0.5, 0.5, 0.5)
    return Member(net.module, name, mean=half, std=half, input_size=size_, interpolation="bilinear", num_classes=10)


class Seated(Classroom):
    """A classroom whose student's norms are not at rest either."""

    def student(self, seed: int, arch: str | None = None) -> Member:
        return member(self.student_name.full, self.data.image_size[0], seed)


@pytest.mark.parametrize(
    ("student", "teacher", "size", "name"),
    [(*pair, name) for n, pair in enumerate(PAIRS) for name in (MAPS if n % 2 else MAPS + POOLED)],
)
def test_real_networks_teach_each_other(student: str, teacher: str, size: int, name: str) -> None:
    data, mentor = digits(size), member(teacher, size, 1).requires_grad_(False).eval()
    recipe = from_dict(
        {
            "data": {"name": "digits"},
            "method": {"name": name},
            "train": {"batch_size": 6, "lr": 0.01, "precision": "fp32"},
        },
        "test",
    )
    one = Learner(name, recipe, Seated(recipe, data, [mentor], CPU, registry.resolve(student)), 5)
    one.begin_epoch(0, lambda: iter(()))
    before = {key: value.clone() for key, value in mentor.state_dict().items()}
    own = {key: value.detach().clone() for key, value in one.method.named_parameters()}
    mentors = Mentors([mentor], "fp32", CPU, needs=one.needs)
    for step, batch in enumerate(list(Stream(data, 6, seed=0).epoch(0))[:2]):
        outputs = mentors.answer(batch).outputs
        one.meter = EpochMeter()
        one.step(batch, outputs, 0, step, step)
    one.check()
    one.check_weights()
    terms = {key: value.item() for key, value in one.meter.sums.items() if key.startswith("term/")}
    assert len(terms) >= 2
    assert all(value != 0 for value in terms.values())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in one.method.parameters())
    assert all(not torch.equal(own[key], value) for key, value in one.method.named_parameters())
    assert all(torch.equal(before[key], value) for key, value in mentor.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in mentor.parameters())
