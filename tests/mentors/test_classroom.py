"""The classroom: each network has its input, the data's classes as outputs, and the right weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_kit as kit
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.data import Batch, DataSet
from kdcli.errors import RecipeError, WeightsError
from kdcli.mentors import classroom
from kdcli.mentors.mentors import Mentors
from kdcli.models import cards, checkpoint, cost, registry, weights
from kdcli.models.build import from_card
from kdcli.models.cards import Card
from kdcli.models.class_map import map_classes
from kdcli.models.member import Member
from kdcli.models.net import ModelName, Net
from kdcli.recipe import ClassroomConfig
from kdcli.workflows import groups


@pytest.fixture(autouse=True)
def _zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_HOME", str(kit.home()))


class Eye(nn.Module):
    """A network that records its inputs; its output k is k."""

    def __init__(self, classes: int = 12) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.arange(classes).float())
        self.shown: list[Tensor] = []

    def __deepcopy__(self, _: dict[int, Any]) -> "Eye":
        return self  # the inputs of a copy count too

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)  # torch.fx, which cannot know it, leaves here
        self.shown.append(x)
        return self.bias.expand(n, -1)


def member(net: nn.Module, **over: Any) -> Member:
    options = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.125), "input_size": (224, 224), "interpolation": "bicubic"}
    return Member(net, ModelName("timm", "eye", None, "eye"), **{**options, "num_classes": 12, **over})


# --- how each reads ---------------------------------------------------------------------------------------------------


def test_a_large_mentor_reads_small_images_in_its_own_way() -> None:
    eye, pixels = Eye(), torch.rand(2, 3, 16, 16)
    out = member(eye)(pixels)
    assert out.shape == (2, 12)
    seen = eye.shown[0]
    assert seen.shape == (2, 3, 224, 224)
    grown = F.interpolate(pixels, size=(224, 224), mode="bicubic", antialias=True)
    for channel, (mean, std) in enumerate(zip((0.1, 0.2, 0.3), (0.5, 0.25, 0.125), strict=True)):
        torch.testing.assert_close(seen[:, channel], (grown[:, channel] - mean) / std)


def test_images_of_the_right_size_are_only_normalised() -> None:
    eye, pixels = Eye(), torch.full((1, 3, 16, 16), 0.6)
    member(eye, input_size=(16, 16))(pixels)
    torch.testing.assert_close(eye.shown[0][0, :, 3, 3], torch.tensor([1.0, 1.6, 2.4]))


@pytest.mark.parametrize(
    ("asked", "used"),
    [("bilinear", "bilinear"), ("bicubic", "bicubic"), ("nearest", "bicubic"), ("lanczos", "bicubic")],
)
def test_interpolations_that_torch_cannot_antialias_become_bicubic(asked: str, used: str) -> None:
    pixels = torch.rand(1, 3, 16, 16)
    found = member(Eye(), interpolation=asked, mean=(0, 0, 0), std=(1, 1, 1), input_size=(8, 8)).read(pixels)
    torch.testing.assert_close(found, F.interpolate(pixels, size=(8, 8), mode=used, antialias=True))


def test_answers_are_picked_by_class() -> None:
    found = member(Eye(), class_index=torch.tensor([7, 0, 11]), num_classes=3)(torch.rand(2, 3, 16, 16))
    assert found.tolist() == [[7.0, 0.0, 11.0]] * 2


def test_a_224_pixel_mentor_of_more_classes_teaches_a_small_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the whole way: names, class map, reading, stream, loss."""
    digits = kit.classroom(kit.recipe()).data.classes
    eye, create, choose = Eye(12), registry.create, weights.choose

    def fake_create(name: ModelName, *args: Any, **options: Any) -> Net:
        if name.arch != "resnet18":
            return create(name, *args, **options)
        labels = ["cat", "dog", *reversed(digits)]
        return Net(eye, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), (224, 224), "bicubic", True, 12, labels, None)

    def fake_choose(name: ModelName, *args: Any, **options: Any) -> weights.Found:
        fake = weights.Found(None, "made up", 12, None, True)
        return fake if name.arch == "resnet18" else choose(name, *args, **options)

    monkeypatch.setattr(registry, "create", fake_create)
    monkeypatch.setattr(weights, "choose", fake_choose)
    config = kit.recipe(
        "classroom",
        **{
            "data.image_size": 16,
            "classroom.teacher": "resnet18",
            "classroom.class_map": "auto",
            "train.epochs": 1,
        },
    )
    run = kit.trained(config, tmp_path / "run")
    eye.shown = [x for x in eye.shown if not x.is_meta]  # its multiply-adds were counted too
    assert {tuple(x.shape[1:]) for x in eye.shown} == {(3, 224, 224)}
    assert len(eye.shown) == kit.STEPS
    low, high = (0 - 0.5) / 0.2, (1 - 0.5) / 0.2
    assert min(float(x.min()) for x in eye.shown) >= low - 1.5  # bicubic overshoots a little
    assert max(float(x.max()) for x in eye.shown) <= high + 1.5
    assert 0 < run.metrics()[0]["mark/resnet18"] <= 1
    room = kit.classroom(config)
    found = Mentors(room.mentors, "fp32", kit.CPU).answer(next(room.data.test.plain(3))).outputs
    assert found[0].out[0].tolist() == [float(11 - k) for k in range(10)]  # reversed, after the two animals


