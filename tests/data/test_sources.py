"""Data sets held as arrays: digits, CIFAR, .npz; what is chosen for the user, and how bad input is refused."""

import hashlib
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torchvision.datasets

from kdcli.data import Stream, available, open_data
from kdcli.data.dataset import Pixels
from kdcli.data.split import stratified
from kdcli.errors import DataError, KdcliError, RecipeError
from kdcli.recipe import DataConfig


def opened(path, **keys):
    return open_data(DataConfig(name=f"npz:{path}", **keys))


def refused(path, kind: type[KdcliError] = DataError, **keys) -> KdcliError:
    with pytest.raises(kind) as error:
        opened(path, **keys)
    assert error.value.hint
    assert error.value.exit_code == (3 if kind is DataError else 2)
    return error.value


# --- digits


def test_digits_are_1437_and_360_and_balanced():
    data = open_data(DataConfig(name="digits"))
    assert (len(data.train), len(data.test), data.image_size, data.augment, data.views) == (
        1437,
        360,
        (16, 16),
        "crop",
        25,
    )
    assert data.classes == [str(n) for n in range(10)]
    assert torch.bincount(data.test.targets).min() >= 35
    share = torch.bincount(data.test.targets) / (torch.bincount(data.train.targets) + torch.bincount(data.test.targets))
    assert (share - 360 / 1797).abs().max() < 0.005
    assert {key for key, _, _ in data.notes} == {"data.augment", "data.image_size"}
    assert data.hash == open_data(DataConfig(name="digits", image_size=32, per_class=3, holdout=0.1)).hash


def test_digits_pixels_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = open_data(DataConfig(name="digits", image_size=8))
    ours = torch.cat([b.images[:, 0] for split in (data.train, data.test) for b in split.plain(500)])
    theirs = torch.tensor(load_digits(return_X_y=True)[0] / 16).float().view(-1, 8, 8)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.sum((1, 2)).sort().values, theirs.sum((1, 2)).sort().values, atol=0.1, rtol=0)
    assert data.mean[0] == pytest.approx(theirs.mean().item(), abs=0.01)
    assert data.mean[0] == data.mean[1] == data.mean[2]


def test_plain_and_take():
    data = open_data(DataConfig(name="digits"))
    batches = list(data.test.plain(100))
    assert [len(b) for b in batches] == [100, 100, 100, 60]
    assert torch.cat([b.index for b in batches]).equal(torch.arange(360))
    assert torch.cat([b.target for b in batches]).equal(data.test.targets)
    assert {v for b in batches for v in b.view.tolist()} == {-1}
    some = data.test.take(64)
    assert some.shape == (64, 3, 16, 16)
    assert some[32].equal(batches[1].images[80])  # 32 * 360 / 64 = 180
    assert len(data.test.take(10_000)) == 360


# --- splitting


def test_stratified_adds_up_and_is_fixed():
    labels = np.repeat([0, 1, 2], [50, 30, 17])
    rows = stratified(labels, total=20, seed=0)
    assert len(rows) == len(set(rows)) == 20
    assert np.bincount(labels[rows]).tolist() == [10, 6, 4]
    assert (rows == stratified(labels, total=20, seed=0)).all()


def test_holdout_is_stratified_and_apart(npz):
    path = npz(n=200, classes=4)
    data = opened(path, holdout=0.1)
    assert data.holdout is not None
    assert (len(data.train), len(data.holdout)) == (180, 20)
    assert torch.bincount(data.holdout.targets).tolist() == [5] * 4
    assert torch.cat([data.train.index, data.holdout.index]).sort().values.equal(torch.arange(200))
    same, other = (opened(path, holdout=0.1, **keys).holdout for keys in ({"augment": "none"}, {"seed": 1}))
    assert same is not None
    assert other is not None
    assert data.holdout.index.equal(same.index)
    assert not data.holdout.index.equal(other.index)
    full = opened(path)
    assert data.hash == full.hash
    batch = next(data.holdout.plain(20))
    with np.load(path) as file:
        assert (batch.images * 255).round().byte().numpy().transpose(0, 2, 3, 1).tolist() == (
            file["train_images"][batch.index.numpy()].tolist()
        )
        assert batch.target.numpy().tolist() == file["train_labels"][batch.index.numpy()].tolist()


