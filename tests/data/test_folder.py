"""Folders of images: real ImageNet images, odd files, bad files."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from kdcli.data import AUGMENTS, Stream, available, open_data
from kdcli.data.dataset import Pixels
from kdcli.data.workers import Files
from kdcli.errors import DataError, KdcliError
from kdcli.recipe import DataConfig


def opened(path, kind="folder", **keys):
    settings: dict[str, Any] = {"workers": 0, "image_size": 32} | keys
    return open_data(DataConfig(name=f"{kind}:{path}", **settings))


def refused(path, kind="folder", **keys) -> KdcliError:
    with pytest.raises(DataError) as error:
        opened(path, kind, **keys)
    assert error.value.exit_code == 3
    assert error.value.hint
    return error.value


def same(a, b):
    return all(getattr(a, k).equal(getattr(b, k)) for k in ("images", "target", "index", "view"))


# --- real images


@pytest.fixture(scope="session")
def imagenette(shared):
    return shared / "data" / "imagenette_subset"


def test_imagenet_real(imagenette):
    data = open_data(DataConfig(name=f"imagenet:{imagenette}", workers=0))
    assert (len(data.train), len(data.test), data.image_size, data.augment) == (1500, 500, (224, 224), "imagenet")
    assert data.wnids is not None
    assert data.wnids[0] == "n01440764"
    assert data.classes[:4] == ["tench", "English springer", "cassette player", "chain saw"]
    assert data.mean == (0.485, 0.456, 0.406)
    assert data.views is None
    assert {"data.image_size", "data.hash", "data.augment"} <= {key for key, _, _ in data.notes}
    path = next(iter(sorted((imagenette / "val" / "n01440764").iterdir())))
    image = v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))
    assert data.test.take(1)[0].mul(255).round().byte().equal(v2.CenterCrop(224)(v2.Resize(256)(image)))
    batch = next(Stream(data, 8, seed=0).epoch(0))
    assert batch.images.shape == (8, 3, 224, 224)
    assert Stream(data, 8, seed=0).again(batch.index, batch.view).equal(batch.images)


def test_bare_imagenet_is_looked_for_in_the_data_root(imagenette, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no folder") as error:
        open_data(DataConfig(name="imagenet", root=str(tmp_path)))
    for word in ("train/<class>", "val/<class>", "imagenet:DIR", "--data-root", "KDCLI_DATA", str(tmp_path)):
        assert word in error.value.hint
    monkeypatch.setattr("kdcli.data.folder.why_broken", lambda part, row: None)
    monkeypatch.setenv("KDCLI_DATA", str(imagenette))
    itself = open_data(DataConfig(name="imagenet"))
    (tmp_path / "imagenet").symlink_to(imagenette)
    under = open_data(DataConfig(name="imagenet", root=str(tmp_path)))
    assert itself.hash == under.hash
    row = next(r for r in available(str(tmp_path)) if r["name"] == "imagenet")
    assert (row["images"], row["classes"], row["present"]) == (2000, 10, True)


# --- made-up ones


@pytest.mark.parametrize("augment", [a for a in AUGMENTS if a != "imagenet"])
def test_kept_in_memory_or_streamed_the_pixels_are_the_same(folder, augment, monkeypatch):
    path = folder(n=6)
    kept = opened(path, augment=augment)
    monkeypatch.setattr("kdcli.data.opening.CACHE_BYTES", 0)
    streamed = opened(path, augment=augment)
    assert isinstance(kept.train.store, Pixels)
    assert isinstance(streamed.train.store, Files)
    for a, b in zip(Stream(kept, 4, seed=0).epoch(1), Stream(streamed, 4, seed=0).epoch(1), strict=True):
        assert same(a, b)
    assert kept.test.take(3).equal(streamed.test.take(3))
    assert (kept.mean, kept.std) == (streamed.mean, streamed.std)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(40, 30), (7, 90)])
def test_any_image_arrives_square_and_in_colour(folder, mode, size):
    data = opened(folder(mode=mode, size=size), image_size=48)
    assert data.train.take(2).shape == (2, 3, 48, 48)
    assert next(Stream(data, 4, seed=0).epoch(0)).images.shape == (4, 3, 48, 48)
    assert data.wnids is None
    assert data.classes == ["ant", "bee"]
    assert data.mean == pytest.approx((0.5, 0.5, 0.5), abs=0.05)  # noise; measured


def test_one_folder_is_split_by_name(folder):
    path = folder(parts=("",), n=20)
    data = opened(path)
    assert (len(data.train), len(data.test)) == (32, 8)
    assert torch.bincount(data.test.targets).tolist() == [4, 4]
    assert any("8 of 40 images" in why for _, _, why in data.notes)
    again = opened(path)
    assert again.hash == data.hash
    assert again.test.take(8).equal(data.test.take(8))
    store = opened(path, augment="imagenet").train.store
    assert isinstance(store, Files)
    files = [set(p.files.tolist()) for p in store.readers.decoder.parts]  # pyright: ignore
    assert not files[0] & files[1]
    assert len(files[0] | files[1]) == 40


def test_test_folder_serves_when_there_is_no_val(folder):
    assert len(opened(folder(parts=("train", "test"))).test) == 12
    both = opened(folder(parts=("train", "val", "test"), root="both"))
    assert any("test/ is not read" in why for _, _, why in both.notes)


def test_val_may_lack_a_class(folder):
    path = folder(classes=("ant", "bee", "cow"))
    for file in (path / "val" / "ant").iterdir():
        file.unlink()
    (path / "val" / "ant").rmdir()
    assert torch.bincount(opened(path).test.targets, minlength=3).tolist() == [0, 6, 6]


def test_holdout_and_per_class_of_a_folder(folder):
    data = opened(folder(n=10), holdout=0.2, per_class=3)
    assert data.holdout is not None
    assert (len(data.train), len(data.holdout)) == (6, 4)
    assert next(data.holdout.plain(4)).view.tolist() == [-1] * 4


def test_hash_sees_names_and_sizes(folder):
    path = folder()
    before = opened(path).hash
    file = path / "train" / "ant" / "ant0.png"
    file.rename(file.with_name("other.png"))
    assert opened(path).hash != before


# --- bad ones


def spoil(path):
    """Two files that do not decode: one cut short, one that never was an image. 24 bytes of the first remain good."""
    good = np.zeros((60, 60, 3), np.uint8)
    cut, text = path / "train" / "ant" / "cut.jpg", path / "train" / "bee" / "words.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, good.shape, dtype=np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-700])
    text.write_text("not an image")
    return cut, text


def test_corrupt_files_are_named_and_counted(folder):
    path = folder()
    cut, text = spoil(path)
    error = refused(path)
    assert error.message.startswith("2 image files do not decode")
    assert str(cut) in error.message
    assert str(text) in error.message
    assert "--skip-corrupt" in error.hint


def test_corrupt_files_can_be_skipped(folder):
    path = folder()
    whole = opened(path)
    cut, text = spoil(path)
    data = opened(path, skip_corrupt=True)
    assert data.skipped == [str(cut), str(text)]
    assert len(data.train) == 12
    assert data.train.take(12).equal(whole.train.take(12))


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_large_folder_a_corrupt_file_stops_at_first_touch(folder, workers, monkeypatch):
    path = folder()
    cut, _ = spoil(path)
    monkeypatch.setattr("kdcli.data.folder.QUICK_CHECK", 3)
    monkeypatch.setattr("kdcli.data.opening.SAMPLE", 2)
    data = opened(path, workers=workers, image_size=72)
    with pytest.raises(DataError, match="not decode") as error:
        list(data.train.plain(7))
    assert str(cut) in error.value.message
    assert "Traceback" not in error.value.message


def test_layout_faults(folder, tmp_path):
    assert "no folder" in refused(tmp_path / "none").message
    (tmp_path / "empty").mkdir()
    assert "no image files" in refused(tmp_path / "empty").message
    assert "no train/" in refused(tmp_path / "empty", "imagenet").message
    assert "no val/" in refused(folder(parts=("train",), root="a")).message
    assert "only one class (ant)" in refused(folder(classes=("ant",), root="b")).message
    assert "only one class (ant)" in refused(folder(parts=("",), classes=("ant",), root="c")).message
    assert "one image" in refused(folder(parts=("",), n=1, root="d")).message
    path = folder(root="e")
    (path / "train" / "cow").mkdir()
    assert "1 of 3 classes have no training images: cow" in refused(path).message
    path = folder(root="f")
    (path / "val" / "cow").mkdir()
    assert "not in train/: cow" in refused(path).message
    path = folder(root="g")
    for name in ("ant", "bee"):
        for file in (path / "val" / name).iterdir():
            file.unlink()
    assert "no image files in class folders of val/" in refused(path).message


def test_no_permission(folder, monkeypatch):
    path = folder()
    real = os.scandir

    def guarded(where):
        if str(where).endswith("bee"):
            raise PermissionError(13, "Permission denied")
        return real(where)

    monkeypatch.setattr(os, "scandir", guarded)
    error = refused(path)
    assert "Permission denied" in error.message
    assert "chmod" in error.hint
