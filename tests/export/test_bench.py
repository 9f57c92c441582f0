"""Files are timed in turn, on the given threads; the figures are what the clock measured."""

from pathlib import Path

import numpy as np
import onnx
import pytest

import kdcli.export.bench as module
from kdcli.errors import KdcliError, WeightsError
from kdcli.export.bench import Timing, bench


def write(path: Path, batch: str | int = "n", size: tuple[int, int] = (8, 8)) -> Path:
    """The smallest file that kdcli reads: each channel's mean."""
    value = onnx.helper.make_tensor_value_info
    ends = (
        [value("pixels", onnx.TensorProto.FLOAT, [batch, 3, *size])],
        [value("logits", onnx.TensorProto.FLOAT, [batch, 3])],
    )
    axes = onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [2, 3])
    node = onnx.helper.make_node("ReduceMean", ["pixels", "axes"], ["logits"], keepdims=0)
    graph = onnx.helper.make_graph([node], "g", *ends, [axes])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), path)
    return path


class Clock:
    """Time that only fake models move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ms = 0.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.ms / 1e3)
        monkeypatch.setattr(module.time, "perf_counter_ns", lambda: round(self.ms * 1e6))


@pytest.fixture
def fakes(monkeypatch):
    """bench on models that take a set time, and the log of their calls."""
    clock, calls, made = Clock(monkeypatch), [], {}
    takes = {"a": lambda i: 1.0 + i, "b": lambda i: 10.0, "c": lambda i: 100.0}

    class Fake:
        def __init__(self, path, *, threads):
            self.path, self.batch, self.size, self.provider = Path(path), None, 7, "FakeProvider"
            self.input_size = (4, 6)
            made[self.path.stem] = threads

        def run(self, pixels):
            name = self.path.stem
            calls.append((name, pixels.shape, pixels.dtype))
            clock.ms += takes[name](sum(c[0] == name for c in calls) - 1)

    monkeypatch.setattr(module, "open_file", Fake)
    return calls, made


def paths(names: str) -> dict[str, Path]:
    return {name: Path(f"{name}.onnx") for name in names}


def test_every_round_calls_every_file_once_in_a_changing_order(fakes):
    calls, _ = fakes
    bench(paths("abc"), warmup=2, runs=20)
    names = [c[0] for c in calls]
    rounds = ["".join(names[i : i + 3]) for i in range(0, len(names), 3)]
    assert len(rounds) == 22
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert {r[0] for r in rounds} == set("abc")  # none is always first
    first = list(names)
    calls.clear()
    bench(paths("abc"), warmup=2, runs=20)
    assert [c[0] for c in calls] == first  # the same order every time


def test_percentiles_and_throughput_leave_the_warm_up_out(fakes):
    a, b = bench(paths("ab"), batch=4, warmup=3, runs=101)
    timed = 1.0 + np.arange(3, 104)  # ms: calls 3..103 of a
    assert (a.p50, a.p90, a.p99) == pytest.approx((54.0, 94.0, 103.0))
    assert a.images_per_second == pytest.approx(4 * 101 / (timed.sum() / 1e3))
    assert (b.p50, b.p90, b.p99) == pytest.approx((10.0, 10.0, 10.0))


def test_threads_batch_and_images_reach_the_models(fakes):
    calls, made = fakes
    timings = bench(paths("ab"), batch=3, threads=5, warmup=0, runs=2)
    assert made == {"a": 5, "b": 5}
    assert {c[1:] for c in calls} == {((3, 3, 4, 6), np.dtype(np.float32))}
    assert [(t.name, t.threads, t.batch, t.runs, t.provider, t.size) for t in timings] == [
        ("a", 5, 3, 2, "FakeProvider", 7),
        ("b", 5, 3, 2, "FakeProvider", 7),
    ]


def test_seconds_end_the_rounds_early(fakes):
    (c,) = bench(paths("c"), runs=1000, seconds=2.0)
    assert c.runs == 20  # of 100 ms each
    (c,) = bench(paths("c"), runs=1000, seconds=0.1)
    assert c.runs == module.MIN_ROUNDS
    (c,) = bench(paths("c"), runs=4, seconds=0.1)
    assert c.runs == 4


def test_real_files_of_different_sizes(tmp_path):
    files = {"small": write(tmp_path / "s.onnx"), "large": write(tmp_path / "l.onnx", batch=2, size=(12, 20))}
    timings = bench(files, batch=2, threads=1, warmup=1, runs=7)
    assert [t.name for t in timings] == ["small", "large"]
    for timing in timings:
        assert isinstance(timing, Timing)
        assert (timing.runs, timing.threads, timing.provider) == (7, 1, "CPUExecutionProvider")
        assert 0 < timing.p50 <= timing.p90 <= timing.p99
        assert timing.size == timing.path.stat().st_size
        assert timing.path == files[timing.name]


def test_a_fixed_batch_must_be_met(tmp_path):
    files = {"free": write(tmp_path / "a.onnx"), "fixed": write(tmp_path / "b.onnx", batch=2)}
    with pytest.raises(KdcliError, match=r"fixed .*batches of 2 only, not 1") as caught:
        bench(files)
    assert "--batch 2" in caught.value.hint


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"threads": 0}, {"warmup": -1}, {"runs": 0}])
def test_numbers_out_of_range(tmp_path, wrong):
    with pytest.raises(KdcliError, match=next(iter(wrong))):
        bench({"a": write(tmp_path / "a.onnx")}, **wrong)


def test_nothing_to_time_and_a_missing_file(tmp_path):
    with pytest.raises(KdcliError, match="no files"):
        bench({})
    with pytest.raises(WeightsError, match=r"gone\.onnx"):
        bench({"gone": tmp_path / "gone.onnx"})
    with pytest.raises(WeightsError, match=r"gone\.pt: .*\.onnx"):
        bench({"gone": tmp_path / "gone.pt"})
