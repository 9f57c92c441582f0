"""SimKD's graduate: what is scored is what is kept and what is shipped, by every command, without the teacher."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_kit import PEER, STUDENT, TINY, add_mentors, kdcli
from export_kit import export
from torch import nn

from kdcli.errors import WeightsError
from kdcli.export import open_file
from kdcli.models import cards, checkpoint, graduates, registry
from kdcli.models.build import from_card
from kdcli.models.graduates import Graduate, Spec
from kdcli.models.member import Member
from kdcli.models.net import ModelName
from kdcli.system.sizes import Size, pair
from kdcli.tasks import Classify
from kdcli.training.run import Run
from kdcli.training.student import card, student_of

SPEC = Spec(width=24, classes=10, size=[4, 4])


@contextlib.contextmanager
def within(folder: Path) -> Iterator[None]:
    before, home = Path.cwd(), os.environ.get("KDCLI_HOME")
    os.chdir(folder)
    os.environ["KDCLI_HOME"] = str(folder / "home")
    try:
        yield
    finally:
        os.chdir(before)
        if home is None:
            del os.environ["KDCLI_HOME"]
        else:
            os.environ["KDCLI_HOME"] = home


@pytest.fixture(scope="module")
def trained() -> Iterator[Path]:
    """A folder with a finished SimKD run, whose teacher's weights are gone."""
    folder = Path(tempfile.mkdtemp(prefix="kdcli-graduate-"))
    with within(folder):
        add_mentors(PEER)
        simkd = ("--method", "simkd", "--out", "runs/simkd", *TINY)
        kdcli("distill", "--teacher", PEER, "--student", STUDENT, "--data", "digits", *simkd)
        shutil.rmtree(folder / "home")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def there(trained: Path) -> Iterator[None]:
    with within(trained):
        yield


def test_the_run_holds_the_whole_graduate(trained):
    run = Run(trained / "runs/simkd")
    found = cards.read_card(run.path / "student.toml")
    state = checkpoint.load_state(run.path / "student.safetensors")
    assert found.graduate == {"kind": "simkd", "width": 64, "classes": 10, "bias": True, "size": [4, 4], "factor": 2.0}
    assert found.architecture == f"zoo:{STUDENT}"
    assert {key.partition(".")[0] for key in state} == {"net", "projector", "classifier"}
    assert "net.fc.weight" not in state  # the student's own head answers nothing
    assert found.params == sum(v.numel() for k, v in state.items() if "running" not in k and "num_batches" not in k)
    assert "(simkd graduate)" in found.line()
    member = student_of(run)
    assert isinstance(member.net, Graduate)
    assert checkpoint.digest(member.net) == checkpoint.digest(state)


def test_what_evaluate_scores_is_what_was_trained_and_what_export_ships():
    shown = kdcli("runs", "show", "runs/simkd", "--json").json
    last, shown_score = shown["metrics"][-1], shown["provenance"]["score"]
    scored = kdcli("evaluate", "runs/simkd", "--json").json
    assert scored["top1"] == pytest.approx(last["test/top1"]) == pytest.approx(shown_score["top1"])
    assert scored["loss"] == pytest.approx(last["test/loss"], rel=1e-4)
    shipped = kdcli("export", "--onnx", "runs/simkd", "--json").json
    assert shipped["agreement"] == 100
    again = kdcli("evaluate", shipped["path"], "--json").json
    assert again["loss"] == pytest.approx(scored["loss"], rel=1e-4)
    assert again["top1"] == scored["top1"]
    assert kdcli("bench", "runs/simkd", "--calls", "3", "--json").json[0]["p50"] > 0
    assert "simkd" in kdcli("runs", "show", "runs/simkd").out


