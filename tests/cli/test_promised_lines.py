"""The three lines users were promised, exactly as typed (DESIGN section 3), on a made-up ImageNet of two classes."""

import shlex
import shutil

import pytest
import torch
from cli_kit import add_mentors, kdcli, picture_folder

from kdcli import recipe as recipes
from kdcli.models import registry
from kdcli.system.paths import shipped

DISTILL = "kdcli distill --teacher resnet34 --peers mobilenetv3_small,regnetx_004 --student resnet18 --data imagenet"
EXPORT = "kdcli export --onnx"
COMPARE = "kdcli compare --methods aver,classroom"
WNIDS = ("n01440764", "n03888257")  # tench, parachute
QUICK = ("--epochs", "1", "--set", "data.image_size=32", "--set", "train.batch_size=8", "--set", "data.workers=0")


def typed(line: str, *more: str):
    program, *args = shlex.split(line)
    assert program == "kdcli"
    return kdcli(*args, *more)


@pytest.fixture
def imagenet(here, monkeypatch):
    """KDCLI_DATA with imagenet/train/<wnid> and imagenet/val/<wnid>."""
    picture_folder(here / "data/imagenet", WNIDS, ending="JPEG")
    monkeypatch.setenv("KDCLI_DATA", str(here / "data"))


@pytest.fixture
def mentors(imagenet):
    """The three mentors of the line, trained (in name) on these images."""
    add_mentors("resnet34", "torchvision:mobilenet_v3_small", "regnetx_004", data="imagenet", image_size=32)


def follow_on(here, *quick: str) -> None:
    """What all versions of the first line must have brought, and the two lines after it."""
    run = kdcli("runs", "ls", "--json").json[-1]
    assert {"student": "resnet18", "method": "classroom", "data": "imagenet", "finished": True}.items() <= run.items()
    exported = typed(EXPORT)
    assert f"runs/{run['run']} (the newest)" in exported.err
    assert (here / "runs" / run["run"] / "student.onnx").stat().st_size > 40e6
    compared = typed(COMPARE, *quick)
    assert f"that of run {run['run']}" in compared.out
    rows = [line.split()[0] for line in compared.out.splitlines() if " ± " in line and ";" not in line]
    assert rows == ["nokd", "aver", "classroom"]
    assert compared.next.startswith("kdcli export --onnx runs/")


def test_the_three_lines_shortened(mentors, here):
    said = typed(DISTILL, *QUICK)
    assert "mobilenetv3_small torchvision:mobilenet_v3_small (the only name that fits)" in said.out
    assert said.next == EXPORT
    shown = kdcli("runs", "show", "--json").json
    assert list(shown["provenance"]["mentors"]) == ["resnet34", "mobilenet_v3_small", "regnetx_004"]
    assert "temperature/mobilenet_v3_small" in shown["metrics"][-1]
    follow_on(here)


@pytest.mark.slow
def test_the_three_lines_exactly_as_typed(mentors, here, monkeypatch):
    """Not a letter added: only the built-in recipe the first line starts from is cut to one epoch of few images."""
    shutil.copytree(shipped("recipes"), here / "recipes")
    built_in = here / "recipes/defaults/imagenet.toml"
    whole = built_in.read_text(encoding="utf-8")
    short = whole.replace("epochs = 100", "epochs = 1").replace("batch_size = 512", "batch_size = 8")
    assert short.count("epochs = 1\n") == 1
    assert "batch_size = 8 " in short
    built_in.write_text(short, encoding="utf-8")
    monkeypatch.setattr(recipes, "shipped", lambda kind: here / kind)
    assert "the only name that fits" in typed(DISTILL).out
    shown = kdcli("runs", "show", "--json").json
    assert shown["provenance"]["data"]["train"] == 16
    assert recipes.load(f"{shown['run']}/recipe.toml").data.image_size == 224
    follow_on(here)


def test_the_first_line_with_too_few_images_names_the_cure(mentors):
    said = kdcli(*shlex.split(DISTILL)[1:], "--set", "data.image_size=32", code=2)
    assert "train.batch_size = 512" in said.err
    assert "training set of imagenet, 16 images" in said.err
    assert "--set train.batch_size=" in said.err


def test_the_first_line_without_images_says_how_to_lay_them_out(here):
    said = kdcli(*shlex.split(DISTILL)[1:], code=3)
    assert "imagenet/train/<class>" in said.err
    assert all(way in said.err for way in ("--data imagenet:DIR", "--data-root", "KDCLI_DATA"))


@pytest.mark.parametrize("place", ["imagenet:data/imagenet", "--data-root"])
def test_imagenet_is_also_found_by_folder_and_by_data_root(mentors, monkeypatch, place):
    monkeypatch.delenv("KDCLI_DATA")
    where = ["--data", place] if ":" in place else ["--data", "imagenet", "--data-root", "data"]
    found = kdcli("evaluate", "regnetx_004", *where, "--set", "data.image_size=32", "--json").json
    assert found["images"] == 8
    assert found["per_class"].keys() == {"tench", "parachute"}


def test_pretrained_weights_teach_the_classes_they_share_by_wordnet_id(imagenet, here, monkeypatch):
    """The library's own weights, from its cache: 1000 classes, of which the folders name two."""
    monkeypatch.setenv("TORCH_HOME", str(here / "torch"))
    name = registry.resolve("mobilenetv3_small")
    torch.manual_seed(0)
    net = registry.create(name, 1000)
    cache = here / "torch/hub/checkpoints"
    cache.mkdir(parents=True)
    from torchvision.models import get_model_weights

    url = get_model_weights("mobilenet_v3_small").DEFAULT.url
    torch.save(net.module.state_dict(), cache / url.rpartition("/")[2])
    args = ("--teacher", "mobilenetv3_small", "--student", "cifar_resnet8", "--data", "imagenet", *QUICK)
    refused = kdcli("distill", *args, code=3)
    assert "1000 classes" in refused.err
    assert "class_map=auto" in refused.err
    said = kdcli("distill", *args, "--set", "classroom.class_map=auto")
    assert "torchvision's pretrained weights, 1000 classes" in said.out
    scored = kdcli(
        "evaluate", "mobilenetv3_small@pretrained", "--data", "imagenet", "--set", "classroom.class_map=auto", "--json"
    ).json
    assert scored["per_class"].keys() == {"tench", "parachute"}
    from kdcli.data import open_data
    from kdcli.mentors.classroom import build_classroom

    recipe = recipes.Recipe().with_(**{
        "data.name": "imagenet", "data.image_size": 32, "classroom.student": "cifar_resnet8",
        "classroom.teacher": "mobilenetv3_small", "classroom.class_map": "auto",
    })  # fmt: skip
    teacher = build_classroom(recipe, open_data(recipe.data), torch.device("cpu")).mentors[0]
    assert teacher.input_size == (224, 224)
    assert teacher.class_index.tolist() == [0, 701]
