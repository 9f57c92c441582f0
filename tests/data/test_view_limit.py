"""data.views: a few views of every image, the same ones for every seed, so that a bank can hold their answers."""

import pytest
import torch

from kdcli.data import Stream, open_data
from kdcli.data.views import MAX, Views
from kdcli.errors import RecipeError
from kdcli.recipe import DataConfig

INDEX = torch.arange(3000)


@pytest.mark.parametrize("augment", ["imagenet", "cutout", "disk", "crop-flip"])
@pytest.mark.parametrize("limit", [1, 2, 8, 100])
def test_an_image_keeps_to_its_views_and_their_slot_is_the_remainder(augment: str, limit: int) -> None:
    views = Views(augment, 32, limit)
    assert (views.slots, views.count) == (limit, None)
    seen = torch.stack([views.draw(seed, epoch, INDEX) for seed in (0, 7) for epoch in range(30)])
    assert seen.min() >= 0
    for slot in range(limit):
        own = views.named(INDEX, torch.tensor(slot))
        assert (own % limit == slot).all()
        assert (torch.where(seen % limit == slot, seen, own) == own).all()  # every view drawn there is this one
    assert seen[:, 0].unique().numel() <= limit
    assert views.named(INDEX, torch.tensor(0)).unique().numel() == len(INDEX)  # each image has views of its own


def test_which_view_is_drawn_is_even_and_depends_on_seed_and_epoch() -> None:
    views = Views("imagenet", 224, 8)
    slots = views.draw(3, 5, torch.arange(80_000)) % 8
    assert (torch.bincount(slots) - 10_000).abs().max() < 500
    assert not views.draw(3, 5, INDEX).equal(views.draw(3, 6, INDEX))
    assert not views.draw(3, 5, INDEX).equal(views.draw(4, 5, INDEX))
    assert views.draw(3, 5, INDEX)[10:20].equal(views.draw(3, 5, INDEX[10:20]))


def test_the_largest_number_of_views_still_fits() -> None:
    limit = 2**31
    views = Views("imagenet", 224, limit)
    last = views.named(INDEX, torch.tensor(limit - 1))
    assert ((last >= 0) & (last <= MAX) & (last % limit == limit - 1)).all()


def test_countable_views_are_slots_already() -> None:
    views = Views("crop-flip", 32)
    assert views.slots == views.count == 162
    assert views.named(INDEX, torch.tensor(5)).equal(torch.full((3000,), 5))
    assert Views("imagenet", 224).slots is None
    assert Views("none", 8).slots == 1


@pytest.mark.parametrize(("augment", "size", "limit"), [("crop-flip", 32, 162), ("crop", 16, 25), ("none", 8, 1)])
def test_a_limit_that_leaves_out_nothing_is_refused(augment: str, size: int, limit: int) -> None:
    with pytest.raises(RecipeError, match=f"data.views = {limit}: {augment} at {size} pixels") as caught:
        Views(augment, size, limit)
    assert "Leave data.views out" in caught.value.hint


@pytest.mark.parametrize("augment", ["cutout", "disk", "imagenet", "crop-flip"])
def test_a_limited_stream_draws_what_it_names(npz, augment: str) -> None:
    data = open_data(DataConfig(name=f"npz:{npz(n=40, classes=4)}", augment=augment, views=3))
    assert data.views == 3
    seen: dict[int, dict[int, torch.Tensor]] = {}
    stream = Stream(data, 8, seed=1)
    for epoch in range(6):
        for batch in stream.epoch(epoch):
            assert batch.host is not None
            assert batch.host[0].equal(batch.index)
            assert batch.host[1].equal(batch.view)
            assert stream.again(batch.index, batch.view).equal(batch.images)
            for index, view, pixels in zip(batch.index.tolist(), batch.view.tolist(), batch.images, strict=True):
                assert seen.setdefault(index, {}).setdefault(view, pixels).equal(pixels)
    assert max(len(views) for views in seen.values()) == 3
    different = [views for views in seen.values() if len(views) > 1]
    assert any(not a.equal(b) for views in different for a, b in [[*views.values()][:2]])


def test_the_recipe_takes_views_of_one_or_more() -> None:
    assert DataConfig(views=1).views == 1
    with pytest.raises(ValueError, match="views"):
        DataConfig(views=0)


def test_a_batch_keeps_its_names_on_the_host(npz) -> None:
    data = open_data(DataConfig(name=f"npz:{npz(n=20, classes=4)}"))
    (plain, *_) = data.train.plain(6)
    index, view = plain.on_host()
    assert index.equal(torch.arange(6))
    assert view.equal(torch.full((6,), -1))
    assert plain.to("cpu").host is plain.host
    (first, *_) = Stream(data, 4, seed=0).epoch(0, start=2)
    rows = Stream(data, 4, seed=0).order(0)[8:12]
    assert first.on_host()[0].equal(data.train.index[rows])
    assert data.train.subset(torch.arange(3)).full == 20
