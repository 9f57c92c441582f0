"""Who decodes changes no pixel; a reader that is killed, a picture that is lost, a signal to all: nothing is lost."""

import io
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from cli_kit import Started
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from kdcli.data import Stream, decode, decode_cuda, open_data
from kdcli.data.views import DRAWS, _crop, numbers, uniform
from kdcli.data.workers import Files, Readers
from kdcli.errors import DataError, RecipeError
from kdcli.recipe import DataConfig

posix = pytest.mark.skipif(os.name != "posix", reason="signals and process groups are POSIX's")


def opened(path, **keys):
    return open_data(DataConfig(**({"name": f"folder:{path}", "image_size": 72} | keys)))


def readers(data) -> Readers:
    assert isinstance(data.train.store, Files)
    return data.train.store.readers


def same(a, b):
    return all(getattr(a, k).equal(getattr(b, k)) for k in ("pixels", "target", "index", "view"))


def pids(data) -> list[int]:
    return [worker.process.pid for worker in readers(data).processes]  # pyright: ignore


# --- the same pixels


@pytest.mark.parametrize("augment", ["imagenet", "disk", "crop-flip"])
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_readers_change_nothing(folder, augment, kind, monkeypatch):
    monkeypatch.setattr("kdcli.data.workers.PIECE", 3)  # batches of 4 in two pieces
    path = folder(n=10, size=(50, 40))
    here = opened(path, augment=augment, workers=0)
    there = opened(path, augment=augment, workers=2, readers=kind)
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
    assert two.again(whole[1].index, whole[1].view).equal(whole[1].pixels)
    assert len(pids(there)) == (2 if kind == "processes" else 0)


@pytest.mark.slow
def test_processes_may_be_spawned(folder, monkeypatch):
    import multiprocessing

    monkeypatch.setattr("kdcli.data.workers.multiprocessing.Process", multiprocessing.get_context("spawn").Process)
    data = opened(folder(n=10), workers=1, readers="processes")
    here = list(Stream(opened(data.name[7:], workers=0), 4, seed=0).epoch(0))
    assert all(same(a, b) for a, b in zip(here, Stream(data, 4, seed=0).epoch(0), strict=True))


def test_threads_unless_autoaugment_is_drawn(folder):
    path = folder()
    assert readers(opened(path)).kind == "threads"
    assert readers(opened(path, augment="disk")).kind == "processes"
    assert readers(opened(path, augment="disk", readers="threads")).kind == "threads"
    assert {"data.readers", "data.workers"} <= {key for key, _, _ in opened(path).notes}


