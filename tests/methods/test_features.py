"""FitNets, AT, SP, NST and VID: which maps they compare, what brings them together, and what they refuse."""

import feature_kit as kit
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdcli import methods
from kdcli.errors import RecipeError
from kdcli.losses import features as losses
from kdcli.methods.features import Regressor
from kdcli.models import layers

NAMES = ["fitnets", "at", "sp", "nst", "vid"]
WEIGHTS = {"fitnets": 100, "at": 1000, "sp": 3000, "nst": 50, "vid": 1}
PAIRS = {
    "3 stages with 4": (kit.CIFAR3, kit.TIMM4),
    "4 stages with 3": (kit.TIMM4, kit.CIFAR3),
    "cnn with vit": (kit.CIFAR3, kit.VIT),
    "vit with cnn": (kit.VIT, kit.TIMM4),
    "odd sizes": (kit.ODD, kit.VIT),
    "the same": (kit.CIFAR3, kit.CIFAR3),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", NAMES)
def test_any_two_networks_can_be_paired(name, pair):
    given = kit.lesson(*PAIRS[pair])
    method = kit.ready(name, given)
    terms = method.loss(given, kit.PHASE)
    assert set(terms) == {"hard", "maps"}
    read = [given.student.out, *(given.student.maps[here] for here, _ in method.matched)]  # pyright: ignore
    for grad in torch.autograd.grad(kit.total(terms), [*read, *method.parameters()]):
        assert torch.isfinite(grad).all()
        assert grad.abs().max() > 0
    assert not any(x.requires_grad for x in kit.leaves(given.teacher))


@pytest.mark.parametrize("name", NAMES)
def test_the_hard_term_and_the_weights(name):
    given = kit.lesson()
    cross_entropy = F.cross_entropy(given.student.out, given.target)
    plain = kit.ready(name, given).loss(given, kit.PHASE)
    torch.testing.assert_close(plain["hard"], cross_entropy)
    other = kit.ready(name, given, ce_weight=0.5, outer_weight=3.0).loss(given, kit.PHASE)
    torch.testing.assert_close(other["hard"], 0.5 * cross_entropy)
    torch.testing.assert_close(other["maps"] / 3, plain["maps"] / WEIGHTS[name])


def test_at_sums_over_all_pairs_from_the_last_backwards():
    given = kit.lesson(kit.CIFAR3, kit.TIMM4)
    method = kit.ready("at", given)
    assert method.matched == [("stage1", "stage2"), ("stage2", "stage3"), ("stage3", "stage4")]
    ours, theirs = given.student.stages, given.teacher.stages
    expected = torch.zeros(())
    for here, there in method.matched:
        size = min(ours[here].shape[2:], theirs[there].shape[2:])
        small = [F.adaptive_avg_pool2d(x, size) for x in (ours[here], theirs[there])]
        expected += losses.attention_loss(*small)
    torch.testing.assert_close(method.loss(given, kit.PHASE)["maps"], 1000 * expected)


def test_nst_sums_over_all_pairs():
    given = kit.lesson(kit.CIFAR3, kit.VIT)
    ours, theirs = given.student.stages, given.teacher.stages
    expected = torch.zeros(())
    for here, there in (("stage1", "stage2"), ("stage2", "stage3"), ("stage3", "stage4")):
        expected += losses.selectivity_loss(*layers.fit(ours[here], theirs[there]))
    torch.testing.assert_close(kit.ready("nst", given).loss(given, kit.PHASE)["maps"], 50 * expected)


def test_sp_reads_the_last_maps():
    given = kit.lesson()
    expected = losses.similarity_loss(given.student.stages["stage3"], given.teacher.stages["stage4"])
    torch.testing.assert_close(kit.ready("sp", given).loss(given, kit.PHASE)["maps"], 3000 * expected)


def test_vid_is_three_convolutions_and_a_variance_for_every_channel():
    given = kit.lesson(kit.CIFAR3, kit.CIFAR3)
    method = kit.ready("vid", given, taps=["stage2:stage3"], init_variance=2.0)
    convs = [layer for layer in method.modules() if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.bias) for c in convs] == [(6, 8, None), (8, 8, None), (8, 8, None)]
    x = F.adaptive_avg_pool2d(given.student.stages["stage2"], (2, 2))
    for number, conv in enumerate(convs):
        x = F.conv2d(x.relu() if number else x, conv.weight)
    expected = losses.variational_loss(x, given.teacher.stages["stage3"], torch.full((8,), 2.0))
    torch.testing.assert_close(method.loss(given, kit.PHASE)["maps"], expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "kernel", "layer"),
    [
        ((4, 4), (2, 2), (3, 3), nn.Conv2d),  # twice as large
        ((2, 2), (4, 4), (4, 4), nn.ConvTranspose2d),  # half as large
        ((4, 4), (4, 4), (1, 1), nn.Conv2d),
        ((7, 5), (5, 3), (3, 3), nn.Conv2d),  # 1 + the difference
        ((8, 8), (3, 2), (6, 7), nn.Conv2d),
        ((3, 3), (4, 4), (1, 1), nn.Conv2d),  # no rule: resized first
        ((32, 32), (8, 8), (1, 1), nn.Conv2d),
        ((9, 2), (3, 7), (1, 1), nn.Conv2d),
    ],
)
def test_fitnets_regressor_goes_by_the_sizes(ours, theirs, kernel, layer):
    student, mentor = kit.random(2, 4, *ours), kit.random(2, 6, *theirs)
    regressor = Regressor(student, mentor)
    assert type(regressor[0]) is layer
    assert regressor[0].kernel_size == kernel
    assert regressor(student).shape == mentor.shape
    assert [type(one) for one in list(regressor)[1:]] == [nn.BatchNorm2d, nn.ReLU]


