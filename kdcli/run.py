"""The run folder: recipe, provenance, metrics, checkpoint, student; written whole or not at all."""

import contextlib
import json
import platform
import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kdcli import recipe as recipes
from kdcli.errors import RecipeError, WeightsError, did_you_mean
from kdcli.files import unwritable, write_atomic, write_text
from kdcli.recipe import Recipe

ROOT = Path("runs")


@dataclass
class Run:
    """A run's folder; nothing but its path is held in memory."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> Recipe:
        return recipes.load(str(self.path / "recipe.toml"))

    @property
    def provenance(self) -> dict[str, Any]:
        return _json(self.path / "provenance.json")

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: the score is the last thing a run writes, the table a compare's."""
        return "top1" in self.provenance or (self.path / "compare.json").is_file()

    @property
    def done(self) -> bool:
        """As `finished`, also where the folder was not begun."""
        return (self.path / "provenance.json").is_file() and self.finished

    @property
    def kind(self) -> str:
        return str(self.provenance.get("kind", "distill"))

    def start(self, recipe: Recipe, provenance: dict[str, Any]) -> None:
        """Lay the folder out. Raises RecipeError when it already holds a run."""
        self.check_free()
        write_text(self.path / "recipe.toml", recipe.toml())
        write_text(self.path / "provenance.json", json.dumps(provenance, indent=1))

    def check_free(self) -> None:
        """Raise RecipeError when the folder already holds a run."""
        if (self.path / "provenance.json").exists():
            raise RecipeError(
                f"{self.path} already holds a run",
                hint=f"Choose another --out, continue it with --resume {self.path}, or `kdcli runs rm {self.path}`.",
            )

    def amend(self, **facts: Any) -> None:
        """Add facts to the provenance (finished, minutes, scores)."""
        write_text(self.path / "provenance.json", json.dumps({**self.provenance, **facts}, indent=1))

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        try:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise unwritable(self.path / "metrics.jsonl", error) from None

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
        """Write last.ckpt whole, or leave the old one."""
        import torch

        write_atomic(self.path / "last.ckpt", lambda temporary: torch.save(state, temporary))

    def load_checkpoint(self) -> dict[str, Any]:
        """last.ckpt, on the CPU. Raises WeightsError when it is missing or broken."""
        import torch

        path = self.path / "last.ckpt"
        cure = "Start it again without --resume, with another --out."
        for torn in self.path.glob(".last.ckpt.*.tmp"):  # what a kill in the middle of writing left behind
            torn.unlink(missing_ok=True)
        if not path.is_file():
            raise WeightsError(f"{path}: there is no checkpoint to continue from", hint=cure)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen kinds, some without a word
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise WeightsError(f"{path} is truncated or not a kdcli checkpoint: {reason}", hint=cure) from None
        if not isinstance(state, dict) or not {"epoch", "batch", "learners"} <= state.keys():
            raise WeightsError(f"{path} is not a kdcli checkpoint: it does not say where the run stood", hint=cure)
        return state

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
    """All runs under runs/, the oldest first; the learners of a compare are listed inside theirs, not here."""
    runs: dict[tuple[str, str], Run] = {}
    for path in ROOT.glob("*/provenance.json"):
        run = Run(path.parent)
        try:
            started, _ = str(run.provenance.get("started", "")), run.recipe  # both must be readable
        except RecipeError as error:
            print(f"warning: {run.path} is left out: {error.message}", file=sys.stderr)
        else:
            runs[started, run.name] = run
    return [runs[key] for key in sorted(runs)]


def find(name: str | None, *, learner: bool = True) -> Run:
    """A run by path or name, or the newest under runs/; a compare stands for the learner its recipe names.

    Raises RecipeError (exit 2) when there is none or it is not known.
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