def jpegs() -> dict[str, bytes]:
    """Kinds of JPEG that a folder may hold."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((123, 91))
    kinds = {
        "plain": (picture, {}),
        "4:4:4": (picture, {"subsampling": 0}),
        "4:2:2": (picture, {"subsampling": 1}),
        "progressive": (picture, {"progressive": True}),
        "grey": (picture.convert("L"), {}),
        "cmyk": (picture.convert("CMYK"), {}),
    }
    out = {}
    for name, (image, options) in kinds.items():
        file = io.BytesIO()
        image.save(file, "JPEG", **options)
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
        assert decode.fit(image, target, ratio).equal(expected)


def test_crops_are_spread_as_torchvisions_are():
    torch.manual_seed(0)
    draws = uniform(torch.arange(4000) * 7919, DRAWS)
    assert ((draws >= 0) & (draws < 1)).all()
    assert draws.mean().item() == pytest.approx(0.5, abs=0.005)
    boxes = [_crop(one, 300, 400) for one in draws.tolist()]
    theirs = [RandomResizedCrop.get_params(torch.empty(3, 300, 400), [0.08, 1.0], [3 / 4, 4 / 3]) for _ in boxes]
    for measure in (lambda b: b[2] * b[3], lambda b: np.log(b[3] / b[2]), lambda b: b[0], lambda b: b[1]):
        a, b = (np.array([measure(box) for box in some]) for some in (boxes, theirs))
        assert abs(a.mean() - b.mean()) < 4 * np.hypot(a.std(), b.std()) / np.sqrt(len(a))  # four standard errors
        assert np.quantile(a, [0.1, 0.9]) == pytest.approx(np.quantile(b, [0.1, 0.9]), rel=0.1, abs=4)
    assert all(t >= 0 and le >= 0 and t + h <= 300 and le + w <= 400 for t, le, h, w in boxes)
    assert _crop(draws[0].tolist(), 10, 900) == (0, 443, 10, 13)  # nothing fits: the largest in the middle
    assert numbers(torch.tensor([-1, 5])) == [[], uniform(torch.tensor([5]), DRAWS)[0].tolist()]


# --- what goes wrong on the way


def test_a_process_that_is_killed_is_replaced(folder, capfd):
    path = folder(n=40, size=(100, 100))
    data = opened(path, workers=2, readers="processes")
    running = Stream(data, 8, seed=0).epoch(0)
    got = [next(running)]
    before = pids(data)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    got += running
    assert all(same(a, b) for a, b in zip(got, Stream(opened(path, workers=0), 8, seed=0).epoch(0), strict=True))
    assert len(pids(data)) == 2
    assert not set(pids(data)) & set(before)
    assert "a new one takes over" in capfd.readouterr().err


def test_processes_that_die_over_one_image_are_told(folder, monkeypatch):
    data = opened(folder(n=20, size=(100, 100)), workers=1, readers="processes")
    monkeypatch.setattr(decode.Decoder, "__call__", lambda *_: os._exit(9))  # before they are forked
    with pytest.raises(DataError, match="were killed, one after another") as error:
        next(Stream(data, 8, seed=0).epoch(0))
    assert "data.readers=threads" in error.value.hint


@pytest.mark.parametrize("kind", ["threads", "processes"])
@pytest.mark.parametrize(("harm", "says"), [("remove", "No such file"), ("cut", "truncated")])
def test_an_image_lost_after_opening_is_named(folder, kind, harm, says):
    path = folder(n=10)
    data = opened(path, workers=1, readers=kind)
    victim = path / "train" / "bee" / "bee3.png"
    victim.unlink() if harm == "remove" else victim.write_bytes(victim.read_bytes()[:-1000])
    with pytest.raises(DataError, match="1 image file does not decode") as error:
        list(Stream(data, 4, seed=0).epoch(0))
    assert str(victim) in error.value.message
    assert says in error.value.message


def command(path, out, kind, *, epochs, size=72) -> list[str]:
    args = ["--model", "cifar_resnet10_xxs", "--data", f"folder:{path}", "--epochs", str(epochs), "--out", str(out)]
    sets = [f"data.image_size={size}", "data.workers=2", f"data.readers={kind}", "train.batch_size=4",
            "train.precision=fp32"]  # fmt: skip
    return ["train", *args, *(word for one in sets for word in ("--set", one))]


def until(true, seconds=60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(a) for a, b in (line.split() for line in listed.splitlines()) if int(b) == pid]


def gone(pid: int) -> bool:
    """Ended, though perhaps nobody has asked how."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return not state or state.startswith("Z")


@posix
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_sigterm_to_the_whole_group_saves_where_it_is(folder, tmp_path, kind):
    """As a batch system ends a job: the readers must live until the step under way is saved, and no longer."""
    out = tmp_path / "run"
    with Started(*command(folder(n=60), out, kind, epochs=500), start_new_session=True) as process:
        until(lambda: (out / "last.ckpt").exists() or process.poll() is not None)
        workers = children(process.pid)
        time.sleep(0.2)  # into the next epoch
        os.killpg(process.pid, signal.SIGTERM)
        said = process.said(30)
    assert said.code == 130, said.err
    assert said.own[0].startswith("error: stopped by SIGTERM")
    assert "Traceback" not in said.err
    saved = torch.load(out / "last.ckpt", weights_only=True)
    assert saved["epoch"] >= 1
    assert len(workers) == (2 if kind == "processes" else 0)
    assert all(gone(pid) for pid in workers)


