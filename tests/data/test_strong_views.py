"""Strong views: a second reading of every image, named by its view, the same whoever draws it."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from kdcli.data import AUGMENTS, Batch, Stream, open_data
from kdcli.data.dataset import Pixels
from kdcli.data.folder import read
from kdcli.data.views import Views
from kdcli.data.workers import Files, Readers
from kdcli.errors import RecipeError
from kdcli.recipe import DataConfig
from kdcli.system import distributed, shards


@pytest.fixture
def data(npz):
    return open_data(DataConfig(name=f"npz:{npz(n=50, classes=5)}"))


def strong_of(batches: list[Batch]) -> torch.Tensor:
    found = [batch.strong for batch in batches]
    assert all(one is not None for one in found)
    return torch.cat(found)  # pyright: ignore


@pytest.mark.parametrize("augment", AUGMENTS)
def test_a_second_view_beside_the_same_first_one(npz, augment):
    data = open_data(DataConfig(name=f"npz:{npz()}", augment=augment))
    plain, both = Stream(data, 16, seed=1), Stream(data, 16, seed=1, strong=True)
    for one, two in zip(plain.epoch(2), both.epoch(2), strict=True):
        assert one.strong is None
        assert all(getattr(one, k).equal(getattr(two, k)) for k in ("images", "target", "index", "view"))
        assert two.strong is not None
        assert two.strong.shape == two.images.shape
        assert two.strong.dtype == torch.float32
        assert 0 <= two.strong.min() <= two.strong.max() <= 1
        changed = (two.strong != two.images).flatten(1).any(1)
        assert changed.float().mean() > 0.8  # an identity may be drawn, rarely
        again = data.train.store.strong().batches(two.index, Views.named_strong(two.index, two.view), 40, "cpu")
        assert next(again).equal(two.strong)


def test_a_strong_view_is_its_names_alone(data):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = strong_of(list(Stream(data, 16, seed=7, strong=True).epoch(1)))
    assert torch.get_rng_state().equal(before)  # drawn without the training's generator
    torch.manual_seed(2)
    second = strong_of(list(Stream(data, 10, seed=7, strong=True).epoch(1)))
    assert first.equal(second)  # whatever batch it is in
    assert not first.equal(strong_of(list(Stream(data, 16, seed=8, strong=True).epoch(1))))
    whole = list(Stream(data, 8, seed=0, strong=True).epoch(4))
    rest = list(Stream(data, 8, seed=0, strong=True).epoch(4, 3))
    assert strong_of(whole[3:]).equal(strong_of(rest))


def test_the_same_view_of_two_samples_is_strong_in_two_ways():
    index, view = torch.arange(60), torch.zeros(60, dtype=torch.int64)
    names = Views.named_strong(index, view)
    assert len(names.unique()) == 60
    assert names.min() >= 0
    assert not Views.named_strong(index, view + 1).equal(names)
    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn = Views("crop-flip", 32).strong().apply(image.expand(60, -1, -1, -1), names)
    assert len(drawn.flatten(1).unique(dim=0)) > 50


def test_it_is_the_presets_crop_and_flip_then_randaugment():
    image = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = Views.named_strong(torch.arange(12), torch.arange(12))
    views = Views("disk", 32).strong()
    assert (views.preset.crop, views.preset.flip, views.preset.cutout) == (True, True, True)
    assert (views.preset.auto, views.count, views.slots) == (False, None, None)  # AutoAugment gives way to RandAugment
    flipped = Views("flip", 32).strong()
    drawn = flipped.apply(image, names)
    by_hand = []
    for one, name in zip(image, names, strict=True):
        place = Views("flip", 32, 1)._place(name[None])[2]  # the flip that a hash of this name draws
        torch.manual_seed(int(name))
        by_hand.append(v2.RandAugment(2, 10)(one.flip(-1) if place[0] else one))
    assert drawn.equal(torch.stack(by_hand))


@pytest.mark.parametrize("augment", ["crop-flip", "imagenet", "disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_readers_of_files_draw_what_memory_holds(folder, augment, workers):
    root = folder(n=12, size=(36, 36))
    config = DataConfig(name=f"folder:{root}", augment=augment, image_size=32, workers=workers)
    data = open_data(config)
    store = data.train.store
    files = store if isinstance(store, Files) else None
    if files is None:  # small enough to be kept in memory: read it as files all the same
        listed = read(config, [])
        files = Files(Readers((listed.train, listed.test), Views(augment, 32), workers), 0)
    index = torch.arange(24)
    names = Views.named_strong(index, files.views.draw(0, 0, index))
    drawn = torch.cat(list(files.strong().batches(index, names, 10, "cpu")))
    alone = torch.cat([next(files.strong().batches(index[n : n + 1], names[n : n + 1], 1, "cpu")) for n in range(24)])
    assert drawn.equal(alone)
    if augment != "imagenet":
        assert isinstance(store, Pixels)
        assert drawn.equal(next(store.strong().batches(index, names, 24, "cpu")))
    assert not drawn.equal(torch.cat(list(files.batches(index, files.views.draw(0, 0, index), 24, "cpu"))))


def test_floating_point_images_are_refused(npz):
    pixels = np.random.default_rng(0).random((40, 32, 32, 3), dtype=np.float32)
    data = open_data(DataConfig(name=f"npz:{npz(train_images=pixels)}"))
    assert len(Stream(data, 8, seed=0)) == 5
    with pytest.raises(RecipeError, match=r"strong views .* 8-bit") as caught:
        Stream(data, 8, seed=0, strong=True)
    assert "uint8" in caught.value.hint


@pytest.mark.parametrize("mix", [{"mixup": 0.2}, {"cutmix": 1.0}])
def test_mixed_images_are_refused(data, mix):
    with pytest.raises(RecipeError, match="second, strong view") as caught:
        Stream(data, 8, seed=0, strong=True, **mix)
    assert "train.mixup=0" in caught.value.hint


def test_micro_batches_and_devices_keep_it(data):
    batch = next(Stream(data, 10, seed=0, strong=True).epoch(0))
    assert batch.strong is not None
    part = batch.micro(4, 8)
    assert part.strong is not None
    assert part.strong.equal(batch.strong[4:8])
    moved = batch.to("cpu")
    assert moved.strong is not None
    assert moved.strong.equal(batch.strong)
    bare = next(Stream(data, 10, seed=0).epoch(0))
    assert bare.micro(4, 8).strong is None
    assert bare.to("cpu").strong is None


def test_each_rank_draws_its_own_rows(data, monkeypatch):
    alone = list(Stream(data, 14, seed=3, strong=True).epoch(1))
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "alone", lambda: False)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shards.layout.cache_clear()
        for own, batch in zip(Stream(data, 14, seed=3, strong=True).epoch(1), alone, strict=True):
            rows = [batch.index.tolist().index(i) for i in own.index.tolist()]
            assert own.strong is not None
            assert batch.strong is not None
            assert own.strong.equal(batch.strong[rows])
            part = own.micro(0, 6)
            assert part.strong is not None
            assert part.strong.equal(own.strong[: len(part.index)])
    shards.layout.cache_clear()
