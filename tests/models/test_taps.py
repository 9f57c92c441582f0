"""Stages mean the same in every network: names, order, sizes; reading them changes no answer."""

import copy

import pytest
import torch
from torch import nn

from kdcli.data import Batch
from kdcli.errors import WeightsError
from kdcli.mentors.frozen import Frozen
from kdcli.mentors.mentors import Mentors, rows_of
from kdcli.models import registry
from kdcli.models.member import Member
from kdcli.models.taps import Taps
from kdcli.system.sizes import Size, pair

CPU = torch.device("cpu")
MAPS = frozenset({"maps"})
EVERY = frozenset({"maps", "pre", "pooled"})
SHAPES: dict[tuple[str, int | Size], list[tuple[int, int, int]]] = {
    ("zoo:cifar_resnet8", 32): [(16, 32, 32), (32, 16, 16), (64, 8, 8)],
    ("zoo:cifar_resnet10_xxs", 32): [(8, 32, 32), (8, 16, 16), (16, 8, 8), (16, 4, 4)],
    ("zoo:cifar_mobilenetv2", 32): [(12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2)],
    ("timm:resnet18", 64): [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)],
    ("timm:regnetx_004", 64): [(32, 16, 16), (64, 8, 8), (160, 4, 4), (384, 2, 2)],
    ("timm:mobilenetv3_small_100", 64): [(16, 16, 16), (24, 8, 8), (48, 4, 4), (576, 2, 2)],
    ("timm:vit_tiny_patch16_224", 224): [(192, 14, 14)] * 4,
    ("torchvision:resnet18", 32): [(64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1)],
    ("torchvision:mobilenet_v3_small", 64): [(16, 16, 16), (24, 8, 8), (48, 4, 4), (576, 2, 2)],
    ("torchvision:squeezenet1_1", 64): [(64, 31, 31), (128, 15, 15), (256, 7, 7), (512, 3, 3)],
    ("torchvision:shufflenet_v2_x0_5", 64): [(24, 16, 16), (48, 8, 8), (96, 4, 4), (1024, 2, 2)],
    ("torchvision:swin_t", 224): [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)],
    ("zoo:cifar_resnet8", (48, 32)): [(16, 48, 32), (32, 24, 16), (64, 12, 8)],
    ("zoo:cifar_mobilenetv2", (32, 48)): [(12, 16, 24), (16, 8, 12), (48, 4, 6), (160, 2, 3)],
    ("timm:resnet18", (96, 64)): [(64, 24, 16), (128, 12, 8), (256, 6, 4), (512, 3, 2)],
    ("timm:regnetx_004", (32, 256)): [(32, 8, 64), (64, 4, 32), (160, 2, 16), (384, 1, 8)],
    ("torchvision:mobilenet_v3_small", (96, 64)): [(16, 24, 16), (24, 12, 8), (48, 6, 4), (576, 3, 2)],
    ("torchvision:resnet18", (32, 256)): [(64, 8, 64), (128, 4, 32), (256, 2, 16), (512, 1, 8)],
}


def member(spec: str, size: int | Size) -> Member:
    """A network with norms that are not at rest: zeros would hide what is read in the wrong place."""
    torch.manual_seed(0)
    name = registry.resolve(spec)
    net = registry.create(name, 7).module
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
    half = (0.5, 0.5, 0.5)
    one = Member(net, name, mean=half, std=half, input_size=pair(size), interpolation="bilinear", num_classes=7)
    return one.eval()