# --- class maps -------------------------------------------------------------------------------------------------------


def data(classes: list[str], wnids: list[str] | None = None) -> DataSet:
    return replace(kit.classroom(kit.recipe()).data, classes=classes, wnids=wnids)


def mapped(of: DataSet, how: Any, labels: list[str] | None, wnids: list[str] | None = None) -> list[int] | None:
    count = len(labels or wnids or [])
    net = Net(nn.Identity(), (0, 0, 0), (1, 1, 1), (8, 8), "bilinear", False, count, labels, wnids)
    found = map_classes(registry.resolve("resnet18"), net, of, how)
    return None if found is None else found.tolist()


def test_classes_meet_by_wordnet_id() -> None:
    of = data(["my cat", "my dog"], ["n02", "n01"])
    assert mapped(of, "auto", ["hound", "tabby", "bird"], ["n01", "n02", "n03"]) == [1, 0]


def test_classes_meet_by_name_whatever_its_spelling() -> None:
    of = data(["Golf-Ball", "great_white_shark", "tench"])
    labels = ["tench, Tinca tinca", "great white shark, white shark", "golf ball"]
    assert mapped(of, "auto", labels) == [2, 1, 0]


def test_classes_meet_by_what_the_user_says() -> None:
    of = data(["putt", "fish", "bird"])
    assert mapped(of, {"putt": "golf ball", "fish": 3}, ["bird", "golf ball", "x", "y"]) == [1, 3, 0]


def test_a_class_without_a_counterpart_is_named() -> None:
    with pytest.raises(WeightsError, match="none of its 2 classes is called unicorn") as caught:
        mapped(data(["bird", "unicorn"]), "auto", ["bird", "fish"])
    assert "[classroom.class_map]" in caught.value.hint
    assert caught.value.exit_code == 3


def test_many_missing_classes_are_counted() -> None:
    with pytest.raises(WeightsError, match=r"a, b, c, d, e and 2 more"):
        mapped(data(list("abcdefg")), "auto", ["x", "y"])


def test_a_column_beyond_the_last_is_refused() -> None:
    with pytest.raises(WeightsError, match="classes is called fish"):
        mapped(data(["bird", "fish"]), {"fish": 2}, ["bird", "x"])


def test_two_classes_may_not_share_a_column() -> None:
    with pytest.raises(WeightsError, match="two classes of digits map to the same"):
        mapped(data(["bird", "duck"]), {"duck": "bird"}, ["bird", "fish"])


def test_a_mentor_of_the_datas_own_classes_needs_no_map_made_for_another() -> None:
    of = data(["my cat", "my dog"], ["n02", "n01"])
    for how in ("auto", {"my cat": "tabby", "my dog": 217}):
        assert mapped(of, how, ["My Cat", "my_dog"]) is None
        assert mapped(of, how, None, ["n02", "n01"]) is None
    assert mapped(of, "auto", ["my dog", "my cat"]) == [1, 0]  # the same classes in another order
    unlabelled = Net(nn.Identity(), (0, 0, 0), (1, 1, 1), (8, 8), "bilinear", False, 2)
    name = registry.resolve("resnet18")
    for how in ("auto", {"my cat": "tabby"}):
        assert map_classes(name, unlabelled, of, how) is None
    turned = map_classes(name, unlabelled, of, {"my cat": 1, "my dog": 0})
    assert turned is not None
    assert turned.tolist() == [1, 0]


