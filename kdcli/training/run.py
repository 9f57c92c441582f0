"""The run folder: recipe, provenance, metrics, checkpoint, student; every file is written atomically.

The file is long because the folder is read and written here only.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kdcli import recipe as recipes
from kdcli.errors import InterruptedRun, RecipeError, WeightsError, did_you_mean
from kdcli.recipe import Recipe
from kdcli.system import distributed, lock, user_code
from kdcli.system.files import append_line, is_whole_zip, remove_stale, write_atomic, write_text
from kdcli.tasks import TASKS, Metric

ROOT = Path("runs")
CHECKPOINTS = ("last.ckpt", "previous.ckpt")


@dataclass
class Run:
    """A run's folder; nothing but its path is held in memory."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> Recipe:
        path = self.path / "recipe.toml"
        if not path.is_file() and self.begun and "recipe_toml" in (facts := self.provenance):  # killed in between
            return recipes.from_dict(recipes.located(tomllib.loads(facts["recipe_toml"]), self.path), str(path))
        return recipes.load(str(path))

    @property
    def provenance(self) -> dict[str, Any]:
        return _json(self.path / "provenance.json")

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run: only copies of the user's methods are written before provenance.json."""
        return (self.path / "provenance.json").exists()

    @property
    def finished(self) -> bool:
        """Whether the run is complete: its provenance says so or, for a compare, compare.json exists."""
        facts = self.provenance  # runs of earlier versions have only best_epoch
        return bool(facts.get("finished", "best_epoch" in facts)) or (self.path / "compare.json").is_file()

    @property
    def metric(self) -> Metric:
        """The primary metric of the run's task."""
        return TASKS[self.recipe.task].metrics[0]

    @property
    def score(self) -> dict[str, float]:
        """The shipped student's metrics on the test set; empty for a run that is not finished."""
        facts = self.provenance
        earlier = {self.metric.name: facts[self.metric.name]} if self.metric.name in facts else {}
        return facts.get("score", earlier)

    @property
    def done(self) -> bool:
        """As `finished`; False where the folder holds no run."""
        return self.begun and self.finished

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint file exists, valid or not."""
        return any((self.path / name).is_file() for name in CHECKPOINTS)

    @property
    def kind(self) -> str:
        return str(self.provenance.get("kind", "distill"))

    def start(self, recipe: Recipe, provenance: dict[str, Any]) -> None:
        """Write a new run's first files. Raises RecipeError when the folder already holds a run.

        The provenance holds the recipe too, so that a run can be resumed once that file is written. Its `number` is
        larger than that of any run next to it, so that the newest is known whatever the clock says. The user's methods
        are copied, and the saved recipe names the copies.
        """
        self.check_free()
        for label, name in recipe.own_methods().items():
            source = user_code.file_of(name).read_bytes()
            write_atomic(self.path / f"{label}.py", lambda temporary, source=source: temporary.write_bytes(source))
        recipe = recipe.to_keep()
        number = 1 + max((_number(path) for path in self.path.parent.glob("*/provenance.json")), default=0)
        facts = {**provenance, "number": number, "recipe_toml": recipe.toml()}
        write_text(self.path / "provenance.json", json.dumps(facts, indent=1))
        write_text(self.path / "recipe.toml", recipe.toml())

    def repair(self) -> None:
        """After a kill: remove temporary files, and write recipe.toml if it is missing."""
        remove_stale(self.path)
        if self.begun and not (self.path / "recipe.toml").is_file():
            write_text(self.path / "recipe.toml", self.recipe.toml())

    def check_methods(self) -> None:
        """Raise RecipeError if a user's method has changed since the run began, in its copy here or in its own file."""
        for label, facts in self.provenance.get("own_methods", {}).items():
            kept = self.path / f"{label}.py"
            for path in (kept, Path(facts["file"])):
                if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != facts["sha256"]:
                    cure = "Put the old one back" + (f" ({kept} is a copy)" if path != kept else "")
                    raise RecipeError(
                        f"{path} has changed since {self.path} began", hint=f"{cure}, or start a new run."
                    )

    def check_free(self) -> None:
        """Raise RecipeError when the folder already holds a run."""
        if self.begun:
            raise RecipeError(
                f"{self.path} already holds a run",
                hint=f"Choose another --out, continue it with --resume {self.path}, or `kdcli runs rm {self.path}`.",
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the folder for this process. Raises LockedError when another process writes to it.

        Turns a KeyboardInterrupt outside the training loop (which saves by itself) into an InterruptedRun that says how
        to continue.
        """
        with contextlib.ExitStack() as stack:
            distributed.on_rank0(lambda: stack.enter_context(lock.hold(self.path)))  # only rank 0 writes
            try:
                yield
            except KeyboardInterrupt:
                if not self.begun:
                    raise
                raise InterruptedRun(
                    f"interrupted; what {self.path} holds is whole",
                    hint=f"Continue with: kdcli {self.kind} --resume {self.path}",
                ) from None

    def amend(self, **facts: Any) -> None:
        """Add facts to the provenance (scores, the epoch that ships); None removes one."""
        both = {**self.provenance, **facts}
        kept = {key: fact for key, fact in both.items() if fact is not None}
        write_text(self.path / "provenance.json", json.dumps(kept, indent=1))

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, whole or not at all."""
        append_line(self.path / "metrics.jsonl", json.dumps(row))

    def metrics(self) -> list[dict[str, Any]]:
        """All rows so far; a last line cut off by a crash is left out."""
        path = self.path / "metrics.jsonl"
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def forget_after(self, epochs: int) -> None:
        """Drop the rows of epochs that a resumed run will do again."""
        rows = [row for row in self.metrics() if row["epoch"] <= epochs]
        if (self.path / "metrics.jsonl").is_file():
            write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Write last.ckpt atomically; the one before becomes previous.ckpt.

        While it is being written the folder holds three checkpoints, so that one of them is valid whatever happens.
        """
        import torch

        last, previous = (self.path / name for name in CHECKPOINTS)
        write_atomic(last, lambda temporary: torch.save(state, temporary), before=previous)

    def load_checkpoint(self) -> dict[str, Any]:
        """The newest good checkpoint, on the CPU; when that is not last.ckpt, its "notice" says why.

        Raises WeightsError when there is none, or none is good.
        """
        last, previous = (self.path / name for name in CHECKPOINTS)
        wrong = f"{last}: there is no checkpoint to continue from"
        if last.is_file():
            state, wrong = _read(last)
            if state is not None:
                return state
        if previous.is_file():
            state, _ = _read(previous)
            if state is not None:
                os.replace(previous, last)  # else the next checkpoint would move the broken file over the good one
                return {**state, "notice": f"{wrong}; going on from the one before it, previous.ckpt"}
            wrong += f"; nor is {previous.name} a good one"
        raise WeightsError(wrong, hint="Start it again without --resume, with another --out.")

    def forget_previous(self) -> None:
        """Remove the checkpoint before the last, which a finished run has no use for."""
        (self.path / CHECKPOINTS[1]).unlink(missing_ok=True)

    def size(self) -> int:
        """Bytes on the disk."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def remove(self) -> None:
        shutil.rmtree(self.path)


def new(student: str, method: str, out: Path | None = None) -> Run:
    """A folder for a new run: `out`, or runs/<time>-<student>-<method> (numbered when two start in one second)."""
    if out is not None:
        return Run(out)
    stem = f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{student}-{method}"
    path, n = ROOT / stem, 2
    while path.exists():
        path, n = ROOT / f"{stem}-{n}", n + 1
    return Run(path)


def every() -> list[Run]:
    """All runs under runs/, oldest first, without the learners inside a compare."""
    runs: dict[tuple[int, str, str], Run] = {}
    for path in ROOT.glob("*/provenance.json"):
        run = Run(path.parent)
        try:
            started, _ = str(run.provenance.get("started", "")), run.recipe  # both must be readable
        except RecipeError as error:
            print(f"warning: {run.path} is left out: {error.message}", file=sys.stderr)
        else:
            runs[_number(path), started, run.name] = run
    return [runs[key] for key in sorted(runs)]


def find(name: str | None, *, learner: bool = True) -> Run:
    """A run by path or name, or the newest under runs/; a compare stands for the learner its recipe names.

    Raises RecipeError (exit 2) when there is no such run.
    """
    if name is None:
        runs = [run for run in every() if not learner or run.finished]
        if not runs:
            raise RecipeError(
                "no finished run under runs/ here",
                hint="Make one with `kdcli quickstart` or `kdcli distill ...`, or name one: a folder, or a name from "
                "`kdcli runs ls`.",
            )
        run = runs[-1]
    else:
        tries = [Path(name), ROOT / name]
        hits = [Run(path) for path in tries if (path / "provenance.json").is_file()]
        if not hits and any((path / lock.NAME).is_file() for path in tries):
            raise RecipeError(
                f"{name} was stopped before it wrote anything",
                hint="Nothing is lost: run the same command again.",
            )
        if not hits:
            known = [run.name for run in every()]
            raise RecipeError(
                f"no run called {name!r}, here or under runs/",
                hint=f"{did_you_mean(name, known)} `kdcli runs ls` lists them.".strip(),
            )
        run = hits[0]
    if learner and run.kind == "compare":
        return Run(run.path / str(run.provenance["stands_for"]))
    return run


def provenance(kind: str, recipe: Recipe, **facts: Any) -> dict[str, Any]:
    """Where a result comes from: versions, machine, command, hashes, seeds, and what the caller adds."""
    packages = ("torch", "torchvision", "timm", "numpy", "onnxruntime")
    versions = {"kdcli": _version("kdcli"), "python": platform.python_version()}
    versions |= {package: _version(package) for package in packages}
    files = {
        label: {"file": str(user_code.file_of(name)), "sha256": user_code.digest(name)}
        for label, name in recipe.own_methods().items()
    }
    if files:
        facts = {"own_methods": files, **facts}
    return {
        "kind": kind,
        "started": datetime.now(UTC).isoformat(),
        "command": " ".join(["kdcli", *sys.argv[1:]]),
        "platform": platform.platform(),
        "versions": versions,
        "recipe": recipe.hash(),
        "seeds": {"data": recipe.data.seed, "train": recipe.train.seed},
        **facts,
    }


def _number(path: Path) -> int:
    """A run's place in the order of starting; 0 where its provenance does not say."""
    try:
        return int(_json(path).get("number", 0))
    except RecipeError:
        return 0


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    """A checkpoint, or None and what is wrong with it."""
    import torch

    if not is_whole_zip(path):
        return None, f"{path} is truncated or not a kdcli checkpoint"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises many kinds, some without a message
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return None, f"{path} is not a kdcli checkpoint: {reason}"
    if not isinstance(state, dict) or not {"epoch", "batch", "learners"} <= state.keys():
        return None, f"{path} is not a kdcli checkpoint: it does not say where the run stood"
    return state, ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RecipeError(
            f"{path}: not a run's provenance: {error}", hint=f"Remove the folder {path.parent}."
        ) from None
