"""What this machine can do, and a small run through the whole tool that proves it."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from kdcli.errors import first_line
from kdcli.export import student_file
from kdcli.recipe import Recipe
from kdcli.system import device as devices
from kdcli.system.paths import data_root, home
from kdcli.tasks import TASKS
from kdcli.training import run as runs
from kdcli.training.run import Run


def examine(*, self_test: bool) -> dict[str, dict[str, Any]]:
    """Facts by part: versions, devices, folders and, with `self_test`, its result."""
    found = {
        "versions": runs.provenance("doctor", Recipe())["versions"],
        "devices": _devices(),
        "folders": {
            "home": home(),
            "free there": _free(home()),
            "data root": data_root(),
            "data root exists": data_root().is_dir(),
            "recipes": _count("recipes"),
            "zoo cards": _count("zoo"),
        },
    }
    return {**found, **({"self-test": _self_test()} if self_test else {})}


def _devices() -> dict[str, Any]:
    best = devices.pick(None)
    facts: dict[str, Any] = {"chosen": f"{best} ({devices.describe(best)})", "cores": os.cpu_count()}
    facts["mentors run in"] = " ".join(devices.precision("auto", best, frozen=True)[:1])
    facts["students run in"] = devices.precision("auto", best, frozen=False)[0]
    facts["fast bfloat16"] = devices.has_bf16_units(best)
    for n in range(torch.cuda.device_count()):
        facts[f"cuda:{n}"] = f"{torch.cuda.get_device_name(n)}, {torch.cuda.mem_get_info(n)[1] / 2**30:.0f} GiB"
    facts["bfloat16 against float32"] = f"{_speed_ratio(best):.2f} times as fast (one convolution, alternating)"
    return facts


def _speed_ratio(device: torch.device) -> float:
    """How many times as fast a convolution is in bfloat16 as in float32: the best of six each, timed in turn."""
    best: dict[torch.dtype, float] = {}
    for _ in range(6):
        for dtype in (torch.float32, torch.bfloat16):
            conv = torch.nn.Conv2d(32, 32, 3, padding=1).to(device, dtype).to(memory_format=torch.channels_last)
            x = torch.ones(32, 32, 16, 16, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            with torch.inference_mode():
                conv(x)
                began = time.perf_counter()
                conv(x).sum().item()
            best[dtype] = min(best.get(dtype, 9.0), time.perf_counter() - began)
    return best[torch.float32] / best[torch.bfloat16]


def _self_test() -> dict[str, Any]:
    """One epoch of a tiny student on the digits, saved, read back, exported and checked."""
    from kdcli.training.student import student_of
    from kdcli.workflows import distill, groups
    from kdcli.workflows.export import export

    began, step = time.perf_counter(), "training a student on the digits"
    keys = {"data.name": "digits", "classroom.student": "cifar_resnet10_xxs", "method": {"name": "nokd"}}
    recipe = Recipe().with_(**keys, **{"train.epochs": 1, "data.per_class": 20})
    cpu = torch.device("cpu")

    def follow(classroom: object, events: Iterable[object], label: str) -> None:
        for _ in events:
            pass

    try:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder) / "run")
            distill.train_into(run, recipe, cpu, follow)
            step = "exporting it and running the file"
            data = groups.data_of(recipe, cpu)
            task = TASKS[recipe.task](len(data.classes))
            done = export(student_of(run), data, task, student_file(run.path), run=run)
    except Exception as error:
        return {"result": "failed", "while": step, "error": f"{type(error).__name__}: {first_line(error)}"}
    return {
        "result": "passed",
        "seconds": round(time.perf_counter() - began, 1),
        "largest difference in onnxruntime": f"{done.max_difference:.1e}",
    }


def _free(path: Path) -> str:
    while not path.exists():
        path = path.parent
    return f"{shutil.disk_usage(path).free / 2**30:.1f} GiB"


def _count(kind: str) -> int:
    from kdcli.system.paths import shipped

    return len(list(shipped(kind).rglob("*.toml")))