@pytest.mark.parametrize(("spec", "size"), SHAPES)
@torch.no_grad()
def test_stages_pooled_vectors_and_logits_by_name(spec: str, size: int | Size) -> None:
    one, pixels = member(spec, size), torch.rand(2, 3, *pair(size))
    width = one.width
    wanted = {f"stage{n}": shape for n, shape in enumerate(SHAPES[spec, size], 1)}
    assert one.taps() == {**wanted, "pooled": (width,), "logits": (7,)}
    before = one(pixels)
    seen = one.see(pixels, EVERY)
    assert torch.allclose(seen.out, before, rtol=1e-4, atol=1e-4)
    assert list(seen.stages) == [*wanted, *(f"{tap}.pre" for tap in wanted)]
    for tap in wanted:
        assert seen.stages[tap].shape == seen.stages[f"{tap}.pre"].shape
        assert torch.isfinite(seen.stages[tap]).all()
    if "squeezenet" in spec:  # a ReLU comes after its head
        with pytest.raises(WeightsError, match="layers after its last linear layer"):
            one.check_head()
    else:
        one.check_head()
        torch.testing.assert_close(one.classify(seen.vectors), seen.out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", ["zoo:cifar_resnet8", "timm:resnet18", "torchvision:resnet18"])
@torch.no_grad()
def test_before_the_last_activation(spec: str) -> None:
    one = member(spec, 32)
    maps = one.see(torch.rand(4, 3, 32, 32), EVERY).stages
    for tap in [tap for tap in maps if not tap.endswith(".pre")]:
        pre = maps[f"{tap}.pre"]
        assert pre.min() < 0
        assert torch.equal(pre.relu(), maps[tap])


@torch.no_grad()
def test_the_map_itself_where_no_activation_ends_a_stage() -> None:
    one = member("zoo:cifar_mobilenetv2", 32)
    maps = one.see(torch.rand(2, 3, 32, 32), EVERY).stages
    assert torch.equal(maps["stage2"], maps["stage2.pre"])


def test_the_last_stage_is_what_the_head_averages() -> None:
    one, pixels = member("zoo:cifar_resnet8", 32), torch.rand(2, 3, 32, 32)
    seen = one.see(pixels, EVERY)
    torch.testing.assert_close(seen.stages["stage3"].mean((2, 3)), seen.vectors)


@torch.no_grad()
def test_tokens_come_as_a_grid_without_class_token() -> None:
    one, pixels = member("timm:vit_tiny_patch16_224", 224), torch.rand(1, 3, 224, 224)
    last = one.see(pixels, MAPS).stages["stage4"]
    tokens = one.net.blocks(one.net.norm_pre(one.net._pos_embed(one.net.patch_embed(one.read(pixels)))))  # pyright: ignore
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), tokens[:, 1:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", ["zoo:cifar_resnet8", "timm:resnet18", "torchvision:resnet18"])
def test_a_student_learns_through_its_maps_in_training_mode(spec: str) -> None:
    one = member(spec, 32).train()
    norm = next(layer for layer in one.modules() if isinstance(layer, nn.BatchNorm2d))
    assert norm.running_mean is not None
    before = norm.running_mean.clone()
    seen = one.see(torch.rand(4, 3, 32, 32), MAPS)
    assert one.net.training  # making ready to read went through eval mode
    assert not torch.equal(norm.running_mean, before)
    seen.stages["stage2"].square().mean().backward()
    first = next(one.net.parameters())
    assert first.grad is not None
    assert first.grad.abs().max() > 0
    assert one.head.weight.grad is None  # it comes after


def test_reading_needs_no_state_of_its_own() -> None:
    one, pixels = member("torchvision:resnet18", 32), torch.rand(2, 3, 32, 32)
    keys = list(one.state_dict())
    one.see(pixels, EVERY)
    assert list(one.state_dict()) == keys
    twin = copy.deepcopy(one)  # as a moving average does
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
        assert torch.allclose(twin.see(pixels, MAPS).out, twin.net(twin.read(pixels)), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(twin.see(pixels, MAPS).out, one.see(pixels, MAPS).out, rtol=1e-2)


class Tokens(nn.Module):
    """No maps anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


class Wilful(Tokens):
    """Cannot be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


@pytest.mark.parametrize(("kind", "why"), [(Tokens, "it has no maps"), (Wilful, "control flow|bool")])
def test_a_network_without_maps_is_refused_in_words(kind: type[nn.Module], why: str) -> None:
    with pytest.raises(WeightsError, match=f"maps of mine cannot be read: .*({why})") as caught:
        Taps(kind(), (8, 8), "mine")
    assert "logits only" in caught.value.hint


@pytest.mark.parametrize("workers", [1, 2])
def test_mentors_hand_out_maps_that_a_loss_can_save(workers: int) -> None:
    members = [member("zoo:cifar_resnet8", 32), member("torchvision:resnet18", 32)]
    pixels = torch.rand(6, 3, 32, 32)
    asked = Mentors(members, "fp32", CPU, workers=workers, needs=EVERY)
    outputs = asked.answer(
        Batch(pixels, torch.zeros(6, dtype=torch.long), torch.arange(6), torch.full((6,), -1))
    ).outputs
    assert [output.out.shape for output in outputs] == [(6, 7), (6, 7)]
    for alone, one in zip(outputs, members, strict=True):
        plain = one.see(pixels, EVERY)
        assert list(alone.stages) == list(plain.stages)
        for tap, x in alone.stages.items():
            torch.testing.assert_close(x, plain.stages[tap].detach(), rtol=1e-3, atol=1e-3)
            assert not x.requires_grad
            (x * torch.ones_like(x, requires_grad=True)).sum().backward()
        torch.testing.assert_close(alone.vectors, plain.vectors.detach(), rtol=1e-3, atol=1e-3)
    part = rows_of(outputs, slice(2, 5))
    assert part[1].stages["stage1"].equal(outputs[1].stages["stage1"][2:5])


@torch.no_grad()
def test_half_precision_mentors_give_float32_maps() -> None:
    quick = Frozen(member("zoo:cifar_resnet8", 32), "bf16", CPU, needs=MAPS)
    maps = quick(torch.rand(2, 3, 32, 32)).stages
    assert next(quick.net.parameters()).dtype == torch.bfloat16
    assert {x.dtype for x in maps.values()} == {torch.float32}