def test_the_projector_learned_and_the_classifier_did_not(trained):
    state = checkpoint.load_state(trained / "runs/simkd/student.safetensors")
    with within(trained):
        add_mentors(PEER)
        path = cards.weights_path(cards.cards(shipped=False)[0])
        assert path is not None
        teacher = checkpoint.load_state(path)
        shutil.rmtree(trained / "home")
    assert torch.equal(state["classifier.weight"], teacher["fc.weight"])
    assert torch.equal(state["classifier.bias"], teacher["fc.bias"])
    assert state["projector.0.1.num_batches_tracked"] == 4  # updates, and the graduate ran once in each


def test_a_graduate_is_a_teacher_and_is_trained_on(trained):
    base = ("--data", "digits", *TINY)
    kdcli(
        "distill",
        "--teacher",
        f"{STUDENT}@runs/simkd",
        "--student",
        STUDENT,
        *base,
        "--method",
        "kd",
        "--out",
        "runs/a",
    )
    kdcli(
        "distill",
        "--teacher",
        f"{STUDENT}@runs/simkd",
        "--student",
        STUDENT,
        *base,
        "--method",
        "simkd",
        "--out",
        "runs/b",
    )
    b = cards.read_card(Path("runs/b/student.toml"))
    assert b.graduate is not None
    assert b.graduate["width"] == 64  # the graduate's projected map was matched, and its borrowed classifier lent on
    kdcli("train", "--model", f"{STUDENT}@runs/simkd", *base, "--out", "runs/c")
    assert (
        cards.read_card(Path("runs/c/student.toml")).graduate
        == cards.read_card(Path("runs/simkd/student.toml")).graduate
    )
    before, after = (checkpoint.load_state(Path(f"runs/{name}/student.safetensors")) for name in ("simkd", "c"))
    assert torch.equal(before["classifier.weight"], after["classifier.weight"])
    assert not torch.equal(before["net.stem.conv.weight"], after["net.stem.conv.weight"])


def test_simkd_on_top_of_a_graduate_is_refused():
    said = kdcli(
        "distill", "--teacher", f"{STUDENT}@runs/simkd", "--student", f"{STUDENT}@runs/simkd", "--data", "digits",
        "--method", "simkd", *TINY, code=2,
    )  # fmt: skip
    assert "already has the classifier of another teacher" in said.err


def test_a_bare_name_never_means_a_graduate():
    kdcli("zoo", "add", "runs/simkd")
    assert "simkd graduate" in kdcli("zoo", "ls").out or cards.cards(shipped=False)[0].graduate is not None
    assert cards.find(f"zoo:{STUDENT}", cards.cards(shipped=False)[0].data_hash) is None


def test_a_graduate_of_another_version_is_named(trained):
    found = cards.read_card(trained / "runs/simkd/student.toml")
    assert found.graduate is not None
    state = checkpoint.load_state(trained / "runs/simkd/student.safetensors")
    with pytest.raises(WeightsError, match="its card's graduate"):
        from_card(found.model_copy(update={"graduate": {**found.graduate, "kind": "simkd9"}}), state)


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("zoo:cifar_vgg8", 32),
        ("timm:resnet10t", 48),
        ("torchvision:resnet18", 32),
        pytest.param("zoo:cifar_mobilenetv2", 32, marks=pytest.mark.slow),
        pytest.param("torchvision:shufflenet_v2_x0_5", 64, marks=pytest.mark.slow),
        pytest.param("timm:mobilenetv3_small_050", 64, marks=pytest.mark.slow),
        pytest.param("torchvision:mobilenet_v3_small", 64, marks=pytest.mark.slow),
        pytest.param("timm:swin_tiny_patch4_window7_224", 224, marks=pytest.mark.slow),
    ],
)
def test_any_student_graduates_and_ships(spec, size, tmp_path):
    name = registry.resolve(spec)
    torch.manual_seed(0)
    net = registry.create(name, 10).module
    heads = sum(p.numel() for p in net.parameters())
    graduate = Graduate(net, SPEC, pair(size), name.full)
    for layer in graduate.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
    assert sum(p.numel() for p in graduate.net.parameters()) < heads
    member = as_member(graduate, name, pair(size))
    pixels = torch.rand(3, 3, size, size)
    described = card(member, DATA, task="classify", epoch=1, score={"top1": 50.0}, origin="a run")
    again = from_card(described, graduate.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(pixels), member(pixels))
        seen = member.see(pixels, frozenset({"maps", "pooled"}))
    torch.testing.assert_close(seen.out, member(pixels))
    torch.testing.assert_close(seen.vectors, list(seen.stages.values())[-1].mean((2, 3)))
    assert seen.vectors.shape == (3, 24)
    done = export(again, pixels, tmp_path / "student.onnx", Classify(10))
    assert done.agreement == 100
    torch.testing.assert_close(open_file(done.path)(pixels), member(pixels).detach(), rtol=1e-3, atol=1e-4)


