"""The zoo: cards, atomic saving, finding the newest, and noticing what was changed."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from kdcli.errors import DataError, WeightsError
from kdcli.models import cards
from kdcli.models.cards import Card
from kdcli.system import paths

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2), "n": torch.tensor(3)}


def card(**over: object) -> Card:
    plain = {
        "name": "net on data",
        "architecture": "zoo:cifar_resnet20",
        "dataset": "digits",
        "data_hash": "d1",
        "num_classes": 2,
        "classes": ["zero", "one"],
        "image_size": 32,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.2, 0.1),
        "score": {"top1": 72.4},
        "created": "2026-11-20T10:00:00+00:00",
    }
    return Card.model_validate(plain | over)


def test_a_card_reads_back_as_written(tmp_path: Path) -> None:
    found = card(epoch=20, params=8, licence="Apache-2.0", origin='a "quoted" run')
    cards.write_card(tmp_path / "x.toml", found)
    back = cards.read_card(tmp_path / "x.toml")
    assert back.path == tmp_path / "x.toml"
    assert back.model_dump() == found.model_dump()
    assert "path" not in (tmp_path / "x.toml").read_text()


def test_a_card_says_itself_in_one_line() -> None:
    assert card().line() == "cifar_resnet20 on digits, 72.4 %, 2026-11-20"
    assert card(score={}, epoch=20).line() == "cifar_resnet20 on digits, epoch 20, 2026-11-20"
    assert card(architecture="timm:resnet18").line().startswith("timm:resnet18 on digits")


@pytest.mark.parametrize(
    ("text", "named"),
    [("name = ", "not TOML"), ('name = "x"', "architecture"), ("\x00", "not TOML")],
)
def test_a_broken_card_is_refused_by_file_and_key(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(WeightsError, match=named) as caught:
        cards.read_card(tmp_path / "x.toml")
    assert "x.toml" in caught.value.message
    assert caught.value.hint


def test_unknown_keys_and_impossible_scores_are_refused(tmp_path: Path) -> None:
    cards.write_card(tmp_path / "x.toml", card())
    good = (tmp_path / "x.toml").read_text()
    for bad, named in (
        (good + 'colour = "red"\n', r"x\.toml: colour: "),
        (good.replace("72.4", "724.0"), r"x\.toml: score\.top1: 724\.0 is not a percentage"),
        (good.replace("72.4", "nan"), r"score\.top1: nan is not a percentage"),
        (good.replace("top1", "top2"), r"score\.top2: not a metric of classify. Did you mean top5 or top1"),
        (good.replace('"classify"', '"clasify"'), r"task: no task called 'clasify'. Did you mean classify"),
        (good.replace("image_size = 32", "image_size = [32, 0]"), r"x\.toml: image_size"),
        (good.replace("image_size = 32", "image_size = [32, 32, 3]"), r"x\.toml: image_size"),
    ):
        (tmp_path / "x.toml").write_text(bad)
        with pytest.raises(WeightsError, match=named) as caught:
            cards.read_card(tmp_path / "x.toml")
        assert caught.value.exit_code == 3


def test_a_card_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Its one metric was a key at the top, and images were square."""
    now = {"name": "net on data", "architecture": "zoo:cifar_resnet20", "dataset": "digits", "num_classes": 2}
    then = "".join(f"{key} = {json.dumps(value)}\n" for key, value in now.items())
    then += "image_size = 32\nmean = [0.5, 0.4, 0.3]\nstd = [0.2, 0.2, 0.1]\ntop1 = 72.4\n"
    (tmp_path / "x.toml").write_text(then)
    found = cards.read_card(tmp_path / "x.toml")
    assert (found.score, found.value, found.task, found.input_size) == ({"top1": 72.4}, 72.4, "classify", (32, 32))
    (tmp_path / "x.toml").write_text(then.replace("top1 = 72.4\n", ""))
    assert cards.read_card(tmp_path / "x.toml").value is None
    (tmp_path / "x.toml").write_text(then.replace("72.4", "724.0"))
    with pytest.raises(WeightsError, match="not a percentage"):
        cards.read_card(tmp_path / "x.toml")


def test_a_card_of_another_task_and_a_size_that_is_not_square(tmp_path: Path) -> None:
    cards.write_card(
        tmp_path / "x.toml", card(task="multilabel", score={"map": 61.25, "f1": 50.0}, image_size=(256, 192))
    )
    text = (tmp_path / "x.toml").read_text()
    assert "image_size = [256, 192]" in text
    assert "score = {map = 61.25, f1 = 50.0}" in text
    found = cards.read_card(tmp_path / "x.toml")
    assert (found.input_size, found.metric.name, found.value) == ((256, 192), "map", 61.25)
    assert found.line() == "cifar_resnet20 on digits, 61.25 %, 2026-11-20"
    assert (card().input_size, card().image_size) == ((32, 32), 32)