def test_without_a_map_the_counts_must_agree() -> None:
    assert mapped(data(["a", "b"]), "off", ["x", "y"]) is None
    with pytest.raises(WeightsError, match="has 3 classes, digits has 2") as caught:
        mapped(data(["a", "b"]), "off", ["x", "y", "z"])
    assert "class_map=auto" in caught.value.hint
    assert "kdcli train --model resnet18" in caught.value.hint


# --- building ---------------------------------------------------------------------------------------------------------


def test_a_students_first_weights_depend_on_the_training_seed_alone() -> None:
    room = kit.classroom(kit.recipe())
    first = room.student(3).state_dict()
    torch.manual_seed(12345)
    other = kit.classroom(kit.recipe("classroom", **{"data.seed": 9, "train.lr": 0.1}))
    before = torch.get_rng_state()
    again = other.student(3).state_dict()
    assert kit.same(dict(first), dict(again))
    assert torch.equal(torch.get_rng_state(), before)  # and nothing else's numbers depend on it
    assert not torch.equal(room.student(4).net.state_dict()["fc.weight"], first["net.fc.weight"])


def test_a_student_reads_as_its_data_and_mentors_as_their_cards() -> None:
    room = kit.classroom(kit.recipe("classroom"))
    student = room.student(0)
    assert (student.mean, student.std, student.input_size) == (room.data.mean, room.data.std, (8, 8))
    assert not student.digest
    for mentor in room.mentors:
        assert mentor.mean == (0.3, 0.3, 0.3)
        assert mentor.std == (0.4, 0.4, 0.4)
        assert mentor.digest == checkpoint.digest(mentor.net)
        assert mentor.num_classes == 10
        assert not mentor.training
        assert not any(p.requires_grad for p in mentor.parameters())
    assert [mentor.name for mentor in room.mentors] == ["cifar_resnet14", "cifar_resnet8"]
    noted = {what: (value, why) for what, value, why in room.notes}
    assert str(noted["zoo:cifar_resnet8"][0]).startswith("zoo: cifar_resnet8 on digits")


def test_the_same_network_twice_gets_a_number() -> None:
    same = kit.MENTORS[0]
    room = kit.classroom(
        kit.recipe("aver", **{"classroom.teacher": same, "classroom.peers": [same, kit.MENTORS[1], same]})
    )
    assert [mentor.name for mentor in room.mentors] == [same, f"{same}#2", kit.MENTORS[1], f"{same}#3"]
    assert len(groups.facts_of(room)["mentors"]) == 4


def test_a_classroom_needs_names() -> None:
    room = kit.classroom(kit.recipe())
    nobody = kit.recipe().model_copy(update={"classroom": ClassroomConfig()})
    with pytest.raises(RecipeError, match="no student is named") as caught:
        classroom.build_classroom(nobody, room.data, kit.CPU)
    assert "--student" in caught.value.hint
    headless = ClassroomConfig(student="cifar_resnet8", peers=["cifar_resnet8"])
    with pytest.raises(RecipeError, match="peers without a teacher"):
        classroom.build_classroom(kit.recipe().model_copy(update={"classroom": headless}), room.data, kit.CPU)


def test_an_untrained_mentor_is_refused_with_the_command_that_trains_it() -> None:
    with pytest.raises(WeightsError, match="cifar_resnet20") as caught:
        kit.classroom(kit.recipe("kd", **{"classroom.teacher": "cifar_resnet20"}))
    assert "kdcli train --model cifar_resnet20 --data digits" in caught.value.hint
    assert caught.value.exit_code == 3


def test_no_mentor_is_loaded_where_none_is_wanted() -> None:
    config = kit.recipe("nokd", **{"classroom.teacher": "cifar_resnet20"})
    room = groups.open_classroom(config, kit.CPU, mentors=False)
    assert room.mentors == []


def test_a_member_is_made_again_from_its_card() -> None:
    card = cards.find("cifar_resnet8", kit.classroom(kit.recipe()).data.hash)
    assert card is not None
    path = cards.weights_path(card)
    assert path is not None
    found = from_card(card, checkpoint.load_state(path))
    seated = kit.classroom(kit.recipe("aver")).mentors[1]
    pixels = torch.rand(4, 3, 8, 8)
    assert torch.equal(found(pixels), seated(pixels))
    assert not found.training
    params, macs = found.count()
    assert params == sum(p.numel() for p in seated.net.parameters())
    assert macs > params


