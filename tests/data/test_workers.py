"""How many threads decode changes no pixel; an image that is lost and a signal to all processes lose nothing."""

import io
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from cli_kit import Started
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from kdcli.data import Stream, decode, open_data
from kdcli.data.views import DRAWS, Views, _crop, hashed, numbers, uniform
from kdcli.data.workers import Files, Readers
from kdcli.errors import DataError, RecipeError
from kdcli.recipe import DataConfig, Recipe

posix = pytest.mark.skipif(os.name != "posix", reason="signals and process groups are POSIX's")


def opened(path, **keys):
    return open_data(DataConfig(**({"name": f"folder:{path}", "image_size": 72} | keys)))


def readers(data) -> Readers:
    assert isinstance(data.train.store, Files)
    return data.train.store.readers


def same(a, b):
    return all(getattr(a, k).equal(getattr(b, k)) for k in ("images", "target", "index", "view"))


# --- the same pixels


@pytest.mark.parametrize("augment", ["imagenet", "disk", "crop-flip"])
def test_threads_change_nothing(folder, augment, monkeypatch):
    monkeypatch.setattr("kdcli.data.workers.PIECE", 3)  # batches of 4 in two pieces
    path = folder(n=10, size=(50, 40))
    here = opened(path, augment=augment, workers=0)
    there = opened(path, augment=augment, workers=2)
    one, two = Stream(here, 4, seed=0), Stream(there, 4, seed=0)
    whole = list(one.epoch(0))
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    next(two.epoch(0))  # left after one batch
    assert all(same(a, b) for a, b in zip(whole, two.epoch(0), strict=True))
    assert all(same(a, b) for a, b in zip(whole[2:], two.epoch(0, 2), strict=True))
    running = two.epoch(0)
    assert same(next(running), whole[0])
    assert all(same(a, b) for a, b in zip(here.test.plain(3), there.test.plain(3), strict=True))  # meanwhile
    assert all(same(a, b) for a, b in zip(whole[1:], running, strict=True))
    assert torch.random.get_rng_state().equal(state)
    assert two.again(whole[1].index, whole[1].view).equal(whole[1].images)


def test_the_number_of_threads_is_said(folder):
    notes: dict[str, Any] = {key: (value, why) for key, value, why in opened(folder()).notes}
    assert notes["data.workers"][0] >= 1
    assert "threads" in notes["data.workers"][1]
    assert readers(opened(folder(root="b"), workers=3)).workers == 3


@pytest.mark.parametrize("augment", ["disk", "imagenet"])
def test_policies_are_drawn_in_threads_without_the_default_generator(augment):
    """What torchvision's policy draws from the default generator at this seed, while other threads draw from that."""
    views = Views(augment, 32).strong() if augment == "imagenet" else Views(augment, 32)
    image = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = hashed(0, 0, torch.arange(24))
    expected = []
    for one, name in zip(image, names.tolist(), strict=True):
        torch.manual_seed(name)
        expected.append(views._policy(one))  # pyright: ignore
    with ThreadPoolExecutor(4) as pool:
        drawn = [pool.submit(views._auto, image[n : n + 1], names[n : n + 1]) for n in range(24)]
        torch.manual_seed(5)
        here = [torch.rand(()).item() for _ in range(200)]
        assert torch.cat([one.result() for one in drawn]).equal(torch.stack(expected))
    torch.manual_seed(5)
    assert here == [torch.rand(()).item() for _ in range(200)]