def test_holdout_that_leaves_nothing_is_refused(npz):
    error = refused(npz(n=8, classes=4), RecipeError, holdout=0.8)
    assert "nothing to train on" in error.message
    assert "data.holdout=" in error.hint


def test_per_class_is_balanced_after_the_holdout(npz):
    data = opened(npz(n=200, classes=4), holdout=0.1, per_class=7)
    assert data.holdout is not None
    assert torch.bincount(data.train.targets).tolist() == [7] * 4
    assert not set(data.train.index.tolist()) & set(data.holdout.index.tolist())
    error = refused(npz(n=200, classes=4), RecipeError, per_class=51)
    assert "only 50" in error.message
    assert "data.per_class=50" in error.hint


# --- npz


def test_npz_real_images(cifar_npz):
    data = opened(cifar_npz)
    assert (len(data.train), len(data.test), data.image_size, data.augment, data.views) == (
        5000,
        5000,
        (32, 32),
        "crop-flip",
        162,
    )
    assert data.classes[:3] == ["airplane", "automobile", "bird"]
    np.testing.assert_allclose(data.mean, (0.4914, 0.4822, 0.4465), atol=0.01)  # the full set's, published
    np.testing.assert_allclose(data.std, (0.2470, 0.2435, 0.2616), atol=0.01)
    with np.load(cifar_npz) as file:
        last = list(data.test.plain(999))[-1]
        assert ((last.images * 255).round().byte().permute(0, 2, 3, 1).numpy() == file["test_images"][-5:]).all()
    assert len(Stream(data, 64, seed=0)) == 79


def test_npz_layouts_arrive_alike(npz):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(40) % 4
    plain = opened(npz("a.npz", train_images=images))
    moved = opened(
        npz("b.npz", train_images=images.transpose(0, 3, 1, 2), train_labels=labels[:, None].astype(np.uint8))
    )
    assert plain.train.take(40).equal(moved.train.take(40))
    assert plain.train.targets.equal(moved.train.targets)
    assert plain.hash == moved.hash
    wide = opened(npz("c.npz", train_images=images.astype(np.int64), train_labels=labels.astype(float)))
    assert wide.hash == plain.hash
    images[0, 0, 0, 0] ^= 1
    assert opened(npz("d.npz", train_images=images)).hash != plain.hash


def test_npz_grey_and_odd_sizes(npz):
    grey = np.random.default_rng(0).integers(0, 256, (40, 5, 7), dtype=np.uint8)
    data = opened(npz(train_images=grey, test_images=grey[:20, :, :, None]))
    assert data.image_size == (8, 8)
    x = data.train.take(4)
    assert x.shape == (4, 3, 8, 8)
    assert x[:, 0].equal(x[:, 1])
    assert x[:, 0].equal(x[:, 2])
    assert data.test.take(4).shape == (4, 3, 8, 8)
    assert opened(npz(train_images=grey), image_size=20).train.take(1).shape == (1, 3, 20, 20)


def test_npz_float_is_stored_as_it_is(npz):
    distilled = np.random.default_rng(0).normal(0, 2, (40, 16, 16, 3)).astype(np.float32)
    data = opened(npz(train_images=distilled, size=16), augment="none")
    batch = next(Stream(data, 40, seed=0).epoch(0))
    assert (batch.images.permute(0, 2, 3, 1).numpy() == distilled[batch.index.numpy()]).all()
    np.testing.assert_allclose(data.std, (2, 2, 2), atol=0.1)
    error = refused(npz(train_images=distilled, size=16), RecipeError, augment="disk")
    assert "8-bit" in error.message


