"""Images and views of height 48 and width 32, against a slow reference; square ones stay as they were."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdcli.data import AUGMENTS, Stream, open_data
from kdcli.data.dataset import Pixels, sized
from kdcli.data.decode import fit
from kdcli.data.views import DRAWS, Views, hashed, lot, numbers, resized_crop, uniform
from kdcli.data.workers import Files
from kdcli.errors import RecipeError
from kdcli.recipe import DataConfig, Recipe

HIGH, WIDE = SIZE = (48, 32)


def images(n=12, size=SIZE, seed=0):
    return torch.randint(0, 256, (n, 3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def slow(image, dy, dx, flip, fill=0):
    """One view, pixel by pixel: the image shifted by (6 - dy, 4 - dx), then mirrored."""
    out = torch.full_like(image, fill)
    for y in range(HIGH):
        for x in range(WIDE):
            from_y, from_x = y + dy - 6, (WIDE - 1 - x if flip else x) + dx - 4
            if 0 <= from_y < HIGH and 0 <= from_x < WIDE:
                out[:, y, x] = image[:, from_y, from_x]
    return out


def test_views_are_numbered_row_by_row():
    views = Views("crop-flip", SIZE)
    assert (views.size, views.pad, views.places) == (SIZE, (6, 4), (13, 9))
    assert views.count == views.slots == 13 * 9 * 2
    assert [Views(name, SIZE).count for name in ("none", "flip", "crop")] == [1, 2, 117]
    image = images(1)
    chosen = torch.tensor([0, 1, 2, 17, 18, 19, 100, 109, 232, 233])
    drawn = views.apply(image.expand(10, -1, -1, -1), chosen)
    for one, view in zip(drawn, chosen.tolist(), strict=True):
        assert one.equal(slow(image[0], view // 18, view // 2 % 9, view % 2))
    assert views.apply(image, torch.tensor([-1])).equal(image)
    with pytest.raises(RecipeError, match="crop-flip at 48x32 pixels has only 234 views"):
        Views("crop-flip", SIZE, 234)


def test_cutout_blanks_a_rectangle_of_half_the_sides():
    views, x = Views("cutout", SIZE), torch.full((40, 3, *SIZE), 255, dtype=torch.uint8)
    view = views.draw(0, 0, torch.arange(40))
    drawn = views.apply(x, view)
    for n in range(40):
        dy, dx, flip = (int(lot(view[n : n + 1], which, below)) for which, below in enumerate((13, 9, 2)))
        expected = slow(x[n], dy, dx, flip)
        cy, cx = int(lot(view[n : n + 1], 3, HIGH)), int(lot(view[n : n + 1], 4, WIDE))
        expected[:, max(cy - 12, 0) : cy + 12, max(cx - 8, 0) : cx + 8] = 0
        assert drawn[n].equal(expected)


def test_resized_crops_keep_to_the_views_own_ratio():
    image = images(1, (90, 120))[0]
    for draws in uniform(hashed(0, 0, torch.arange(300)), DRAWS).tolist():
        out = resized_crop(image, draws, SIZE)
        assert out.shape == (3, *SIZE)
    views = Views("imagenet", SIZE)
    view = hashed(0, 0, torch.arange(200))
    corners = torch.tensor([[[0.0, 0.0], [120.0, 90.0]]]).expand(200, 2, 2)
    moved = views.move(corners, view, torch.tensor([[90, 120]]).expand(200, 2))
    scale = (moved[:, 1] - moved[:, 0]).abs() / torch.tensor([120.0, 90.0])  # across, down
    stretch = (scale[:, 0] / scale[:, 1]).log() / math.log(4 / 3)
    assert -1.1 < stretch.min() < -0.8
    assert 0.8 < stretch.max() < 1.1
    share = 1 / scale.prod(1) * HIGH * WIDE / (90 * 120)
    assert 0.07 < share.min() < 0.15
    assert 0.5 < share.max() <= 80 * 90 / (90 * 120) + 0.02  # the widest portrait crop of a landscape image


@pytest.mark.parametrize("size", [(100, 130), (130, 100), (48, 32), (300, 20), (20, 300)])
@pytest.mark.parametrize("ratio", [1.0, 256 / 224])
def test_fit_covers_and_keeps_the_centre(size, ratio):
    image = images(1, size)[0]
    factor = max(round(HIGH * ratio) / size[0], round(WIDE * ratio) / size[1])
    high, wide = (math.floor(side * factor + 1e-9) for side in size)
    whole = F.interpolate(image[None], (high, wide), mode="bilinear", antialias=True)[0]
    top, left = round((high - HIGH) / 2), round((wide - WIDE) / 2)
    out = fit(image, SIZE, ratio)
    assert out.shape == (3, *SIZE)
    assert out.equal(whole[:, top : top + HIGH, left : left + WIDE])


def test_sized_stretches_and_repeats_grey():
    grey = torch.randint(0, 256, (3, 1, 9, 14), dtype=torch.uint8)
    out = sized(grey, SIZE)
    expected = F.interpolate(grey.float(), SIZE, mode="bilinear", antialias=True).round().clamp(0, 255).byte()
    assert out.equal(expected.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("strong", [False, True])
def test_arrays_and_folders_are_streamed(npz, folder, augment, strong, monkeypatch):
    held = open_data(DataConfig(name=f"npz:{npz(size=20)}", image_size=SIZE, augment=augment))
    files = DataConfig(name=f"folder:{folder(n=8, size=(70, 60))}", image_size=SIZE, augment=augment, workers=2)
    kept = open_data(files)
    monkeypatch.setattr("kdcli.data.opening.CACHE_BYTES", 0)
    streamed = open_data(files)
    assert isinstance(streamed.train.store, Files)
    assert isinstance(kept.train.store, Pixels) == (augment != "imagenet")
    for data in (held, kept, streamed):
        assert data.image_size == SIZE
        stream = Stream(data, 4, seed=0, strong=strong)
        batch = next(stream.epoch(0))
        assert batch.images.shape == (4, 3, *SIZE)
        assert batch.strong is None or batch.strong.shape == (4, 3, *SIZE)
        assert stream.again(batch.index, batch.view).equal(batch.images)
        assert data.test.take(3).shape == (3, 3, *SIZE)
    both = (Stream(data, 4, seed=0, strong=strong).epoch(1) for data in (kept, streamed))
    for a, b in zip(*both, strict=True):
        assert a.images.equal(b.images)
        assert a.strong is None or (b.strong is not None and a.strong.equal(b.strong))


# --- the recipe


@pytest.mark.parametrize(
    ("given", "kept"), [(32, 32), ([32, 32], 32), ([48, 32], (48, 32)), ((48, 32), (48, 32)), (None, None), (32.0, 32)]
)
def test_a_size_is_a_number_or_two(given, kept):
    config = DataConfig(image_size=given)
    assert config.image_size == kept
    assert type(config.model_dump()["image_size"]) is type(kept)


@pytest.mark.parametrize("given", [7, 1025, [48], [48, 7], [48, 32, 3], "48x32", True, 32.5, [32, "32"]])
def test_other_sizes_are_refused(given):
    with pytest.raises(RecipeError, match=r"data.image_size: .*8 to 1024, or two of them as \[height, width\]"):
        Recipe().with_(**{"data.image_size": given})


def test_a_size_survives_toml_and_the_recipes_hash(tmp_path):
    from kdcli import recipe

    one, two = (Recipe().with_(**{"data.image_size": size}) for size in ([48, 32], (48, 32)))
    (tmp_path / "a.toml").write_text(one.toml())
    assert recipe.load(str(tmp_path / "a.toml")) == one == two
    assert one.hash() == two.hash() != Recipe().with_(**{"data.image_size": [32, 48]}).hash()
    square = Recipe().with_(**{"data.image_size": 32})
    assert square.hash() == Recipe().with_(**{"data.image_size": [32, 32]}).hash()
    assert '"image_size": 32' in square.model_dump_json().replace(":32", ": 32")


# --- where points go


def spots(size, points):
    """One image a point, black but for one bright pixel at (column, row)."""
    out = torch.zeros((len(points), 3, *size), dtype=torch.uint8)
    for n, (x, y) in enumerate(points):
        out[n, :, y, x] = 255
    return out


@pytest.mark.parametrize("augment", ["none", "flip", "crop", "crop-flip", "cutout"])
@pytest.mark.parametrize("size", [(32, 32), SIZE])
def test_points_move_with_the_pixels(augment, size):
    views, rng = Views(augment, size), np.random.default_rng(0)
    points = [(int(rng.integers(size[1])), int(rng.integers(size[0]))) for _ in range(300)]
    view = views.draw(3, 1, torch.arange(300))
    view[:5] = -1
    drawn = views.apply(spots(size, points), view)
    moved = views.move(torch.tensor(points)[:, None] + 0.5, view)[:, 0]
    seen = 0
    for image, (x, y) in zip(drawn[:, 0], moved.tolist(), strict=True):
        inside = 0 <= x < size[1] and 0 <= y < size[0]
        bright = image.nonzero()
        if augment != "cutout":
            assert len(bright) == inside
        for row, column in bright.tolist():
            assert (column + 0.5, row + 0.5) == (x, y)
            seen += 1
    assert seen > 100


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_points_move_with_resized_crops(size):
    """A soft spot in images of 200 x 260: its centre of mass in the view is where the point goes."""
    views, rng, shape = Views("imagenet", size), np.random.default_rng(0), (200, 260)
    points = torch.from_numpy(rng.uniform([30, 30], [230, 170], (300, 2)))
    y, x = torch.meshgrid(torch.arange(200) + 0.5, torch.arange(260) + 0.5, indexing="ij")
    view = hashed(1, 2, torch.arange(300))
    view[:4] = -1
    moved = views.move(points[:, None], view, torch.tensor([shape]).expand(300, 2))[:, 0]
    rows, columns = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
    errors, margin = [], 15  # so far from the border the whole spot is inside
    for (px, py), draws, (to_x, to_y) in zip(points.tolist(), numbers(view), moved.tolist(), strict=True):
        if margin < to_x < size[1] - margin and margin < to_y < size[0] - margin:
            spot = (-((x - px).square() + (y - py).square()) / (2 * 3**2)).exp()
            image = resized_crop(spot[None], draws, size)[0]
            errors.append([(image.sum(0) @ columns) / image.sum() - to_x, (image.sum(1) @ rows) / image.sum() - to_y])
    found = torch.tensor(errors)
    assert len(found) > 40
    assert found.abs().max() < 0.05


def test_images_in_memory_are_of_the_views_size():
    views, x = Views("imagenet", SIZE), torch.rand(5, 7, 2)
    view = hashed(0, 0, torch.arange(5))
    assert views.move(x, view).equal(views.move(x, view, torch.tensor([SIZE]).expand(5, 2)))
    assert views.move(x, torch.full((5,), -1)).equal(x)


@pytest.mark.parametrize("views", [Views("disk", 32), Views("crop-flip", 32).strong()])
def test_points_cannot_follow_a_policy(views):
    with pytest.raises(RecipeError, match="rotates and shears") as caught:
        views.move(torch.zeros(1, 1, 2), torch.tensor([3]))
    assert "data.augment=" in caught.value.hint


# --- square views, as the first version drew them


SQUARE = {  # preset -> count, the first two views, and a checksum of 24 views' pixels
    "none": (1, [0, 0], 5157759790025247221),
    "flip": (2, [0, 0], 5148808521828068058),
    "crop": (81, [60, 10], 4507797409640081874),
    "crop-flip": (162, [60, 10], 4476869741226864048),
    "cutout": (None, [4719529686209784018, 474618610737022816], 3733268201924345310),
}


@pytest.mark.parametrize("name", SQUARE)
def test_square_views_keep_their_numbers_and_bits(name):
    views, (count, first, checksum) = Views(name, 32), SQUARE[name]
    view = views.draw(5, 2, torch.arange(24) * 7)
    assert (views.count, view[:2].tolist()) == (count, first)
    pixels = (hashed(1, torch.arange(24 * 3 * 32 * 32)) % 256).byte().view(24, 3, 32, 32)
    flat = views.apply(pixels, view).flatten().long()
    assert (flat * (hashed(2, torch.arange(len(flat))) % 2**40)).sum().item() == checksum