def test_fitnets_is_the_squared_distance_from_the_regressor_to_the_hint():
    given = kit.lesson(kit.CIFAR3, kit.CIFAR3)
    method = kit.ready("fitnets", given)
    assert method.matched == [("stage2", "stage2")]
    x = F.conv2d(given.student.stages["stage2"], method.regressor[0].weight)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    expected = (x.relu() - given.teacher.stages["stage2"]).square().mean()
    torch.testing.assert_close(method.loss(given, kit.PHASE)["maps"], 100 * expected)


@pytest.mark.parametrize(("name", "option"), [("fitnets", "tap"), ("sp", "tap"), ("at", "taps"), ("vid", "taps")])
def test_taps_by_name(name, option):
    def matched(*taps: str) -> list[tuple[str, str]]:
        given: dict[str, object] = {option: taps[0] if option == "tap" else list(taps)}
        return kit.ready(name, kit.lesson(kit.CIFAR3, kit.TIMM4), **given).matched

    assert matched("stage1") == [("stage1", "stage2")]
    assert matched("last") == [("stage3", "stage4")]
    assert matched("stage1:stage1") == [("stage1", "stage1")]
    assert matched("last:stage1") == [("stage3", "stage1")]
    if option == "taps":
        assert matched("stage1", "stage3") == [("stage1", "stage2"), ("stage3", "stage4")]


@pytest.mark.parametrize(("name", "option"), [("fitnets", "tap"), ("sp", "tap"), ("nst", "taps"), ("at", "taps")])
def test_a_tap_that_does_not_exist_is_refused_with_the_list(name, option):
    def refused(tap: str) -> RecipeError:
        with pytest.raises(RecipeError) as caught:
            kit.ready(name, kit.lesson(kit.TIMM4, kit.CIFAR3), **{option: tap if option == "tap" else [tap]})
        return caught.value

    error = refused("stage7")
    assert f"method.{option}: the student has no tap 'stage7'" in error.message
    assert "stage2 5x3x3" in error.hint
    assert "the teacher has no tap 'stage4'" in refused("stage1:stage4").message
    error = refused("stage1")  # four stages with three: the first stays alone
    assert "stage1 has no partner" in error.message
    assert "stage2 or stage3 or stage4" in error.hint
    assert "stage1:stage1" in error.hint


@pytest.mark.parametrize("name", ["at", "nst"])
def test_maps_of_one_position_are_refused_where_positions_are_compared(name):
    small = [(4, 4, 4), (6, 1, 1), (8, 1, 1)]
    given = kit.lesson(kit.CIFAR3, small)
    assert torch.isfinite(kit.ready(name, given).loss(given, kit.PHASE)["maps"])  # the first stage is left
    with pytest.raises(RecipeError, match=r"method\.taps: .*stage3 with stage3.* one position") as caught:
        kit.ready(name, given, taps=["last"])
    assert "data.image_size" in caught.value.hint
    assert kit.ready("vid", given, taps=["last"]).matched == [("stage3", "stage3")]


def test_no_taps_at_all_are_refused():
    for name in ("at", "nst", "vid"):
        with pytest.raises(RecipeError, match=r"method\.taps"):
            methods.build(name, {"taps": []})


def test_a_variance_below_its_floor_is_refused():
    with pytest.raises(RecipeError, match="init_variance"):
        methods.build("vid", {"init_variance": 1e-6})


def test_what_they_need():
    needs = {name: methods.find(name).needs for name in NAMES}
    assert all("maps" in some for some in needs.values())
    assert [name for name in NAMES if "full_batches" in needs[name]] == ["sp"]
    assert [name for name in NAMES if "pairs" in needs[name]] == ["fitnets", "sp"]