def test_constant_channel_has_a_floor(npz):
    data = opened(npz(train_images=np.full((40, 8, 8), 255, np.uint8)))
    assert data.mean == (1.0, 1.0, 1.0)
    assert data.std == (0.01, 0.01, 0.01)


def test_val_is_test_when_there_is_none_and_holdout_when_asked(npz):
    val = {"val_images": np.zeros((12, 32, 32, 3), np.uint8), "val_labels": np.arange(12) % 4}
    data = opened(npz(test_images=None, test_labels=None, **val))
    assert len(data.test) == 12
    assert data.holdout is None
    assert any("no test part" in why for _, _, why in data.notes)
    data = opened(npz(**val), holdout=0.2)
    assert data.holdout is not None
    assert (len(data.train), len(data.holdout), len(data.test)) == (40, 12, 20)
    data = opened(npz(test_images=None, test_labels=None, **val), holdout=0.2)
    assert data.holdout is not None
    assert (len(data.train), len(data.holdout), len(data.test)) == (32, 8, 12)  # val is taken: train gives the slice


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_labels": None}, "train_images without train_labels"),
        ({"train_images": None}, "no train_images"),
        ({"test_images": None, "test_labels": None}, "no test_images"),
        ({"train_labels": np.arange(39) % 4}, "40 train_images but 39 train_labels"),
        ({"train_labels": np.arange(40) % 4 - 1}, "holds -1, outside 0..2"),
        ({"test_labels": np.arange(20) % 5}, "holds 4, outside 0..3"),
        ({"class_names": np.array(["a", "b", "c"])}, "outside 0..2 (3 class_names)"),
        ({"class_names": np.array(list("abcde"))}, "1 of 5 classes have no training images: e"),
        ({"train_labels": np.arange(40) % 4 + 1, "test_labels": np.arange(20) % 4 + 1}, "no training images: 0"),
        ({"train_labels": np.zeros(40, int), "test_labels": np.zeros(20, int)}, "only one class"),
        ({"train_labels": np.eye(4)[np.arange(40) % 4] * 0.9}, "allowed: class numbers [N]"),
        ({"train_images": np.zeros((40, 32, 32, 4), np.uint8)}, "(40, 32, 32, 4)"),
        ({"train_images": np.full((40, 8, 8), 256)}, "beyond 0..255"),
        ({"train_images": np.full((40, 8, 8), np.nan)}, "holds NaN or infinity"),
        ({"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.zeros(0, int)}, "is empty"),
        ({"class_names": np.array(["a", None], dtype=object)}, "cannot be read as arrays of numbers"),
    ],
)
def test_npz_faults_are_named(npz, change, said):
    path = npz(**change)
    error = refused(path)
    assert said in error.message
    assert str(path) in error.message


def test_npz_missing_truncated_foreign(npz, tmp_path):
    assert "no such file" in refused(tmp_path / "none.npz").message
    path = npz()
    path.write_bytes(path.read_bytes()[:-3000])
    assert "truncated" in refused(path).message
    path.write_text("hello")
    assert str(path) in refused(path).message
    np.save(tmp_path / "one.npy", np.zeros(3))
    assert "a single array" in refused(tmp_path / "one.npy").message


def test_npz_is_found_in_the_data_root(npz, monkeypatch):
    path = npz("mine.npz")
    assert len(open_data(DataConfig(name="npz:mine.npz", root=str(path.parent))).train) == 40
    monkeypatch.setenv("KDCLI_DATA", str(path.parent))
    assert open_data(DataConfig(name="npz:mine.npz")).name == "npz:mine.npz"
    row = next(r for r in available() if r["name"] == "npz:mine.npz")
    assert (row["images"], row["classes"], row["present"]) == (60, 4, True)


# --- names


@pytest.mark.parametrize(("name", "near"), [("cifar-100", "cifar100"), ("digit", "digits"), ("pets", "folder:DIR")])
def test_unknown_name(name, near):
    with pytest.raises(RecipeError, match="no such data set") as error:
        open_data(DataConfig(name=name))
    assert near in error.value.hint