def jpegs() -> dict[str, bytes]:
    """Kinds of JPEG that a folder may hold."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((123, 91))
    kinds = {
        "plain": (image, {}),
        "4:4:4": (image, {"subsampling": 0}),
        "4:2:2": (image, {"subsampling": 1}),
        "progressive": (image, {"progressive": True}),
        "grey": (image.convert("L"), {}),
        "cmyk": (image.convert("CMYK"), {}),
    }
    out = {}
    for name, (one, options) in kinds.items():
        file = io.BytesIO()
        one.save(file, "JPEG", **options)
        out[name] = file.getvalue()
    return out


@pytest.mark.parametrize("kind", jpegs())
def test_the_operator_decodes_as_pillow_does(kind, monkeypatch):
    data = np.frombuffer(bytearray(jpegs()[kind]), np.uint8)
    assert decode.JPEG_OPERATOR is not None
    fast = decode.decode(data)
    monkeypatch.setattr(decode, "JPEG_OPERATOR", None)
    assert decode.decode(data).equal(fast)
    assert fast.shape == (3, 91, 123)


def test_a_jpeg_that_the_operator_refuses_is_pillows(monkeypatch):
    data = np.frombuffer(bytearray(jpegs()["plain"]), np.uint8)
    expected = decode.decode(data)

    def refuses(*_):
        raise RuntimeError("arithmetic coding")

    monkeypatch.setattr(decode, "JPEG_OPERATOR", refuses)
    assert decode.decode(data).equal(expected)
    with pytest.raises(OSError, match="truncated"):
        decode.decode(data[:-300])


@pytest.mark.parametrize("size", [(91, 123), (123, 91), (300, 40), (64, 64)])
def test_fit_is_resize_and_centre_crop(size):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    for target, ratio in ((64, 1.0), (48, 256 / 224)):
        expected = v2.CenterCrop(target)(v2.Resize(round(target * ratio))(image))
        assert decode.fit(image, (target, target), ratio).equal(expected)


def test_crops_are_spread_as_torchvisions_are():
    torch.manual_seed(0)
    draws = uniform(torch.arange(4000) * 7919, DRAWS)
    assert ((draws >= 0) & (draws < 1)).all()
    assert draws.mean().item() == pytest.approx(0.5, abs=0.005)
    boxes = [_crop(one, 300, 400, (32, 32)) for one in draws.tolist()]
    theirs = [RandomResizedCrop.get_params(torch.empty(3, 300, 400), [0.08, 1.0], [3 / 4, 4 / 3]) for _ in boxes]
    for measure in (lambda b: b[2] * b[3], lambda b: np.log(b[3] / b[2]), lambda b: b[0], lambda b: b[1]):
        a, b = (np.array([measure(box) for box in some]) for some in (boxes, theirs))
        assert abs(a.mean() - b.mean()) < 4 * np.hypot(a.std(), b.std()) / np.sqrt(len(a))  # four standard errors
        assert np.quantile(a, [0.1, 0.9]) == pytest.approx(np.quantile(b, [0.1, 0.9]), rel=0.1, abs=4)
    assert all(t >= 0 and le >= 0 and t + h <= 300 and le + w <= 400 for t, le, h, w in boxes)
    assert _crop(draws[0].tolist(), 10, 900, (32, 32)) == (0, 443, 10, 13)  # nothing fits: the largest in the middle
    assert numbers(torch.tensor([-1, 5])) == [[], uniform(torch.tensor([5]), DRAWS)[0].tolist()]


# --- what goes wrong on the way


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("harm", "says"), [("remove", "No such file"), ("cut", "truncated")])
def test_an_image_lost_after_opening_is_named(folder, workers, harm, says):
    path = folder(n=10)
    data = opened(path, workers=workers)
    victim = path / "train" / "bee" / "bee3.png"
    victim.unlink() if harm == "remove" else victim.write_bytes(victim.read_bytes()[:-1000])
    with pytest.raises(DataError, match="1 image file does not decode") as error:
        list(Stream(data, 4, seed=0).epoch(0))
    assert str(victim) in error.value.message
    assert says in error.value.message


def command(path, out, *, epochs, size=72) -> list[str]:
    args = ["--model", "cifar_resnet10_xxs", "--data", f"folder:{path}", "--epochs", str(epochs), "--out", str(out)]
    sets = [f"data.image_size={size}", "data.workers=2", "train.batch_size=4",
            "train.precision=fp32"]  # fmt: skip
    return ["train", *args, *(word for one in sets for word in ("--set", one))]


def until(true, seconds=60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@posix
def test_sigterm_to_the_whole_group_saves_where_it_is(folder, tmp_path):
    """As a batch system ends a job: the threads decode on until the step under way is saved."""
    out = tmp_path / "run"
    with Started(*command(folder(n=60), out, epochs=500), start_new_session=True) as process:
        until(lambda: (out / "last.ckpt").exists() or process.poll() is not None)
        time.sleep(0.2)  # into the next epoch
        os.killpg(process.pid, signal.SIGTERM)
        said = process.said(30)
    assert said.code == 130, said.err
    assert said.own[0].startswith("error: stopped by SIGTERM")
    assert "Traceback" not in said.err
    assert torch.load(out / "last.ckpt", weights_only=True)["epoch"] >= 1


def test_a_run_that_loses_an_image_is_saved_and_goes_on_when_it_is_back(folder, tmp_path):
    """The same bits as one that never lost it."""
    from cli_kit import kdcli

    path = folder(n=10, size=(80, 80))
    arguments = command(path, tmp_path / "whole", epochs=2)
    kdcli(*arguments)
    victim = path / "train" / "ant" / "ant7.png"
    real = Readers._submit
    asked = []

    def loses(self, part, rows, view):
        if part == 0 and len(rows) == 4:
            asked.append(rows)
            if len(asked) == 9:  # in the second epoch of five batches
                victim.rename(tmp_path / "lost")
        return real(self, part, rows, view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Readers, "_submit", loses)
        arguments[arguments.index("--out") + 1] = str(tmp_path / "run")
        said = kdcli(*arguments, code=3)
    assert str(victim) in said.err
    assert f"--resume {tmp_path / 'run'}" in said.err
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert f"before batch {state['batch'] + 1} of epoch {state['epoch'] + 1}" in said.err
    (tmp_path / "lost").rename(victim)
    kdcli("train", "--resume", tmp_path / "run")
    ends = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("whole", "run")]
    assert ends[0] == ends[1]
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "run")]
    assert metrics[0] == metrics[1]


def test_the_number_of_threads_is_not_part_of_the_recipes_hash():
    plain = Recipe().with_(**{"data.name": "folder:x"})
    assert plain.with_(**{"data.workers": 3}).hash() == plain.hash()
    assert plain.with_(**{"data.seed": 1}).hash() != plain.hash()


@pytest.mark.parametrize(("key", "value", "old"), [("readers", "processes", "auto"), ("decode", "cuda", "cpu")])
def test_keys_of_earlier_versions_are_refused_unless_they_hold_their_old_default(key, value, old):
    with pytest.raises(RecipeError, match=f"data.{key} was removed") as caught:
        Recipe().with_(**{f"data.{key}": value})
    assert "decoded" in caught.value.hint
    assert Recipe().with_(**{f"data.{key}": old}) == Recipe()  # as a run's folder of an earlier version holds it
