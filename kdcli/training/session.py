"""A session: learners that share one stream of batches and one set of mentor outputs, and what its loop reports."""

import itertools
from dataclasses import dataclass, field
from typing import Any

from kdcli.data import DataSet, Stream
from kdcli.errors import RecipeError, WeightsError
from kdcli.mentors.mentors import MOST_AHEAD, Mentors
from kdcli.recipe import TrainConfig
from kdcli.system import distributed
from kdcli.training.learner import Learner
from kdcli.training.run import Run

LONG = 1000  # updates from which measuring the look-ahead is worth its few passes


@dataclass
class Step:
    """After an update: where the loop is. `learners` may be read, slowly: that waits for the device."""

    epoch: int  # from 1
    epochs: int
    batch: int  # from 1, within the epoch
    batches: int
    images: int  # seen by this call so far
    seconds: float  # of this call so far
    learners: list[Learner]


@dataclass
class EpochEnd:
    """After an epoch: the metrics row of every learner."""

    epoch: int
    epochs: int
    rows: dict[str, dict[str, Any]]


@dataclass
class Notice:
    """Something that went differently than the recipe says, and what was done about it."""

    text: str


Event = Step | EpochEnd | Notice


@dataclass
class Session:
    """Learners over one stream, with the folders they write."""

    learners: list[Learner]
    stream: Stream
    mentors: Mentors
    data: DataSet
    run: Run  # holds the checkpoint
    runs: dict[str, Run]  # each learner's own folder, by learner
    config: TrainConfig
    keep: set[int] = field(default_factory=set)  # epochs whose weights are kept
    compiled: list[str] = field(default_factory=list)  # mentors to compile

    @property
    def epochs(self) -> int:
        return max(learner.epochs for learner in self.learners)

    def tune_mentors(self, epoch: int) -> list[str]:
        """Choose the look-ahead and compile the mentors. Called once per training; returns warnings."""
        if not self.mentors.ahead:
            live = self.mentors.members and not self.mentors.banks
            long = (self.epochs - epoch) * len(self.stream) >= LONG
            self.mentors.ahead = distributed.on_rank0(lambda: self._measured_ahead(epoch)) if long and live else 1
        failed = self.mentors.compile(self.config.batch_size, self.compiled)
        self.compiled = [name for name in self.compiled if name not in failed]
        return [f"{name} is not compiled: {why}" for name, why in failed.items()]

    def _measured_ahead(self, epoch: int) -> int:
        return self.mentors.measure_ahead(list(itertools.islice(self.stream.epoch(epoch), MOST_AHEAD)))

    def checkpoint(self, epoch: int, batch: int) -> None:
        """Write what `resume` reads; with several ranks rank 0 writes."""

        def save() -> None:
            learners = {one.name: one.state() for one in self.learners}
            state = {"epoch": epoch, "batch": batch, "ahead": self.mentors.ahead, "learners": learners}
            self.run.checkpoint(state)

        distributed.on_rank0(save)

    def resume(self) -> tuple[int, int, list[str]]:
        """Load the last valid checkpoint, or start from the beginning where there is none.

        Returns the epoch (from 0) and batch to continue with, and warnings.
        """
        folders = [self.run, *(run for run in self.runs.values() if run is not self.run)]
        state = distributed.on_rank0(lambda: self._load_or_start(folders))
        if "learners" in state:
            self.mentors.ahead = state["ahead"]
            for learner in self.learners:
                self._load(learner, state["learners"])
        distributed.on_rank0(lambda: [run.forget_after(state["epoch"]) for run in self.runs.values()])
        warnings = [state["notice"]] if "notice" in state else []
        failures = {run.provenance["diverged"] for run in folders if run.begun and "diverged" in run.provenance}
        warnings += [
            f"{self.run.path} went on until its training diverged ({failure}); resumed, it will diverge again. Start a "
            "new run with a lower --set train.lr or with --set train.clip_grad=1"
            for failure in failures
        ]
        return state["epoch"], state["batch"], warnings

    def _load_or_start(self, folders: list[Run]) -> dict[str, Any]:
        """Load the last valid checkpoint, or start at epoch 0; repairs half-written folders first."""
        for run in folders:
            run.repair()
        if self.run.has_checkpoint:
            return self.run.load_checkpoint()
        return {
            "epoch": 0,
            "batch": 0,
            "notice": f"{self.run.path} had no checkpoint yet: it starts from the beginning",
        }

    def _load(self, learner: Learner, states: dict[str, Any]) -> None:
        if learner.name not in states:
            raise RecipeError(
                f"{self.run.path}/last.ckpt has no learner {learner.name}",
                hint="Resume with the same --methods and --seeds.",
            )
        try:
            learner.load(states[learner.name])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            raise WeightsError(
                f"{self.run.path}/last.ckpt is not a checkpoint of this recipe: {type(error).__name__}: {reason}",
                hint="Put back the recipe.toml that was written with it, or start a new run.",
            ) from None
