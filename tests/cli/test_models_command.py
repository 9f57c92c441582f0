"""kdcli models: counts at the size asked for, in tables and as data; kdcli zoo: cards of every task."""

import pytest
import torch
from cli_kit import kdcli

from kdcli.models import cards
from kdcli.models.cards import Card

COUNTED = ("models", "cifar_resnet20", "--source", "zoo", "--classes", "100", "--limit", "1")


@pytest.mark.parametrize(
    ("given", "size", "shown"), [("32", 32, "32 px"), ("32x32", 32, "32 px"), ("64X32", [64, 32], "64x32 px")]
)
def test_image_size_is_one_number_or_height_by_width(given, size, shown):
    found = kdcli(*COUNTED, "--image-size", given, "--json").json[0]
    assert found["input_size"] == size
    assert found["params"] == 278_324
    assert round(found["macs"] / 1e6, 1) == (40.8 if size == 32 else 81.6)
    assert shown in kdcli(*COUNTED, "--image-size", given).out


def test_a_size_too_small_for_a_network_hides_no_other():
    asked = ("models", "torchvision:*net_v2_x0_5", "--image-size", "8x4096")
    assert kdcli("models", "torchvision:alexnet", "--image-size", "32", "--json").json[0]["macs"] is None
    assert "too small" in kdcli("models", "torchvision:alexnet", "--image-size", "32").out
    assert kdcli(*asked, "--json").json[0]["macs"] > 0


@pytest.mark.parametrize("given", ["", "x", "32x", "x32", "32x32x3", "7", "32x4", "-32", "32.5", "big"])
def test_what_is_not_a_size_is_refused_with_the_form(given):
    said = kdcli(*COUNTED, "--image-size", given, code=2)
    assert "not an image size" in said.err
    assert "--image-size 256x192" in said.err


def test_zoo_lists_scores_of_every_task():
    plain = {"data_hash": "d", "num_classes": 2, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "dataset": "mine"}
    nets = {"multilabel": {"map": 61.25, "f1": 50.0}, "classify": {}}
    for n, (task, score) in enumerate(nets.items()):
        made = Card(
            name=task, architecture=f"zoo:cifar_resnet{8 + 6 * n}", task=task, image_size=(48, 32), score=score, **plain
        )
        cards.add({"a": torch.ones(n + 1)}, made)
    listed = {card["name"]: card for card in kdcli("zoo", "ls", "--json").json}
    assert (listed["multilabel"]["map"], listed["multilabel"]["score"]) == (61.25, nets["multilabel"])
    assert listed["multilabel"]["image_size"] == [48, 32]
    assert listed["classify"]["top1"] is None
    assert listed["cifar_resnet20_a on cifar10"]["top1"] == 91.73
    out = kdcli("zoo", "ls").out
    assert "mAP 61.25" in out
    assert "top-1 91.73" in out
    assert [row["state"] for row in kdcli("zoo", "verify", "--json").json] == ["ok", "ok"]
