"""Views: named by integers, drawn again to the bit, right in what they do to pixels."""

import random

import pytest
import torch
import torch.nn.functional as F

from kdcli.data.views import AUGMENTS, Views, hashed, lot, number, preset
from kdcli.errors import RecipeError


def images(n=12, size=32, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def reference_hash(*parts):
    """SplitMix64 over Python's unbounded integers."""
    mask, out = 2**64 - 1, 0
    for part in parts:
        x = (out + part + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        out = x ^ (x >> 31)
    return out & (2**63 - 1)


def test_hash_is_splitmix64():
    rng = random.Random(0)
    for _ in range(50):
        a, b, c = rng.randrange(2**63), rng.randrange(1000), rng.randrange(10**6)
        assert hashed(a, b, torch.tensor([c])).item() == reference_hash(a, b, c)
    assert number(3, 4) == reference_hash(3, 4) != number(4, 3)


def test_lots_are_uniform():
    view = hashed(0, 0, torch.arange(90_000))
    for which in range(5):
        counts = torch.bincount(lot(view, which, 9), minlength=9)
        assert counts.sum() == 90_000
        assert (counts - 10_000).abs().max() < 500  # five standard deviations
    assert not lot(view, 0, 9).equal(lot(view, 1, 9))


def test_a_view_depends_on_seed_epoch_and_sample_alone():
    views = Views("crop-flip", 32)
    whole = views.draw(1, 2, torch.arange(100))
    assert whole[40:60].equal(views.draw(1, 2, torch.arange(40, 60)))
    assert not whole.equal(views.draw(1, 3, torch.arange(100)))
    assert not whole.equal(views.draw(2, 2, torch.arange(100)))


def test_crop_flip_has_162_views_and_all_occur():
    views = Views("crop-flip", 32)
    assert views.count == 162
    assert views.draw(0, 0, torch.arange(20_000)).unique().equal(torch.arange(162))
    assert [Views(name, 32).count for name in ("none", "flip", "crop")] == [1, 2, 81]
    assert Views("crop", 16).count == 25  # pad 2
    assert [Views(name, 32).count for name in ("cutout", "disk", "imagenet")] == [None] * 3


def test_every_crop_flip_view_is_pad_crop_mirror():
    views, image = Views("crop-flip", 32), images(1)
    padded = F.pad(image, (4, 4, 4, 4))
    drawn = views.apply(image.expand(162, -1, -1, -1), torch.arange(162))
    for view in range(162):
        dy, dx, flip = view // 18, view // 2 % 9, view % 2
        expected = padded[0, :, dy : dy + 32, dx : dx + 32]
        assert drawn[view].equal(expected.flip(-1) if flip else expected)


@pytest.mark.parametrize("name", AUGMENTS)
def test_views_are_drawn_again_and_alone(name):
    views, x = Views(name, 32), images()
    view = views.draw(5, 1, torch.arange(12))
    state = torch.random.get_rng_state()
    drawn = views.apply(x, view)
    assert torch.random.get_rng_state().equal(state)  # nobody else's draws move
    torch.rand(7)
    assert drawn.dtype == torch.uint8
    assert drawn.shape == x.shape
    assert drawn.equal(views.apply(x, view))
    assert drawn[3:4].equal(views.apply(x[3:4], view[3:4]))
    assert views.apply(x, torch.full((12,), -1)).equal(x)  # -1 is the plain image
    assert name == "none" or not drawn.equal(x)


def test_float_images_are_moved_like_bytes():
    views, x = Views("cutout", 32), images()
    view = views.draw(0, 0, torch.arange(12))
    assert views.apply(x.float() / 255, view).equal(views.apply(x, view).float() / 255)


def test_cutout_blanks_a_clipped_square():
    views, x = Views("cutout", 32), torch.full((400, 3, 32, 32), 255, dtype=torch.uint8)
    view = views.draw(0, 0, torch.arange(400))
    centre_y, centre_x = lot(view, 3, 32), lot(view, 4, 32)
    drawn = views.apply(x, view)
    for image, cy, cx in zip(drawn, centre_y.tolist(), centre_x.tolist(), strict=True):
        square = image[:, max(cy - 8, 0) : cy + 8, max(cx - 8, 0) : cx + 8]
        assert square.sum() == 0
        inner = image[:, 4:28, 4:28]  # never padding
        hole = (min(cy + 8, 28) - max(cy - 8, 4)) * (min(cx + 8, 28) - max(cx - 8, 4))
        assert (inner == 0).sum() == 3 * hole


def test_disk_pads_with_grey():
    views = Views("disk", 32)
    views._policy = None  # without AutoAugment what the crop brought in is seen
    drawn = views.apply(torch.full((200, 3, 32, 32), 255, dtype=torch.uint8), views.draw(0, 0, torch.arange(200)))
    assert drawn.unique().tolist() == [0, 128, 255]


def test_imagenet_crops_differ_by_view():
    views, x = Views("imagenet", 32), images(1, 32).expand(8, -1, -1, -1)
    drawn = views.apply(x, views.draw(0, 0, torch.arange(8)))
    assert len({tuple(d.flatten().tolist()) for d in drawn}) == 8


def test_unknown_preset_names_the_nearest():
    with pytest.raises(RecipeError, match="no such preset") as error:
        preset("crop-flp")
    assert "crop-flip" in error.value.hint
    assert error.value.exit_code == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", AUGMENTS)
def test_cuda_draws_the_same_bits(name):
    views, x, index = Views(name, 32), images(64), torch.arange(64)
    view = views.draw(0, 3, index)
    assert views.draw(0, 3, index.cuda()).cpu().equal(view)
    if name not in ("disk", "imagenet"):  # those interpolate
        assert views.apply(x.cuda(), view.cuda()).cpu().equal(views.apply(x, view))
