"""Names: what resolves to what, what is refused and how, and the networks that come out."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from kdcli.errors import RecipeError, WeightsError
from kdcli.models import from_torchvision, registry
from kdcli.models.cost import count, facts
from kdcli.models.net import ModelName
from kdcli.models.registry import create, pretrained_classes, resolve, search


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and a network where nothing answers."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "full"),
    [
        ("resnet18", "timm:resnet18"),
        ("resnet34", "timm:resnet34"),
        ("regnetx_004", "timm:regnetx_004"),
        ("resnet18.a1_in1k", "timm:resnet18.a1_in1k"),
        ("cifar_resnet20", "zoo:cifar_resnet20"),
        ("timm:cifar_resnet20", "zoo:cifar_resnet20"),
        ("mobilenet_v3_small", "torchvision:mobilenet_v3_small"),
        ("torchvision:resnet18", "torchvision:resnet18"),
        ("swin_t", "torchvision:swin_t"),
    ],
)
def test_exact_names(typed: str, full: str) -> None:
    assert resolve(typed).full == full


@pytest.mark.parametrize(
    ("typed", "full"),
    [
        ("mobilenetv3_small", "torchvision:mobilenet_v3_small"),
        ("torchvision:ResNet-18", "torchvision:resnet18"),
        ("CIFAR-ResNet20", "zoo:cifar_resnet20"),
        ("zoo:resnet20", "zoo:cifar_resnet20"),
        ("zoo:ResNet-20", "zoo:cifar_resnet20"),
        ("RegNetX004", "timm:regnetx_004"),
    ],
)
def test_loose_names_that_are_unique_win_and_say_so(typed: str, full: str) -> None:
    name = resolve(typed)
    assert name.full == full
    assert name.guessed
    assert not resolve(full).guessed
    assert not resolve(name.arch).guessed


def test_weights_are_what_follows_the_first_at_sign() -> None:
    assert resolve("resnet18").weights is None
    assert resolve("resnet18@none").weights == "none"
    name = resolve("torchvision:resnet18@C:\\runs\\a@b#20")
    assert (name.full, name.weights) == ("torchvision:resnet18", "C:\\runs\\a@b#20")
    assert not name.guessed


@pytest.mark.parametrize(
    ("typed", "hinted"),
    [
        ("resnet20", "cifar_resnet20"),
        ("cifar_resnt20", "cifar_resnet20"),
        ("regnetx16gf", "torchvision:regnet_x_16gf or torchvision:regnet_x_1_6gf"),
        ("ResNet34", "timm:resnet34 or torchvision:resnet34"),
        ("torchvison:resnet18", "torchvision"),
        ("resnet18@", "architecture"),
        ("", "architecture"),
        ("runs/a/student.safetensors", "ARCHITECTURE@PATH"),
        ("zoo:resnet21", "cifar_resnet20"),
    ],
)
def test_none_or_several_is_an_error_with_the_nearest(typed: str, hinted: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(typed)
    assert caught.value.exit_code == 2
    assert hinted in caught.value.hint


def test_resnet20_suggests_the_zoo_first() -> None:
    with pytest.raises(RecipeError) as caught:
        resolve("resnet20")
    assert caught.value.hint.startswith("Did you mean cifar_resnet20,")


def test_search_takes_globs_and_texts() -> None:
    assert [n.full for n in search("resnet18", "torchvision")] == ["torchvision:resnet18"]
    assert {n.source for n in search("*resnet18*")} == {"zoo", "timm", "torchvision"}
    assert "timm:resnet18.a1_in1k" in {n.full for n in search("ResNet18.*")}
    assert not [n for n in search("*", "timm") if n.arch.startswith("cifar_")]
    assert {n.full for n in search("zoo:*")} == {n.full for n in search(source="zoo")}
    assert search("no_such_thing") == []
    with pytest.raises(RecipeError):
        search("*", "hub")


def test_torchvision_offers_classifiers_only() -> None:
    arches = {n.arch for n in search("*", "torchvision")}
    assert "mobilenet_v3_small" in arches
    assert not {a for a in arches if a.startswith(("fcn", "fasterrcnn", "raft", "quantized", "r3d"))}


def test_the_registry_imports_no_torch() -> None:
    code = "import sys, kdcli.models.registry; assert not {'torch', 'timm', 'torchvision'} & set(sys.modules)"
    root = Path(registry.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@pytest.mark.parametrize("spec", ["cifar_resnet20", "resnet18", "mobilenetv3_small", "regnetx_004", "squeezenet1_1"])
def test_created_networks_answer_with_the_count_asked(spec: str) -> None:
    net = create(resolve(spec), 7)
    assert net.num_classes == 7
    assert net.classes is None
    assert net.wnids is None
    assert not net.fresh_head
    with torch.no_grad():
        assert net.module.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("spec", ["googlenet", "torchvision:inception_v3"])
def test_auxiliary_heads_are_off_and_input_is_not_rescaled(spec: str) -> None:
    with torch.device("meta"):  # their initialiser is slow
        net = create(resolve(spec), 5)
    assert net.mean == net.std == (0.5, 0.5, 0.5)
    assert net.module.transform_input is False
    assert net.module.train()(torch.zeros(2, 3, *net.input_size, device="meta")).shape == (2, 5)


def test_networks_say_how_they_want_their_input() -> None:
    with torch.device("meta"):
        swin = create(resolve("swin_tiny_patch4_window7_224"), 10)
        vit = create(resolve("vit_b_16"), 10)
        tiny = create(resolve("vit_tiny_patch16_224"), None)
        b1 = create(resolve("torchvision:efficientnet_b1"), None)
        cifar = create(resolve("cifar_resnet20"), 100)
    assert (swin.input_size, swin.fixed_size, swin.interpolation) == ((224, 224), True, "bicubic")
    assert (vit.input_size, vit.fixed_size) == ((224, 224), True)
    assert tiny.mean == tiny.std == (0.5, 0.5, 0.5)
    assert (b1.input_size, b1.fixed_size, b1.interpolation) == ((240, 240), False, "bilinear")
    assert (cifar.input_size, cifar.fixed_size) == ((32, 32), False)


@pytest.mark.parametrize("spec", ["resnet18", "torchvision:resnet18"])
def test_imagenet_outputs_are_named(spec: str) -> None:
    with torch.device("meta"):
        net = create(resolve(spec), None)
    assert net.num_classes == 1000
    assert net.classes is not None
    assert net.wnids is not None
    assert (len(net.classes), len(net.wnids)) == (1000, 1000)
    assert net.wnids[0] == "n01440764"
    assert net.classes[0].startswith("tench")
    assert net.wnids[482] == "n02979186"
    assert net.classes[482] == "cassette player"


def test_pretrained_classes_are_known_without_downloading(offline: Path) -> None:
    assert pretrained_classes(resolve("resnet18")) == 1000
    assert pretrained_classes(resolve("torchvision:resnet18")) == 1000
    assert pretrained_classes(resolve("vit_base_patch16_224.augreg_in21k")) == 21_843
    assert pretrained_classes(resolve("vit_base_patch16_224.dino")) == 0
    assert pretrained_classes(resolve("cifar_resnet20")) is None


def test_facts_equal_the_published_counts() -> None:
    small = facts(resolve("cifar_resnet20"), num_classes=100)
    assert small["params"] == 278_324  # papers.md section 6
    assert round(small["macs"] / 1e6, 1) == 40.8
    assert small["pretrained"] is False
    large = facts(resolve("torchvision:resnet18"))
    assert (large["params"], large["input_size"], large["num_classes"]) == (11_689_512, 224, 1000)
    assert round(large["macs"] / 1e9, 2) == 1.81
    assert large["pretrained"] is True
    assert facts(resolve("resnet18"), image_size=112)["input_size"] == 112
    assert facts(resolve("vit_b_16"), image_size=112)["input_size"] == 224


def test_facts_at_a_size_that_is_not_square() -> None:
    square, tall = (facts(resolve("cifar_resnet20"), 100, size) for size in (32, (64, 32)))
    assert (square["input_size"], tall["input_size"]) == (32, [64, 32])
    head = 64 * 100  # every convolution runs at twice as many positions, the classifier once
    assert tall["macs"] == 2 * square["macs"] - head
    assert tall["params"] == square["params"]
    assert facts(resolve("vit_b_16"), image_size=(112, 96))["input_size"] == 224  # fixed, and shown as it is


def test_count_of_a_hand_computed_network_leaves_it_alone() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 5)
    )
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert count(net.train(), (8, 8)) == (3 * 4 * 9 + 8 + 256 * 5 + 5, 3 * 4 * 9 * 64 + 256 * 5)
    assert net.training
    assert all(p.device.type == "cpu" and p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_count_when_the_forward_pass_reads_values() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) * float(x.sum().item())

    assert count(Reads(), (4, 2)) == (6, 6 * 8)


@pytest.mark.parametrize("spec", ["resnet18", "torchvision:squeezenet1_1", "densenet121.tv_in1k"])
def test_pretrained_without_network_fails_at_once_and_says_the_cure(
    spec: str, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def refuse(*host: object, **__: object) -> None:
        asked.append(host)
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    with pytest.raises(WeightsError) as caught:
        create(resolve(spec), None, pretrained=True)
    assert len(asked) == 1  # no retries, which wait longer each time
    assert caught.value.exit_code == 3
    assert "_HOME" in caught.value.hint
    assert "@PATH" in caught.value.hint


def test_pretrained_of_a_network_that_has_none() -> None:
    with pytest.raises(WeightsError, match="no pretrained") as caught:
        create(resolve("cifar_resnet20"), None, pretrained=True)
    assert "kdcli train" in caught.value.hint


def _cache_torchvision(home: Path, arch: str) -> dict[str, torch.Tensor]:
    import torchvision

    torch.manual_seed(1)
    state = torchvision.models.get_model(arch).state_dict()
    url = torchvision.models.get_model_weights(arch).DEFAULT.url
    file = home / "torch" / "hub" / "checkpoints" / Path(url).name
    file.parent.mkdir(parents=True)
    torch.save(state, file)
    return state


def test_torchvision_weights_come_from_its_cache(offline: Path) -> None:
    state = _cache_torchvision(offline, "squeezenet1_1")
    net = create(resolve("torchvision:squeezenet1_1"), None, pretrained=True)
    assert all(torch.equal(state[k], v) for k, v in net.module.state_dict().items())
    assert not net.fresh_head
    ten = create(resolve("torchvision:squeezenet1_1"), 10, pretrained=True)
    own = ten.module.state_dict()
    assert ten.fresh_head
    assert own["classifier.1.weight"].shape[0] == 10
    assert all(torch.equal(state[k], v) for k, v in own.items() if not k.startswith("classifier"))


def test_a_broken_file_in_torchvisions_cache_is_named(offline: Path) -> None:
    _cache_torchvision(offline, "squeezenet1_1")
    file = next((offline / "torch" / "hub" / "checkpoints").iterdir())
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=file.name) as caught:
        create(resolve("torchvision:squeezenet1_1"), None, pretrained=True)
    assert "Delete it" in caught.value.hint


def test_timm_weights_come_from_its_cache_without_asking(offline: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(2)
    state = timm.create_model("resnet10t").state_dict()
    cfg = timm.get_pretrained_cfg("resnet10t")
    assert cfg is not None
    assert cfg.hf_hub_id
    repo = offline / "hub" / f"models--{cfg.hf_hub_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    folder = repo / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    name = ModelName("timm", "resnet10t", "pretrained", "resnet10t@pretrained")
    net = create(name, None, pretrained=True)
    assert all(torch.equal(state[k], v) for k, v in net.module.state_dict().items())
    five = create(name, 5, pretrained=True)
    assert five.fresh_head
    assert five.module.state_dict()["fc.weight"].shape == (5, 512)
    assert torch.equal(five.module.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


def test_torchvisions_own_names_for_weights_choose_among_them():
    first = registry.resolve("torchvision:regnet_x_400mf@IMAGENET1K_V1")
    assert from_torchvision.names_weights(first)
    assert not from_torchvision.names_weights(registry.resolve("torchvision:regnet_x_400mf@IMAGENET1K_V9"))
    assert not from_torchvision.names_weights(registry.resolve("timm:regnetx_004@IMAGENET1K_V1"))
    assert registry.create(first, None).interpolation == "bilinear"
    sizes = {
        w: from_torchvision.weights_of(registry.resolve(f"torchvision:regnet_x_400mf{w}"))
        for w in ("", "@IMAGENET1K_V1")
    }
    assert (
        sizes[""].meta["_metrics"]["ImageNet-1K"]["acc@1"]
        > sizes["@IMAGENET1K_V1"].meta["_metrics"]["ImageNet-1K"]["acc@1"]
    )
