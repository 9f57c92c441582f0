"""Public checkpoints: the option-A nets score what they should, and the benchmark's key layouts are understood."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from kdcli.models.cifar import translate

FILES = {20: "resnet20-12fca82f.th", 32: "resnet32-d509ac18.th", 44: "resnet44-014dd654.th", 56: "resnet56-4bfd9763.th"}


def load(shared: Path, depth: int) -> torch.nn.Module:
    path = shared / "data" / "checkpoints" / FILES[depth]
    public = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    net = timm.create_model(f"cifar_resnet{depth}_a", num_classes=10)
    net.load_state_dict(translate(f"cifar_resnet{depth}_a", public), strict=True)
    return net.eval()


def percent(net: torch.nn.Module, shared: Path) -> float:
    """Top-1 on the 5,000 test images of the CIFAR-10 subset, in percent."""
    folder = shared / "data" / "cifar10_subset"
    target = torch.from_numpy(np.load(folder / "index.npz")["test_labels"].astype(np.int64))
    with Image.open(folder / "test-00.webp") as sheet:
        tiles = np.asarray(sheet.convert("RGB")).reshape(50, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3)
    pixels = torch.from_numpy(tiles.reshape(5000, 3, 32, 32).copy())
    mean, std = (torch.tensor(net.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    hits = 0
    with torch.inference_mode():
        for x, y in zip(pixels.split(250), target.split(250), strict=True):
            hits += int((net((x / 255 - mean) / std).argmax(1) == y).sum())
    return 100 * hits / len(target)


@pytest.mark.parametrize("depth", FILES)
def test_public_checkpoints_load(shared: Path, depth: int) -> None:
    # The counts the data's own README gives.
    expected = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018}[depth]
    assert sum(p.numel() for p in load(shared, depth).parameters()) == expected


def test_resnet20_scores_what_it_should(shared: Path) -> None:
    assert percent(load(shared, 20), shared) == pytest.approx(91.94, abs=0.05)


@pytest.mark.slow
def test_resnet56_scores_what_it_should(shared: Path) -> None:
    assert percent(load(shared, 56), shared) == pytest.approx(93.34, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "published"), [(32, 92.63), (44, 93.10)])
def test_the_others_score_about_what_is_published(shared: Path, depth: int, published: float) -> None:
    # Published on all 10,000 images; these are 5,000 of them, whose sampling error is 0.26 points (one sigma).
    assert percent(load(shared, depth), shared) == pytest.approx(published, abs=0.8)


def _resnet(name: str) -> str:
    name = re.sub(r"^stem\.(conv|bn)\.", r"\g<1>1.", name).replace("stage", "layer")
    return name.replace("shortcut.conv", "downsample.0").replace("shortcut.bn", "downsample.1")


def _wide(name: str) -> str:
    name = name.replace("stem.conv", "conv1").replace("tail.bn", "bn1").replace("shortcut", "convShortcut")
    return re.sub(r"^stage(\d)\.", r"block\1.layer.", name)


def _four_stages(name: str) -> str:
    return _resnet(name).replace("downsample", "shortcut").replace("fc.", "linear.")


def _vgg(name: str) -> str:
    name = name.replace("stem", "block0").replace("stage", "block").replace("fc.", "classifier.")
    return re.sub(r"layer(\d)\.(conv|bn)", lambda m: str(3 * int(m[1]) + (m[2] == "bn")), name)


def _mobile(name: str) -> str:
    groups = {"1.0": 0, "1.1": 1, "2.0": 2, "3.0": 3, "3.1": 4, "4.0": 5, "4.1": 6}
    parts = {"expand.conv": 0, "expand.bn": 1, "depthwise.conv": 3, "depthwise.bn": 4, "project.conv": 6}
    parts["project.bn"] = 7
    name = re.sub(r"^stage(\d\.\d)\.", lambda m: f"blocks.{groups[m[1]]}.", name)
    for ours, index in parts.items():
        name = name.replace(ours, f"conv.{index}")
    for ours, theirs in (("stem", "conv1"), ("tail", "conv2")):
        name = name.replace(f"{ours}.conv", f"{theirs}.0").replace(f"{ours}.bn", f"{theirs}.1")
    return name.replace("fc.", "classifier.0.")


def _shuffle1(name: str) -> str:
    name = re.sub(r"^stem\.(conv|bn)\.", r"\g<1>1.", name).replace("stage", "layer").replace("fc.", "linear.")
    for number, part in enumerate(("reduce", "depthwise", "expand"), 1):
        name = re.sub(rf"{part}\.(conv|bn)", rf"\g<1>{number}", name)
    return name


def _shuffle2(name: str) -> str:
    name = re.sub(r"^stem\.(conv|bn)\.", r"\g<1>1.", name).replace("stage", "layer").replace("fc.", "linear.")
    name = re.sub(r"^tail\.(conv|bn)\.", r"\g<1>2.", name)
    first = {"branch": 1, "left": 1, "right": 3}
    return re.sub(r"(branch|left|right)\.(\d)\.(conv|bn)", lambda m: f"{m[3]}{first[m[1]] + int(m[2])}", name)


# (network, our names to the public ones, a public name that must occur, what it is to us)
LAYOUTS = [
    ("resnet20", _resnet, "layer2.0.downsample.0.weight", "stage2.0.shortcut.conv.weight"),
    ("resnet8x4", _resnet, "layer1.0.downsample.1.bias", "stage1.0.shortcut.bn.bias"),
    ("resnet18", _four_stages, "layer4.0.shortcut.0.weight", "stage4.0.shortcut.conv.weight"),
    ("resnet50", _four_stages, "layer1.0.bn3.running_var", "stage1.0.bn3.running_var"),
    ("resnet10_xs", _four_stages, "linear.bias", "fc.bias"),
    ("resnet20_a", _four_stages, "layer3.2.bn2.bias", "stage3.2.bn2.bias"),
    ("wrn_16_2", _wide, "block3.layer.0.convShortcut.weight", "stage3.0.shortcut.weight"),
    ("vgg8", _vgg, "block4.1.weight", "stage4.layer0.bn.weight"),
    ("vgg13", _vgg, "block2.3.bias", "stage2.layer1.conv.bias"),
    ("mobilenetv2", _mobile, "blocks.4.2.conv.6.weight", "stage3.1.2.project.conv.weight"),
    ("mobilenetv2_x2", _mobile, "conv2.0.weight", "tail.conv.weight"),
    ("shufflenetv1", _shuffle1, "layer2.7.conv3.weight", "stage2.7.expand.conv.weight"),
    ("shufflenetv2", _shuffle2, "layer3.0.bn5.running_mean", "stage3.0.right.2.bn.running_mean"),
    ("shufflenetv2", _shuffle2, "layer1.2.conv2.weight", "stage1.2.branch.1.conv.weight"),
]


def state(arch: str) -> dict[str, Tensor]:
    return timm.create_model(f"cifar_{arch}", num_classes=10).state_dict()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("arch", "public", "theirs", "ours"), LAYOUTS)
def test_public_layouts(arch: str, public, theirs: str, ours: str, prefix: str) -> None:
    own = state(arch)
    # Old checkpoints have no batch counters.
    foreign = {prefix + public(key): value for key, value in own.items() if "num_batches" not in key}
    assert prefix + theirs in foreign
    back = translate(f"cifar_{arch}", foreign)
    assert back[ours] is foreign[prefix + theirs]
    assert {key: id(value) for key, value in back.items()} == {
        key: id(value) for key, value in own.items() if "num_batches" not in key
    }
    timm.create_model(f"cifar_{arch}", num_classes=10).load_state_dict(back, strict=True)


def test_our_own_layout_stays() -> None:
    own = state("resnet8")
    assert translate("cifar_resnet8", {f"module.{key}": value for key, value in own.items()}).keys() == own.keys()
    assert translate("cifar_resnet8", own).keys() == own.keys()


def test_what_does_not_fit_is_left_alone() -> None:
    foreign = {_resnet(key): value for key, value in state("resnet20").items()}
    # Projections have no place in the option-A net, nor three blocks per stage in ResNet-8.
    for arch in ("cifar_resnet20_a", "cifar_resnet8", "cifar_vgg8", "resnet18", "no_such_network"):
        assert translate(arch, foreign) == foreign
    assert translate("cifar_resnet20", {}) == {}
    assert list(translate("resnet18", {"module.fc.bias": torch.zeros(1)})) == ["fc.bias"]
