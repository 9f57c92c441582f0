"""The TensorBoard extra."""

import sys

import pytest

from kdcli.errors import RecipeError
from kdcli.training import tensorboard


def test_missing_tensorboard_is_refused_with_the_command_that_installs_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RecipeError) as caught:
        tensorboard.check()
    assert "kdcli[tensorboard]" in caught.value.hint


def test_rows_come_back_under_their_names(tmp_path) -> None:
    pytest.importorskip("tensorboard", reason="needs the tensorboard extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epoch in (1, 2):
        tensorboard.write(tmp_path, {"epoch": epoch, "test/top1": 10.0 * epoch, "rank/teacher": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("test/top1")] == [(1, 10.0), (2, 20.0)]
    assert set(events.Tags()["scalars"]) == {"test/top1", "rank/teacher"}
