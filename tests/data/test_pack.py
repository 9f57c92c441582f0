"""A folder packed into one file: the same images in the same order for the same mentors, whole or not at all."""

import io
import json
import os
import shutil
import signal
import time
import zipfile

import numpy as np
import pytest
import torch
from cli_kit import Started, kdcli, picture_folder
from PIL import Image

from kdcli.cli import options
from kdcli.data import Stream, available, open_data, pack, packing
from kdcli.data.pack import encoded
from kdcli.errors import DataError, KdcliError, RecipeError
from kdcli.recipe import DataConfig


def opened(name, **keys):
    return open_data(DataConfig(**({"name": str(name), "workers": 0, "image_size": 32} | keys)))


def packed(path, file=None, kind="folder", size=256, quality=90, **keys):
    config = DataConfig(name=f"{kind}:{path}", **keys)
    return packing(config, str(file) if file else None, size=size, quality=quality, track=lambda images: images)[0]


def refused(name, **keys) -> KdcliError:
    with pytest.raises(DataError) as error:
        opened(name, **keys)
    assert error.value.exit_code == 3
    assert error.value.hint
    return error.value


def same(a, b):
    return all(getattr(a, k).equal(getattr(b, k)) for k in ("images", "target", "index", "view"))


@pytest.fixture
def pets(tmp_path):
    return picture_folder(tmp_path / "pets", ("ant", "bee"), train=12, val=5, size=48)


def test_small_jpegs_are_packed_as_they_are_and_read_as_from_the_folder(pets):
    done = packed(pets)
    assert done.path == pets.with_name("pets.pack")
    assert (done.images, done.copied, done.skipped) == (34, 34, [])
    assert done.after == done.path.stat().st_size
    assert done.before == sum(file.stat().st_size for file in pets.rglob("*.jpg"))
    for keys in ({}, {"image_size": 72, "workers": 2}, {"holdout": 0.2, "per_class": 5}):
        a, b = opened(f"folder:{pets}", **keys), opened(f"pack:{done.path}", **keys)
        assert (a.hash, a.classes, a.mean, a.std, a.wnids) == (b.hash, b.classes, b.mean, b.std, b.wnids)
        assert b.pixels != b.hash == a.pixels
        assert all(
            same(*pair) for pair in zip(Stream(a, 4, seed=1).epoch(2), Stream(b, 4, seed=1).epoch(2), strict=True)
        )
        assert all(same(*pair) for pair in zip(a.test.plain(4), b.test.plain(4), strict=True))
        assert (a.holdout is None) == (b.holdout is None)
        if a.holdout and b.holdout:
            assert a.holdout.index.equal(b.holdout.index)


def test_threads_read_a_pack_too(pets):
    done = packed(pets)
    here, there = (opened(f"pack:{done.path}", workers=n, image_size=72) for n in (0, 2))
    both = zip(Stream(here, 8, seed=0).epoch(0), Stream(there, 8, seed=0).epoch(0), strict=True)
    assert all(same(*pair) for pair in both)


def test_the_file_is_a_zip_that_anyone_can_read(pets):
    path = packed(pets).path
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        offsets, labels, names = (np.load(io.BytesIO(file.read(f"{n}.npy"))) for n in ("offsets", "labels", "names"))
        images, about = file.read("images"), json.loads(file.read("facts.json"))
    assert (about["format"], about["kind"], about["train"], about["test"]) == ("kdcli pack 2", "folder", 24, 10)
    first = pets / names[0].decode()
    assert images[offsets[0] : offsets[1]] == first.read_bytes()
    assert labels.tolist() == [0] * 12 + [1] * 12 + [0] * 5 + [1] * 5


def test_a_pack_of_an_earlier_version_is_refused_in_words(pets, tmp_path):
    from safetensors.numpy import save_file

    old = {"images": np.zeros(8, np.uint8), "offsets": np.array([0, 8])}
    save_file(old, tmp_path / "old.pack", metadata={"format": "kdcli pack 1"})
    error = refused(f"pack:{tmp_path / 'old.pack'}")
    assert "an older kdcli" in error.message
    assert "kdcli data pack" in error.hint