@pytest.mark.parametrize("name", [None, "npz", "folder:", "digits:here"])
def test_incomplete_names(name):
    with pytest.raises(RecipeError) as error:
        open_data(DataConfig(name=name))
    assert error.value.hint


# --- CIFAR


@pytest.fixture
def tiny_cifar(monkeypatch, tmp_path):
    """CIFAR-100's own file layout with 200 + 100 images, and checksums to match; returns the root."""
    rng = np.random.default_rng(0)
    base = tmp_path / "cifar-100-python"
    base.mkdir()
    sums = {}
    files = {
        "train": {
            "data": rng.integers(0, 256, (200, 3072), dtype=np.uint8),
            "fine_labels": [n % 100 for n in range(200)],
        },
        "test": {"data": rng.integers(0, 256, (100, 3072), dtype=np.uint8), "fine_labels": list(range(100))},
        "meta": {"fine_label_names": [f"thing{n}" for n in range(100)]},
    }
    for name, content in files.items():
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    kind = torchvision.datasets.CIFAR100
    monkeypatch.setattr(kind, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]})
    with tarfile.open(tmp_path / kind.filename, "w:gz") as archive:
        archive.add(base, "cifar-100-python")
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((tmp_path / kind.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "url", (tmp_path / "nowhere" / "file").as_uri())
    return tmp_path


@pytest.mark.parametrize(
    ("augment", "home"),
    [("crop-flip", "meta"), ("cutout", "meta"), ("none", "meta"), ("disk", "cpu"), ("imagenet", "cpu")],
)
def test_no_batch_reads_from_the_device(tiny_cifar, augment, home):
    """The meta device holds no values: whoever reads one back raises. Presets that must, draw on the host."""
    data = open_data(DataConfig(name="cifar100", root=str(tiny_cifar), augment=augment), device="meta")
    for split in (data.train, data.test):
        assert isinstance(split.store, Pixels)
        assert split.store.pixels.device.type == home
    for batch in (*Stream(data, 64, seed=0, device="meta").epoch(0), *data.test.plain(64, "meta")):
        assert {x.device.type for x in (batch.images, batch.target, batch.index, batch.view)} == {"meta"}
        assert batch.images.dtype == torch.float32


def test_cifar_through_torchvision(tiny_cifar):
    config = DataConfig(name="cifar100", root=str(tiny_cifar))
    data = open_data(config)
    assert (len(data.train), len(data.test), data.image_size, data.views) == (200, 100, (32, 32), 162)
    assert data.classes[99] == "thing99"
    assert (data.mean, data.std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    raw = pickle.loads((tiny_cifar / "cifar-100-python" / "test").read_bytes())["data"].reshape(-1, 3, 32, 32)
    assert (next(data.test.plain(100)).images * 255).round().byte().numpy().tolist() == raw.tolist()
    assert next(r for r in available(str(tiny_cifar)) if r["name"] == "cifar100")["present"]


def test_cifar_archive_is_unpacked_where_it_was_put(tiny_cifar):
    for file in (tiny_cifar / "cifar-100-python").iterdir():
        file.unlink()
    assert len(open_data(DataConfig(name="cifar100", root=str(tiny_cifar))).train) == 200


def test_cifar_without_network_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", (tmp_path / "nowhere" / "file").as_uri())
    with pytest.raises(DataError, match=r"downloading .* failed") as error:
        open_data(DataConfig(name="cifar10", root=str(tmp_path / "root")))
    assert error.value.exit_code == 3
    assert str(tmp_path / "root") in error.value.hint
    assert "cifar-10-python.tar.gz" in error.value.hint


def test_available_without_a_root(tmp_path):
    rows = {row["name"]: row for row in available(str(tmp_path / "none"))}
    assert rows["digits"]["present"]
    assert not any(rows[name]["present"] for name in ("cifar10", "cifar100", "imagenet"))
