"""Every CIFAR network of the zoo: the published counts, timm's interface, sizes and seeds."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kdcli.models.cifar  # noqa: F401  (registers the names)
from kdcli.models.cifar.base import CifarNet

# Trainable parameters for 100 classes, and millions of multiply-adds at 32x32, as published.
TABLE = {
    "resnet8": (83_892, 12.5),
    "resnet14": (181_108, 26.7),
    "resnet20": (278_324, 40.8),
    "resnet32": (472_756, 69.1),
    "resnet44": (667_188, 97.4),
    "resnet56": (861_620, 125.8),
    "resnet110": (1_736_564, 253.2),
    "resnet8x4": (1_233_540, 177.1),
    "resnet32x4": (7_433_860, 1083.0),
    "wrn_16_1": (180_916, 26.7),
    "wrn_16_2": (703_284, 101.1),
    "wrn_40_1": (569_780, 83.3),
    "wrn_40_2": (2_255_156, 327.6),
    "vgg8": (3_965_028, 96.2),
    "vgg13": (9_462_180, 284.9),
    "mobilenetv2": (812_836, 6.5),
    "mobilenetv2_x2": (2_353_060, 22.4),
    "shufflenetv1": (949_258, 38.7),
    "shufflenetv2": (1_355_528, 44.5),
    "resnet50": (23_705_252, 1298.0),
    "resnet34": (21_328_292, 1159.4),
    "resnet18": (11_220_132, 555.5),
    "resnet10": (4_949_412, 253.5),
    "resnet10_l": (1_252_100, 63.8),
    "resnet10_m": (320_436, 16.2),
    "resnet10_s": (83_852, 4.2),
    "resnet10_xs": (27_884, 2.9),
    "resnet10_xxs": (13_020, 2.0),
}
OPTION_A = [f"resnet{depth}_a" for depth in (8, 14, 20, 32, 44, 56, 110)]
EVERY = [*TABLE, *OPTION_A]
# One of each kind, for what does not depend on depth or width.
KINDS = ["resnet8", "resnet8_a", "resnet8x4", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]
KINDS += ["resnet10_xxs"]


def make(name: str, **kwargs) -> CifarNet:
    net = timm.create_model(f"cifar_{name}", **kwargs)
    assert isinstance(net, CifarNet)
    return net


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def test_timm_lists_every_name_and_no_other() -> None:
    assert set(timm.list_models("cifar_*")) == {f"cifar_{name}" for name in EVERY}


@pytest.mark.parametrize("name", TABLE)
def test_counts_are_the_published_ones(name: str) -> None:
    expected, millions = TABLE[name]
    with torch.device("meta"):
        net = make(name, num_classes=100).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, 32, 32))
    assert parameters(net) == expected
    # Convolutions and linear layers only, two operations each; 0.051: the table's one decimal, rounded or cut.
    assert counter.get_total_flops() / 2e6 == pytest.approx(millions, abs=0.051)


@pytest.mark.parametrize("name", TABLE)
def test_the_entry_function_tells_its_row(name: str) -> None:
    expected, millions = TABLE[name]
    doc = timm.models.model_entrypoint(f"cifar_{name}").__doc__
    assert f"{expected:,} parameters" in doc
    assert f"{millions:.1f} M multiply-adds" in doc


@pytest.mark.parametrize("name", OPTION_A)
def test_option_a_has_no_shortcut_parameters(name: str) -> None:
    # The projections have 16*32 + 32*64 weights and two batch norms.
    assert TABLE[name.removesuffix("_a")][0] - parameters(make(name)) == 512 + 2048 + 2 * (32 + 64)


def test_option_a_takes_every_second_pixel_and_pads_the_channels_equally() -> None:
    shortcut = make("resnet8_a").get_submodule("stage2.0.shortcut")
    x = torch.randn(2, 16, 7, 8)
    y = shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("name", EVERY)
def test_interface(name: str) -> None:
    net = make(name, num_classes=10).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features = net.forward_features(x)
        pooled = net.forward_head(features, pre_logits=True)
        logits = net(x)
        assert features.shape[:2] == (2, net.num_features)
        assert pooled.shape == (2, net.num_features)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        assert logits.shape == (2, 10)
        assert torch.equal(logits, net.forward_head(features))
        assert torch.equal(logits, net.get_classifier()(pooled))
    cfg = net.default_cfg
    assert cfg is net.pretrained_cfg
    assert (cfg["input_size"], cfg["num_classes"], cfg["interpolation"]) == ((3, 32, 32), 100, "bicubic")
    assert net.get_submodule(cfg["classifier"]) is net.get_classifier()
    first = net.get_submodule(cfg["first_conv"])
    assert first is next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    cifar = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    assert (cfg["mean"], cfg["std"]) == (imagenet if name.endswith("_a") else cifar)
    assert not cfg.get("url")


@pytest.mark.parametrize("name", EVERY)
def test_feature_info_names_the_maps(name: str) -> None:
    net = make(name).eval()
    seen: dict[str, torch.Size] = {}
    for info in net.feature_info:
        net.get_submodule(info["module"]).register_forward_hook(
            lambda _module, _args, out, key=info["module"]: seen.__setitem__(key, out.shape)
        )
    with torch.no_grad():
        features, maps = net.forward_intermediates(torch.randn(1, 3, 32, 32))
    assert [info["module"] for info in net.feature_info] == [f"stage{i + 1}" for i in range(len(maps))]
    assert len(maps) in (3, 4)
    assert features.shape[1] == net.num_features
    for info, stage_map in zip(net.feature_info, maps, strict=True):
        side = 32 // info["reduction"]
        assert stage_map.shape == seen[info["module"]] == (1, info["num_chs"], side, side)


@pytest.mark.parametrize("name", KINDS)
def test_intermediates_agree_with_forward(name: str) -> None:
    net = make(name).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features, maps = net.forward_intermediates(x)
        assert torch.equal(features, net.forward_features(x))
        only = net.forward_intermediates(x, indices=[-1, 0], intermediates_only=True)
        assert torch.equal(only[0], maps[-1])
        assert torch.equal(only[1], maps[0])
        early, first = net.forward_intermediates(x, indices=[0], stop_early=True)
        assert torch.equal(early, maps[0])
        assert torch.equal(first[0], maps[0])
        extractor = timm.create_model(f"cifar_{name}", features_only=True).eval()
        shapes = [tuple(m.shape) for m in extractor(x)]
    assert shapes == [tuple(m.shape) for m in maps]
    assert extractor.feature_info.channels() == [info["num_chs"] for info in net.feature_info]


@pytest.mark.parametrize("name", KINDS)
def test_maps_are_not_overwritten_by_what_follows(name: str) -> None:
    net = make(name).train()
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _module, _args, out: kept.append((out, out.detach().clone())))
    net(torch.randn(2, 3, 16, 16)).sum().backward()
    assert kept
    assert all(torch.equal(out, before) for out, before in kept)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [8, 20, 64])
def test_other_sizes(name: str, size: int) -> None:
    net = make(name, num_classes=7).train()
    logits = net(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_channels_dropout_and_no_classes(name: str) -> None:
    net = make(name, in_chans=1, num_classes=0, drop_rate=0.5)
    assert isinstance(net.get_classifier(), nn.Identity)
    assert net(torch.randn(2, 1, 16, 16)).shape == (2, net.num_features)
    pooled = net.train().forward_head(torch.ones(1, net.num_features, 2, 2), pre_logits=True)
    assert set(pooled.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(net.eval().forward_head(torch.ones(1, net.num_features, 2, 2)), torch.ones(1, net.num_features))


@pytest.mark.parametrize("name", KINDS)
def test_reset_classifier(name: str) -> None:
    net = make(name).double()
    body = {key: value.clone() for key, value in net.state_dict().items() if not key.startswith("fc.")}
    net.reset_classifier(5, global_pool="max")
    net.eval()
    features = net.forward_features(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    torch.testing.assert_close(net.forward_head(features, pre_logits=True), features.amax((2, 3)))
    assert net.forward_head(features).shape == (2, 5)
    assert net.num_classes == 5
    net.reset_classifier(3)
    assert net.global_pool.pool_type == "max"
    assert all(torch.equal(value, body[key]) for key, value in net.state_dict().items() if key in body)


@pytest.mark.parametrize("name", KINDS)
def test_the_seed_decides_the_weights(name: str) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return make(name).state_dict()

    one, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize("name", KINDS)
def test_initial_weights(name: str) -> None:
    net = make(name)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()
        elif isinstance(module, nn.Conv2d) and not name.startswith("shufflenet") and module.weight.numel() > 4000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_traces(name: str) -> None:
    # Batch norms are folded and students exported by tracing: no control flow may depend on values.
    net = make(name).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(copy.deepcopy(net)(x), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), expected)


def test_pretrained_is_refused() -> None:
    with pytest.raises(RuntimeError, match="pretrained"):
        make("resnet8", pretrained=True)