def test_several_classes_an_image_are_packed(pets, tmp_path):
    files = sorted(path.relative_to(pets).as_posix() for path in pets.rglob("*.jpg"))
    lines = [f"{name},{'ant' if n % 2 else ''};{'bee' if n % 3 else ''}" for n, name in enumerate(files)]
    (pets / "labels.csv").write_text("\n".join(["file,labels", *lines]))
    done = packed(pets)
    a, b = (
        open_data(DataConfig(name=name, workers=0, image_size=(40, 24)), "multilabel")
        for name in (f"folder:{pets}", f"pack:{done.path}")
    )
    assert (a.hash, a.classes) == (b.hash, b.classes) == (a.hash, ["ant", "bee"])
    assert a.train.targets.shape == (24, 2)
    assert a.train.targets.equal(b.train.targets)
    assert a.train.take(24).equal(b.train.take(24))
    with pytest.raises(RecipeError, match="several classes an image"):
        opened(f"pack:{done.path}")


def read(data: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(data.tobytes()))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA"])
@pytest.mark.parametrize(
    ("wide", "high", "expected"), [(300, 400, (60, 80)), (401, 77, (312, 60)), (60, 300, (60, 300))]
)
def test_larger_images_are_shrunk_to_their_short_side(tmp_path, mode, wide, high, expected):
    ramp = np.linspace(0, 255, wide)[None, :, None] * np.ones((high, 1, 3))
    ending = "png" if mode == "RGBA" else "jpg"
    path = tmp_path / "one" / "train" / "a"
    path.mkdir(parents=True)
    image = Image.fromarray(ramp.astype(np.uint8)).convert(mode)
    image.save(path / f"x.{ending}")
    from kdcli.data.folder import listing

    part = listing(tmp_path / "one", "train", ["a"])
    one = encoded(part, 0, 60, 95)
    small = read(np.frombuffer(one.data, np.uint8))
    assert small.format == "JPEG"
    assert small.size == expected
    assert one.copied == (expected == (wide, high) and ending == "jpg")
    wanted = np.asarray(image.convert("RGB").resize(expected, Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(np.asarray(small.convert("RGB"), dtype=float) - wanted).mean() < 4


def test_a_pack_of_real_images_is_smaller_and_close(shared, tmp_path):
    source = tmp_path / "big"
    for wnid in ("n01440764", "n02979186"):
        for part, count in (("train", 3), ("val", 2)):
            (source / part / wnid).mkdir(parents=True)
            found = sorted((shared / "data" / "imagenette_subset" / part / wnid).iterdir())[:count]
            for file in found:
                Image.open(file).convert("RGB").resize((600, 500)).save(source / part / wnid / file.name, quality=95)
    done = packed(source, kind="imagenet")
    assert done.copied == 0
    assert done.after < 0.5 * done.before
    a, b = (opened(f"{kind}:{where}", image_size=224) for kind, where in (("imagenet", source), ("pack", done.path)))
    assert b.classes == ["tench", "cassette player"]
    assert b.mean == (0.485, 0.456, 0.406)
    assert (a.test.take(4) - b.test.take(4)).abs().mean() < 0.02


def test_a_folder_without_parts_is_divided_as_ever(folder):
    path = folder(parts=("",), n=20)
    done = packed(path)
    a, b = opened(f"folder:{path}"), opened(f"pack:{done.path}")
    assert (len(b.train), len(b.test)) == (32, 8)
    assert a.hash == b.hash
    assert a.test.targets.equal(b.test.targets)


def test_a_mentor_of_the_folder_is_found_for_the_pack(pets, monkeypatch, tmp_path):
    from cli_kit import PEER, add_mentors

    add_mentors(PEER, data=f"folder:{pets}", image_size=32)
    done = packed(pets)
    said = kdcli("evaluate", PEER, "--data", f"pack:{done.path}", "--json").json
    assert said["images"] == 10


def test_a_stopped_run_is_not_continued_on_other_pixels(pets, tmp_path):
    from kdcli.errors import WeightsError
    from kdcli.training.run import Run
    from kdcli.workflows import groups

    done = packed(pets, size=40)
    args = ["--model", "cifar_resnet10_xxs", "--data", f"pack:{done.path}", "--epochs", "1", "--out", tmp_path / "run",
            "--set", "data.image_size=32", "--set", "train.batch_size=8"]  # fmt: skip
    kdcli("train", *args)
    run = Run(tmp_path / "run")
    assert run.recipe.train.lr == 0.02  # the folder's recipe
    groups.check_unchanged(run, groups.open_classroom(run.recipe, torch.device("cpu"), mentors=False))
    done.path.unlink()
    packed(pets, size=40, quality=30)
    with pytest.raises(WeightsError, match="other images"):
        groups.check_unchanged(run, groups.open_classroom(run.recipe, torch.device("cpu"), mentors=False))


def test_corrupt_images_stop_it_or_are_left_out(pets, monkeypatch):
    cut = pets / "train" / "bee" / "bee_3.jpg"
    cut.write_bytes(cut.read_bytes()[:-300])
    for check in (True, False):  # a large folder's files are not decoded before packing
        if not check:
            monkeypatch.setattr("kdcli.data.folder.QUICK_CHECK", 1)
        with pytest.raises(DataError, match="1 image file does not decode") as error:
            packed(pets)
        assert str(cut) in error.value.message
        assert sorted(path.name for path in pets.parent.iterdir()) == ["pets"]
    monkeypatch.setattr("kdcli.data.folder.sound", lambda part, skip, threads, skipped: part)
    done = packed(pets, skip_corrupt=True)
    assert done.images == 33
    assert len(done.skipped) == 1
    assert str(cut) in done.skipped[0]
    monkeypatch.undo()
    a, b = opened(f"folder:{pets}", skip_corrupt=True), opened(f"pack:{done.path}")
    assert a.hash == b.hash
    assert a.train.take(23).equal(b.train.take(23))
    assert a.train.targets.equal(b.train.targets)


def test_a_class_that_loses_all_its_images_is_named(pets, monkeypatch):
    for file in (pets / "train" / "bee").iterdir():
        file.write_text("not an image")
    monkeypatch.setattr("kdcli.data.folder.sound", lambda part, skip, threads, skipped: part)
    with pytest.raises(DataError, match="no training images: bee"):
        packed(pets, skip_corrupt=True)
    assert sorted(path.name for path in pets.parent.iterdir()) == ["pets"]


def test_an_image_broken_in_the_pack_is_named_and_may_be_skipped(pets):
    path = packed(pets).path
    sixth = pack.load(path)[0].read(5).tobytes()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(sixth, b"\0" * 200 + sixth[200:]))
    error = refused(f"pack:{path}")
    assert f"{path}: train/ant/ant_" in error.message
    data = opened(f"pack:{path}", skip_corrupt=True)
    assert len(data.train) == 23
    assert data.skipped[0].startswith(f"{path}: train/ant/ant_")


def test_a_pack_truncated_while_in_use_is_named(pets):
    path = packed(pets).path
    data = opened(f"pack:{path}", image_size=72)
    os.truncate(path, path.stat().st_size - 5000)
    with pytest.raises(DataError, match="truncated or overwritten") as error:
        next(Stream(data, 4, seed=0).epoch(0))
    assert str(path) in error.value.message


def rewritten(path, **change):
    """The pack with some of its facts replaced."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    facts = json.loads(parts["facts.json"]) | change
    with zipfile.ZipFile(path, "w") as file:
        for name, data in (parts | {"facts.json": json.dumps(facts)}).items():
            file.writestr(name, data)


def other_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("images", "some")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda p: p.unlink(), "No such file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "a truncated one"),
        (lambda p: p.write_bytes(p.read_bytes()[:2000]), "a truncated one"),
        (lambda p: p.write_bytes(p.read_bytes()[500:]), "damaged"),
        (lambda p: p.write_bytes(b""), "is not a kdcli pack"),
        (lambda p: p.write_bytes(b"some text, and more of it"), "is not a kdcli pack"),
        (other_zip, "is not a kdcli pack"),
        (lambda p: rewritten(p, format="kdcli pack 9"), "pack 9"),
        (lambda p: rewritten(p, train=9), "lists 34"),
        (lambda p: rewritten(p, classes=["a"]), "outside its classes"),
    ],
    ids=["gone", "a byte short", "cut", "no start", "empty", "text", "another zip", "newer", "counts", "classes"],
)
def test_broken_and_foreign_files_are_refused(pets, harm, says):
    path = packed(pets).path
    harm(path)
    error = refused(f"pack:{path}")
    assert says in error.message
    assert str(path) in error.message


def test_what_exists_is_not_written_over(pets, tmp_path):
    packed(pets, tmp_path / "a.pack")
    with pytest.raises(RecipeError, match="exists"):
        packed(pets, tmp_path / "a.pack")
    with pytest.raises(RecipeError, match="the path is missing"):
        opened("pack")


def test_a_disk_without_space_is_reported_before_anything_is_written(pets, monkeypatch):
    usage = shutil.disk_usage(pets)._replace(free=20000)
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="would take about") as error:
        packed(pets)
    assert "--file" in error.value.hint
    assert sorted(path.name for path in pets.parent.iterdir()) == ["pets"]


def test_a_disk_that_fills_up_leaves_nothing(pets, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(DataError, match="the disk is full"):
        packed(pets)
    assert sorted(path.name for path in pets.parent.iterdir()) == ["pets"]


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_in_the_middle_leaves_nothing_that_stays(tmp_path, number):
    pets = picture_folder(tmp_path / "pets", ("ant", "bee"), train=300, val=10, size=400)
    with Started("data", "pack", "--data", f"folder:{pets}") as one:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".pets.pack.*.tmp")) and one.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        one.send_signal(number)
        said = one.said(30)
    assert said.code == (130 if number == signal.SIGTERM else -signal.SIGKILL), said.err
    if number == signal.SIGKILL:
        assert len(list(tmp_path.glob(".pets.pack.*.tmp"))) == 1
        shutil.rmtree(pets)
        packed(picture_folder(tmp_path / "pets", ("ant", "bee")))
    assert not list(tmp_path.glob(".*"))


# --- the command line


def test_pack_on_the_command_line(pets, tmp_path, monkeypatch):
    said = kdcli("data", "pack", "--data", f"folder:{pets}", "--size", "40", "--file", tmp_path / "root" / "p.pack")
    assert all(word in said.out for word in ("before", "after", "images/s", "p.pack"))
    assert said.next == f"kdcli bench --data folder:{pets},pack:{tmp_path / 'root' / 'p.pack'}"
    done = kdcli("data", "pack", "--data", f"folder:{pets}", "--file", tmp_path / "b.pack", "--json").json
    assert (done["images"], done["path"]) == (34, str(tmp_path / "b.pack"))
    row = next(one for one in available(str(tmp_path / "root")) if one["name"] == "pack:p.pack")
    assert (row["images"], row["classes"], row["present"]) == (34, 2, True)
    (tmp_path / "root" / "q.pack").write_text("nothing")
    row = next(one for one in available(str(tmp_path / "root")) if one["name"] == "pack:q.pack")
    assert not row["present"]
    monkeypatch.setenv("KDCLI_DATA", str(tmp_path / "root"))
    assert len(opened("pack:p.pack").train) == 24
    assert "only folders" in kdcli("data", "pack", "--data", "digits", code=2).err


def test_training_starts_from_the_recipe_of_what_was_packed(pets, tmp_path):
    for kind in ("folder", "imagenet"):
        packed(pets, tmp_path / f"{kind}.pack", kind=kind)
        recipe, _ = options.assemble(data=f"pack:{kind}.pack", root=str(tmp_path), student="x")
        assert recipe.title == options.assemble(data=f"{kind}:x", student="x")[0].title


def test_bench_measures_every_data_set(pets):
    file = packed(pets).path
    said = kdcli("bench", "--data", f"folder:{pets},pack:{file}", "--seconds", "0.05", "--set", "data.image_size=72")
    assert said.next.startswith("kdcli train --model NAME --data ")
    found = kdcli("bench", "--data", f"folder:{pets},pack:{file},digits", "--seconds", "0.05", "--batch", "8", "--json",
                  "--set", "data.workers=1", "--set", "data.image_size=72").json  # fmt: skip
    ways = [(one["data"].partition(":")[0], one["readers"], one["workers"]) for one in found]
    assert ways == [("folder", "threads", 1), ("pack", "threads", 1), ("digits", "memory", 0)]
    assert all(0 < one["low"] <= one["images_per_second"] <= one["high"] and one["batch"] == 8 for one in found)
    alone = kdcli("bench", "--data", f"folder:{pets}", "--seconds", "0.05", "--set", "data.workers=0")
    assert "main process" in alone.out
    assert alone.next == f"kdcli data pack --data folder:{pets}"
    assert "not both" in kdcli("bench", "x.onnx", "--data", "digits", code=2).err