def test_save_writes_both_files_and_fills_the_hash(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tied = {**STATE, "b.weight": STATE["a.weight"], "t": STATE["a.weight"].T}
    path = cards.save(tmp_path / "new" / "folder", "student", tied, card())
    assert sorted(p.name for p in path.parent.iterdir()) == ["student.safetensors", "student.toml"]
    back = load_file(path)
    assert all(torch.equal(back[k], v) for k, v in tied.items())
    found = cards.read_card(path.with_suffix(".toml"))
    assert found.sha256 == cards.file_hash(path)
    assert cards.weights_path(found) == path
    assert cards.verify(found)[0] == "ok"


def test_saving_again_replaces(tmp_path: Path) -> None:
    cards.save(tmp_path, "s", STATE, card())
    path = cards.save(tmp_path, "s", {"a": torch.ones(1)}, card(score={"top1": 1.0}))
    found = cards.read_card(path.with_suffix(".toml"))
    assert found.value == 1.0
    assert cards.verify(found)[0] == "ok"


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="the disk is full") as caught:
        cards.save(tmp_path, "s", STATE, card())
    assert caught.value.exit_code == 3
    assert "KDCLI_HOME" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cards.save(tmp_path, "s", STATE, card())
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError):
        cards.save(tmp_path, "s", {"a": torch.ones(1)}, card())
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.safetensors", "s.toml"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        cards.save(tmp_path / "file", "s", STATE, card())


def test_added_weights_are_found_by_architecture_and_data() -> None:
    found = cards.add(STATE, card())
    assert found.path is not None
    assert found.path.parent == paths.home() / "zoo"
    for name in ("zoo:cifar_resnet20", "cifar_resnet20"):
        hit = cards.find(name, "d1")
        assert hit is not None
        assert hit.sha256 == found.sha256
    for name, data in (("cifar_resnet20", "d2"), ("cifar_resnet32", "d1"), ("timm:cifar_resnet20", "d1")):
        assert cards.find(name, data) is None
    assert cards.find("cifar_resnet20", "") is None


def test_the_newest_wins() -> None:
    cards.add({"a": torch.ones(1)}, card(created="2026-11-19T00:00:00+00:00", score={"top1": 90.0}))
    cards.add({"a": torch.zeros(1)}, card(created="2026-11-21T00:00:00+00:00", score={"top1": 10.0}))
    cards.add({"a": torch.full((1,), 2.0)}, card(created="2026-11-20T00:00:00+00:00", score={"top1": 50.0}))
    hit = cards.find("cifar_resnet20", "d1")
    assert hit is not None
    assert hit.value == 10.0
    assert [c.value for c in cards.cards(shipped=False)] == [10.0, 50.0, 90.0]


def test_a_timm_tag_names_weights_and_no_architecture() -> None:
    cards.add(STATE, card(architecture="timm:resnet18.a1_in1k"))
    assert cards.find("timm:resnet18", "d1")
    assert cards.find("timm:resnet18.a1_in1k", "d1")
    assert cards.find("timm:resnet18.tv_in1k", "d1") is None
    assert cards.find("torchvision:resnet18", "d1") is None


def test_changed_and_missing_weights_are_noticed(tmp_path: Path) -> None:
    found = cards.add(STATE, card())
    path = cards.weights_path(found)
    assert path is not None
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    verdict, detail = cards.verify(found)
    assert verdict == "changed"
    assert str(path) in detail
    path.unlink()
    assert cards.verify(found)[0] == "missing"
    assert cards.find("cifar_resnet20", "d1") is None


def test_one_broken_card_does_not_hide_the_others() -> None:
    added = cards.add(STATE, card())
    (paths.home() / "zoo" / "broken.toml").write_text("name = ")
    with pytest.warns(UserWarning, match=r"broken\.toml"):
        found = cards.cards(shipped=False)
    assert [c.sha256 for c in found] == [added.sha256]


def test_shipped_cards_are_whole_and_bring_no_weights() -> None:
    shipped = {c.architecture: c for c in cards.cards(user=False)}
    assert {f"zoo:cifar_resnet{n}_a" for n in (20, 32, 44, 56)} <= shipped.keys()
    for found in shipped.values():
        assert len(found.sha256) == 64
        assert found.licence
        assert found.origin
        assert len(found.classes) == found.num_classes
        assert found.value is not None
    assert cards.verify(shipped["zoo:cifar_resnet20_a"])[0] == "missing"


def test_public_checkpoints_are_recognised_by_their_bytes(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "checkpoints" / "resnet20-12fca82f.th"
    renamed = tmp_path / "some.pth"
    renamed.write_bytes(source.read_bytes())
    found = cards.identify(renamed)
    assert found is not None
    assert (found.architecture, found.value, found.mean) == ("zoo:cifar_resnet20_a", 91.73, (0.485, 0.456, 0.406))
    renamed.write_bytes(source.read_bytes() + b"\0")
    assert cards.identify(renamed) is None
    assert cards.identify(tmp_path / "absent.pth") is None