# --- sizes that are not square ----------------------------------------------------------------------------------------

TALL = (48, 32)
EVERYTHING = frozenset({"maps", "pre", "pooled"})


@pytest.fixture
def tall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSet:
    """The digits as data of 48x32 pixels, and a zoo whose cifar_resnet8 has a card of 32x24."""
    monkeypatch.setenv("KDCLI_HOME", str(tmp_path))
    data = replace(
        kit.classroom(kit.recipe("nokd", **{"classroom.teacher": None, "classroom.peers": []})).data, image_size=TALL
    )
    card = Card(
        name="cifar_resnet8 on digits", architecture="zoo:cifar_resnet8", dataset=data.name, data_hash=data.hash,
        num_classes=10, image_size=(32, 24), mean=(0.3, 0.3, 0.3), std=(0.4, 0.4, 0.4),
    )  # fmt: skip
    cards.add(kit.random_weights("cifar_resnet8", 0), card)
    return data


def seated(data: DataSet, student: str) -> classroom.Classroom:
    return classroom.build_classroom(
        kit.recipe("kd", **{"classroom.student": student, "classroom.teacher": "cifar_resnet8", "classroom.peers": []}),
        data,
        kit.CPU,
    )


@torch.no_grad()
def test_students_and_mentors_of_sizes_that_are_not_square(tall: DataSet) -> None:
    room, pixels = seated(tall, "cifar_resnet10_xxs"), torch.rand(2, 3, *TALL)
    student, mentor = room.student(0).eval(), room.mentors[0]
    assert (student.input_size, mentor.input_size) == (TALL, (32, 24))
    assert mentor.read(pixels).shape == (2, 3, 32, 24)
    assert student.taps() == {
        "stage1": (8, 48, 32), "stage2": (8, 24, 16), "stage3": (16, 12, 8), "stage4": (16, 6, 4),
        "pooled": (16,), "logits": (10,),
    }  # fmt: skip
    assert mentor.taps() == {
        "stage1": (16, 32, 24), "stage2": (32, 16, 12), "stage3": (64, 8, 6), "pooled": (64,), "logits": (10,),
    }  # fmt: skip
    for member in (student, mentor):
        output = member.see(pixels, EVERYTHING)
        torch.testing.assert_close(output.out, member(pixels), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(member.classify(output.vectors), output.out, rtol=1e-3, atol=1e-3)
        member.check_head()
    assert student.count()[1] == pytest.approx(1.5 * cost.count(student.net, (32, 32))[1], rel=1e-3)
    answer = Mentors(room.mentors, "fp32", kit.CPU, needs=EVERYTHING).answer(batch_of(pixels)).outputs[0]
    torch.testing.assert_close(answer.out, mentor(pixels), rtol=1e-4, atol=1e-4)
    assert answer.stages["stage3"].shape == (2, 64, 8, 6)


def batch_of(pixels: Tensor) -> Batch:
    numbers = torch.arange(len(pixels))
    return Batch(pixels, numbers, numbers, torch.full_like(numbers, -1))


def test_images_that_a_network_stretches_are_noted(tall: DataSet) -> None:
    room = seated(tall, "cifar_resnet10_xxs")
    said = {value: why for what, value, why in room.notes if what == "zoo:cifar_resnet8"}
    stretched = "input 32x24 px: images of 48x32 px are resized, which changes their aspect ratio"
    assert said[stretched] == "the size its weights were trained at"
    before = list(room.notes)
    room.student(0)
    assert room.notes == before  # the student has the data's size
    assert not any(
        "resized" in str(value) for _, value, _ in seated(replace(tall, image_size=(32, 24)), "cifar_resnet8").notes
    )


def test_a_transformer_of_fixed_input_size_resizes_the_images_and_says_so(tall: DataSet) -> None:
    room = seated(tall, "vit_tiny_patch16_224")
    student = room.student(0).eval()
    room.student(1)
    note = (
        "timm:vit_tiny_patch16_224",
        "input 224 px: images of 48x32 px are resized, which changes their aspect ratio",
        "the architecture's input size is fixed",
    )
    assert room.notes.count(note) == 1
    assert student.input_size == (224, 224)
    with torch.no_grad():
        assert student.see(torch.rand(1, 3, *TALL), frozenset({"maps"})).stages["stage4"].shape == (1, 192, 14, 14)