def test_a_larger_map_is_pooled_to_any_size(tmp_path):
    """8x8 to 3x3 does not divide; the exported file does the same."""
    name = registry.resolve("zoo:cifar_resnet8")
    spec, size = SPEC.model_copy(update={"size": [3, 3]}), (32, 32)
    graduate = Graduate(registry.create(name, 10).module, spec, size, name.full)
    member, pixels = as_member(graduate, name, size), torch.rand(4, 3, *size)
    with torch.no_grad():
        assert graduate.forward_intermediates(member.read(pixels))[0].shape == (4, 24, 3, 3)
    assert export(member, pixels, tmp_path / "student.onnx", Classify(10)).max_difference < 1e-4


@pytest.mark.parametrize(
    ("spec", "size", "teachers", "mine"),
    [
        ("zoo:cifar_resnet8", (48, 32), [5, 3], (5, 3)),  # the student's last map is 12x8
        ("zoo:cifar_resnet8", (32, 64), [3, 32], (3, 16)),
        ("torchvision:resnet18", (192, 128), [12, 8], (6, 4)),
    ],
)
def test_a_graduate_of_images_that_are_not_square(spec, size, teachers, mine):
    """Its projected map has the smaller height and the smaller width; its card brings it back."""
    name = registry.resolve(spec)
    torch.manual_seed(0)
    graduate = Graduate(registry.create(name, 10).module, SPEC.model_copy(update={"size": teachers}), size, name.full)
    member, pixels = as_member(graduate, name, size), torch.rand(3, 3, *size)
    described = card(member, DATA, task="classify", epoch=1, score={}, origin="a run")
    assert described.input_size == size
    again = from_card(described, graduate.state_dict())
    with torch.no_grad():
        output = again.see(pixels, frozenset({"maps", "pooled"}))
        torch.testing.assert_close(output.out, member(pixels))
    assert list(output.stages.values())[-1].shape == (3, 24, *mine)
    torch.testing.assert_close(output.vectors, list(output.stages.values())[-1].mean((2, 3)))


def test_layers_that_cannot_be_left_out_stay():
    """An attention that pools reshapes what its layers give: identities would break it."""

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.q, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward_intermediates(self, x, indices=None):
            x = self.conv(x)
            return x, [x]

        def forward_head(self, x):
            return self.head(self.q(x.mean((2, 3))).view(-1, 2, 3).flatten(1))

        def forward(self, x):
            return self.forward_head(self.forward_intermediates(x)[0])

    net, _ = graduates.trimmed(Pooling(), (8, 8), "pooling")
    assert isinstance(net.q, nn.Linear)
    assert isinstance(net.head, nn.Linear)
    out = Graduate(net, SPEC, (8, 8), "pooling")(torch.rand(2, 3, 8, 8))
    assert out.shape == (2, 10)


DATA: Any = SimpleNamespace(name="ten", hash="", classes=[str(k) for k in range(10)])
"""What a card needs to know of a data set."""


def as_member(net: nn.Module, name: ModelName, size: Size) -> Member:
    three = (0.5, 0.5, 0.5)
    made = Member(net, name, mean=three, std=three, input_size=size, interpolation="bilinear", num_classes=10)
    return made.eval()
