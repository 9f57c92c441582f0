"""A trained network as a file for a device: written whole or not at all, checked on real images of its data."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdcli.data import DataSet
from kdcli.errors import DataError
from kdcli.export import Exported, format_of
from kdcli.models.member import Member
from kdcli.system import files
from kdcli.tasks import Task
from kdcli.training.run import Run

CHECK_IMAGES = 64  # images of the test set that a file is checked on


def export(
    member: Member,
    data: DataSet,
    task: Task,
    path: Path,
    *,
    run: Run | None = None,
    batch: int | None = None,
    **options: Any,
) -> Exported:
    """Export `member` to `path`, in the format of its suffix, with what a device engineer must know in its metadata.

    `run` is where the network was trained, `batch` fixes the batch size, `options` are the format's (`opset`). The file
    has its name only when it was checked; until then, and when anything fails, a file of that name stays as it was.

    Raises ParityError (exit 5) when the file answers differently, DataError (exit 3) when it cannot be written, and as
    the format's writer does (`export.onnx.export_onnx`).
    """
    kind = format_of(path)
    if path.is_dir():
        raise DataError(f"cannot write {path}: it is a folder", hint="`--file` takes the name of a file.")
    facts = {"dataset": data.name, "classes": json.dumps(data.classes), **(_facts(run, task) if run else {})}
    images, done = data.test.take(CHECK_IMAGES), list[Exported]()

    def write(temporary: Path) -> None:
        meaning = {"task": task.name, "output_name": task.output_name, "same": task.same}
        done.append(kind.write(member, images, temporary, **meaning, metadata=facts, batch=batch, **options))

    files.write_atomic(path, write)
    return replace(done[0], path=path)


def _facts(run: Run, task: Task) -> dict[str, str]:
    """Where a student comes from, and its metrics on the test set: percent, the others (the loss) in their unit."""
    score = run.score
    scores = {m.name: f"{score[m.name]:.{2 if m.unit else 4}f}" for m in task.metrics if m.name in score}
    return {"run": str(run.path), "recipe": run.provenance["recipe"], **scores}