@posix
def test_no_process_outlives_a_killed_run(folder, tmp_path):
    out = tmp_path / "run"
    with Started(*command(folder(n=60), out, "processes", epochs=500), start_new_session=True) as process:
        until(lambda: (out / "last.ckpt").exists() or process.poll() is not None)
        workers = children(process.pid)
        assert len(workers) == 2
        process.kill()
    until(lambda: all(gone(pid) for pid in workers), 10)


def test_a_run_that_loses_an_image_is_saved_and_goes_on_when_it_is_back(folder, tmp_path):
    """The same bits as one that never lost it."""
    from cli_kit import kdcli

    path = folder(n=10, size=(80, 80))
    arguments = command(path, tmp_path / "whole", "threads", epochs=2)
    kdcli(*arguments)
    victim = path / "train" / "ant" / "ant7.png"
    real = Readers._ask
    asked = []

    def loses(self, part, rows, views, alone):
        if part == 0 and len(rows) == 4:
            asked.append(rows)
            if len(asked) == 9:  # in the second epoch of five batches
                victim.rename(tmp_path / "lost")
        return real(self, part, rows, views, alone)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Readers, "_ask", loses)
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


def test_who_decodes_is_no_part_of_the_recipes_hash():
    from kdcli.recipe import Recipe

    plain = Recipe().with_(**{"data.name": "folder:x"})
    assert plain.with_(**{"data.readers": "processes", "data.workers": 3}).hash() == plain.hash()
    assert plain.with_(**{"data.seed": 1}).hash() != plain.hash()
    with pytest.raises(RecipeError, match="readers"):
        plain.with_(**{"data.readers": "fibres"})


# --- a GPU that decodes


def test_a_gpu_is_given_jpegs_alone_and_draws_the_same_views(folder, monkeypatch):
    """The device is a stand-in here: the CPU, with its own decoder under the GPU's name; the real one: tests/gpu."""
    path = folder(n=8, size=(60, 50))
    for n, file in enumerate(sorted((path / "train").rglob("*.png"))):
        if n % 3:
            Image.open(file).save(file.with_suffix(".jpg"))
            file.unlink()
    given = []

    def operator(data, mode, device):
        given.append(len(data))
        if len(data) > 1 and len(given) == 1:
            raise RuntimeError("one of them is too odd")
        return [decode.JPEG_OPERATOR(one, mode, False) for one in data]

    monkeypatch.setattr(decode_cuda, "OPERATOR", operator)
    for augment in ("imagenet", "crop-flip"):
        plain = opened(path, augment=augment, workers=0)
        store = decode_cuda.GpuFiles(readers(plain), 0, "cpu")
        index = torch.randperm(16)
        view = store.views.draw(0, 0, index)
        here = list(store.batches(index, view, 5, "cpu"))
        there = list(plain.train.store.batches(index, view, 5, "cpu"))
        assert all(a.equal(b) for a, b in zip(here, there, strict=True))
    assert 1 in given  # after the refusal, one by one
    victim = path / "train" / "bee" / "bee5.jpg"
    victim.write_bytes(victim.read_bytes()[:-400])
    with pytest.raises(DataError, match="1 image file does not decode") as error:
        list(decode_cuda.GpuFiles(readers(plain), 0, "cpu").batches(index, view, 5, "cpu"))
    assert str(victim) in error.value.message


def test_pixels_of_a_gpu_go_by_another_name(folder, monkeypatch):
    monkeypatch.setattr(decode_cuda, "unable", lambda device: "")
    path = folder()
    here, there = (opened(path, decode=where) for where in ("cpu", "cuda"))
    assert here.hash == there.hash == here.pixels != there.pixels
    assert isinstance(there.train.store, decode_cuda.GpuFiles)


def test_without_a_gpu_the_processors_decode_and_it_is_said(folder):
    path = folder()
    data = opened(path, decode="cuda")
    assert ("data.decode", "cpu", "not on the GPU: no CUDA device is in use") in data.notes
    assert type(data.train.store) is Files
