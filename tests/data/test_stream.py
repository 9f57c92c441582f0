"""The stream: same seed, same batches; any batch and any view can be had again."""

import numpy as np
import pytest
import torch

from kdcli.data import AUGMENTS, Stream, open_data
from kdcli.errors import RecipeError
from kdcli.recipe import DataConfig


@pytest.fixture
def data(npz):
    return open_data(DataConfig(name=f"npz:{npz(n=50, classes=5)}"))


def same(a, b):
    return all(getattr(a, k).equal(getattr(b, k)) for k in ("images", "target", "index", "view"))


def test_an_epoch_is_a_permutation_with_its_targets(data):
    stream = Stream(data, 16, seed=3)
    batches = list(stream.epoch(2))
    assert len(batches) == len(stream) == 4
    assert [len(b) for b in batches] == [16, 16, 16, 2]
    index = torch.cat([b.index for b in batches])
    assert index.equal(stream.order(2))
    assert index.sort().values.equal(torch.arange(50))
    assert torch.cat([b.target for b in batches]).equal(data.train.targets[index])
    assert batches[0].images.dtype == torch.float32
    assert 0 <= batches[0].images.min() <= batches[0].images.max() <= 1
    assert batches[0].target.dtype == batches[0].index.dtype == batches[0].view.dtype == torch.int64


def test_same_seed_same_stream_other_seed_another(data):
    one, two, other = (Stream(data, 16, seed=s) for s in (7, 7, 8))
    torch.manual_seed(1)
    first = list(one.epoch(1))
    torch.manual_seed(2)
    assert all(same(a, b) for a, b in zip(first, two.epoch(1), strict=True))
    assert not first[0].index.equal(next(other.epoch(1)).index)
    assert not first[0].index.equal(next(one.epoch(0)).index)


@pytest.mark.parametrize("mix", [{}, {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}])
def test_resume_yields_the_rest_of_the_epoch(data, mix):
    stream = Stream(data, 8, seed=0, **mix)
    whole = list(stream.epoch(4))
    for start in range(len(stream) + 1):
        rest = list(Stream(data, 8, seed=0, **mix).epoch(4, start))
        assert len(rest) == len(whole) - start
        assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


@pytest.mark.parametrize("augment", AUGMENTS)
def test_again_is_what_the_epoch_yielded(npz, augment):
    data = open_data(DataConfig(name=f"npz:{npz()}", augment=augment))
    assert data.augment == augment
    stream = Stream(data, 16, seed=1)
    for batch in stream.epoch(5):
        assert stream.again(batch.index, batch.view).equal(batch.images)
        if data.views is not None:
            assert batch.view.max() < data.views
    few = batch.index[:3], batch.view[:3]
    assert stream.again(*few).equal(batch.images[:3])


def test_a_subset_keeps_its_samples_views(npz):
    path = npz(n=80)
    whole, part = (open_data(DataConfig(name=f"npz:{path}", per_class=n)) for n in (None, 5))
    assert (len(whole.train), len(part.train)) == (80, 20)
    named = {}
    for batch in Stream(whole, 16, seed=0).epoch(1):
        named |= dict(zip(batch.index.tolist(), zip(batch.view.tolist(), batch.images, strict=True), strict=True))
    for batch in Stream(part, 10, seed=0).epoch(1):
        for index, view, pixels in zip(batch.index.tolist(), batch.view.tolist(), batch.images, strict=True):
            assert view == named[index][0]
            assert pixels.equal(named[index][1])


def test_drop_last(data):
    assert [len(b) for b in Stream(data, 16, seed=0, drop_last=True).epoch(0)] == [16, 16, 16]


def test_a_batch_larger_than_the_data_is_refused(data):
    assert len(Stream(data, 50, seed=0)) == 1
    for drop_last in (False, True):
        with pytest.raises(RecipeError, match=r"51.*50 images") as error:
            Stream(data, 51, seed=0, drop_last=drop_last)
        assert "--set train.batch_size=" in error.value.hint


def test_mixing_pairs_images_and_leaves_numpy_alone(npz):
    data = open_data(DataConfig(name=f"npz:{npz(n=35, classes=5)}", augment="none"))
    stream = Stream(data, 8, seed=0, mixup=1.0, label_smoothing=0.1)
    assert len(stream) == 4  # 35 = 4 * 8 + 3: the odd last batch is dropped
    np.random.seed(5)
    before = np.random.get_state(legacy=False)["state"]["key"].copy()
    batches = list(stream.epoch(0))
    assert (np.random.get_state(legacy=False)["state"]["key"] == before).all()
    assert len(batches) == 4
    batch = batches[0]
    assert batch.target.shape == (8, 5)
    torch.testing.assert_close(batch.target.sum(1), torch.ones(8))
    plain = stream.again(batch.index, batch.view)
    labels = torch.nn.functional.one_hot(data.train.targets[batch.index], 5).float() * 0.9 + 0.02
    share = ((batch.images - plain.flip(0)) / (plain - plain.flip(0))).nanmedian()  # lambda, read off the pixels
    torch.testing.assert_close(batch.images, plain * share + plain.flip(0) * (1 - share), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(batch.target, labels * share + labels.flip(0) * (1 - share), atol=1e-5, rtol=1e-4)
    with pytest.raises(RecipeError, match="must be even"):
        Stream(data, 7, seed=0, cutmix=1.0)


def test_smoothing_is_not_the_streams_business_without_mixing(data):
    assert next(Stream(data, 16, seed=0, label_smoothing=0.1).epoch(0)).target.dtype == torch.int64


def test_batch_moves(data):
    batch = next(Stream(data, 16, seed=0).epoch(0)).to("meta")
    assert {batch.images.device.type, batch.target.device.type, batch.index.device.type} == {"meta"}


@pytest.mark.gpu
def test_cuda_stream_is_the_cpu_stream(npz):
    config = DataConfig(name=f"npz:{npz(n=64)}")
    here, there = open_data(config), open_data(config, device="cuda")
    for a, b in zip(Stream(here, 16, seed=0).epoch(1), Stream(there, 16, seed=0, device="cuda").epoch(1), strict=True):
        assert b.images.is_cuda
        assert same(a, b.to("cpu"))
