"""Methods side by side: one stream, one call of the mentors a batch, every learner trained as if it were alone.

A method whose mentors must be trained first (takd, dgkd, a recipe's stages) has a classroom that no other can share:
its learners come after those that share one, each by itself, on the same stream of images.
"""

import contextlib
import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kdcli import methods as known
from kdcli.errors import RecipeError
from kdcli.mentors.classroom import Classroom
from kdcli.recipe import STAGE, Recipe, staged
from kdcli.system import distributed, files, user_code
from kdcli.tasks import TASKS, Metric
from kdcli.training import run as runs
from kdcli.training.run import Run
from kdcli.workflows import distill, groups, quickstart_mentors, stages
from kdcli.workflows.groups import Follow, Group

CONTROL = "nokd"


@dataclass
class Line:
    """One method's row: the metric's unit, gains in points of it."""

    method: str
    seeds: list[int]
    values: list[float]  # each seed's primary metric, of what would ship
    best: list[float]
    mean: float
    spread: float | None  # standard deviation over seeds; None for one seed
    gain: float | None  # mean paired difference to the control
    gain_spread: float | None  # its standard deviation
    interval: tuple[float, float] | None  # 95 % of the mean paired difference (Student's t)
    verdict: str
    published: float | None = None
    published_gain: float | None = None


@dataclass
class Comparison:
    """The result of a compare."""

    lines: list[Line]
    metric: Metric
    runs: dict[str, str] = field(default_factory=dict)  # learner -> folder
    source: str = ""  # of the published figures
    epoch: str = ""  # which epoch they report
    run: str = ""  # the compare's folder
    stands_for: str = ""  # the learner that is meant where one run is: the recipe's method, first seed, never the best

    def line(self, method: str) -> Line:
        return next(line for line in self.lines if line.method == method)

    def json(self) -> str:
        return json.dumps(self.table(), indent=1)

    def table(self) -> dict[str, Any]:
        """As plain data; each line's values also under the metric's name."""
        lines = [{**asdict(line), self.metric.name: line.values} for line in self.lines]
        return {**asdict(self), "lines": lines}


def learners(recipe: Recipe, methods: list[str], seeds: list[int]) -> dict[str, Recipe]:
    """A recipe for every method and seed, the control first, each as a `distill` of it alone would run it."""
    return {
        f"{label}-{seed}": recipe.with_method(name).with_(**{"train.seed": seed})
        for label, name in folder_names(methods).items()
        for seed in seeds
    }


def folder_names(methods: list[str]) -> dict[str, str]:
    """The control and the methods by the name their folders have. Raises RecipeError where two have the same."""
    names: dict[str, str] = {}
    for method in dict.fromkeys([CONTROL, *methods]):
        label = user_code.label(method)
        if twin := next((one for one in names if one.lower() == label.lower()), None):  # some disks ignore case
            raise RecipeError(
                f"--methods: {names[twin]} and {method} would both have the name {twin}",
                hint="Give one of the classes another name.",
            )
        names[label] = method
    return names


def split_by_stages(recipes: dict[str, Recipe]) -> tuple[dict[str, Recipe], dict[str, Recipe]]:
    """The learners that can share one classroom, and those whose mentors must be trained first."""
    later = {name for name, one in recipes.items() if stages.plan(one).stages}
    return (
        {name: one for name, one in recipes.items() if name not in later},
        {name: one for name, one in recipes.items() if name in later},
    )


def compare(
    recipe: Recipe,
    methods: list[str],
    seeds: list[int],
    device: torch.device,
    follow: Follow,
    *,
    independent: bool = False,
    out: str | None = None,
) -> Comparison:
    """Train every method and the control with every seed, and write compare.json.

    Args:
        methods: by name, or `file.py:Class`.
        follow: shows what was chosen for each classroom and runs its training to the end.
        independent: every seed also has its own stream of images (data.seed = train.seed).
        out: the compare's folder; default: a new one under runs/.

    Raises:
        KdcliError: with nothing written, for whatever would stop a training before its first step.
    """
    groups.check_expect(recipe)
    for name in methods:
        known.find(recipe.with_method(name).method.name)
    run = distill.run_folder(out, recipe, "compare")
    quickstart_mentors.prepare(recipe, device, follow)
    check(recipe, methods, seeds, device)
    return _train(recipe, methods, seeds, device, follow, run, independent=independent)


def resume(run: Run, device: torch.device, follow: Follow) -> Comparison:
    """Continue a compare where it was stopped."""
    facts = run.provenance
    return _train(
        run.recipe, methods_to_resume(run), facts["train_seeds"], device, follow, run,
        independent=facts["independent"], resume=True,
    )  # fmt: skip


def methods_to_resume(run: Run) -> list[str]:
    """The methods of a compare that is resumed; a user's own are named by the run's copies of their files."""
    kept: dict[str, str] = run.recipe.own_methods()
    labels: list[str] = run.provenance["methods"]
    return [kept.get(label, label) for label in labels]


def check(recipe: Recipe, methods: list[str], seeds: list[int], device: torch.device) -> None:
    """Raise KdcliError for whatever would stop a learner's stages, before anything is trained."""
    if (recipe.classroom.student or "").startswith(STAGE):
        raise RecipeError(
            f"classroom.student = {recipe.classroom.student!r}: a compare's control would have to wait for that stage",
            hint="Train it by itself and name its run: ARCHITECTURE@RUN.",
        )
    _, later = split_by_stages(learners(recipe, methods, seeds[:1]))
    if later:
        data = groups.data_of(recipe, device)
        for one in later.values():
            stages.check(stages.plan(one), data, device)


def _train(
    recipe: Recipe, methods: list[str], seeds: list[int], device: torch.device, follow: Follow, run: Run, *,
    independent: bool, resume: bool = False,
) -> Comparison:  # fmt: skip
    """Train the groups of learners that have not finished yet, and write the table."""
    streams = [(recipe, seeds, run)]  # each with the seeds that share it, and the folder of their checkpoint
    if independent:
        streams = [(recipe.with_(**{"data.seed": one}), [one], Run(run.path / f".seed-{one}")) for one in seeds]
    with groups.resumable("compare", run), contextlib.ExitStack() as stack:
        if resume:
            stack.enter_context(run.writing())
            distributed.on_rank0(run.repair)

        def train_shared(config: Recipe, numbers: list[int], checkpoints: Run, first: bool) -> None:
            """The learners of a stream that share a classroom."""
            shared, _ = split_by_stages(learners(config, methods, numbers))
            label = f"{len(shared)} student{'s' if len(shared) > 1 else ''}"
            label = f"seed {numbers[0]}: {label}" if independent else label
            group = Group(label, shared, checkpoints, {name: Run(run.path / name) for name in shared}, record=run)

            def begin(classroom: Classroom) -> None:
                if first and not resume:
                    stack.enter_context(run.writing())
                    distributed.on_rank0(lambda: _lay_out(run, classroom, recipe, methods, seeds, independent))
                distributed.on_rank0(lambda: files.make_folder(checkpoints.path))

            done, begun = distributed.on_rank0(lambda: (group.done, resume and checkpoints.path.is_dir()))
            if not done:
                groups.train_group(group, _shared_classroom(config, device), follow, resume=begun, begin=begin)
            if independent:
                distributed.on_rank0(lambda: checkpoints.path.is_dir() and checkpoints.remove())

        def train_with_stages(name: str, one: Recipe) -> None:
            folder = Run(run.path / name)
            if not distributed.on_rank0(lambda: folder.done):
                stages.train(one, folder, device, groups.labelled(follow, f"{name}: "))

        for n, stream in enumerate(streams):
            train_shared(*stream, first=n == 0)
        for config, numbers, _ in streams:
            for name, one in split_by_stages(learners(config, methods, numbers))[1].items():
                train_with_stages(name, one)
        distributed.on_rank0(lambda: files.write_text(run.path / "compare.json", summarise(run).json()))
    return distributed.on_rank0(lambda: summarise(run))


def _shared_classroom(recipe: Recipe, device: torch.device) -> Classroom:
    """The classroom that learners share; without mentors where stages train them, since only the control is left."""
    if staged(recipe.classroom):
        recipe = recipe.with_(**{"stage": [], "classroom.teacher": None, "classroom.peers": []})
    return groups.open_classroom(recipe, device)


def _lay_out(
    run: Run, classroom: Classroom, recipe: Recipe, methods: list[str], seeds: list[int], independent: bool
) -> None:
    names = list(folder_names(methods))
    method = recipe.method.label if recipe.method.label in names else names[-1]
    # the files of the user's own methods are kept with the run
    recipe = recipe.with_(baselines={name: {} for name in methods if user_code.named(name)})
    facts = {
        **groups.facts_of(classroom),
        "methods": names,
        "train_seeds": seeds,
        "independent": independent,
        "stands_for": f"{method}-{seeds[0]}",  # wherever one run is wanted: never the best seed, but the first
    }
    run.start(recipe, runs.provenance("compare", recipe, **facts))


def summarise(run: Run) -> Comparison:
    """The table of a finished compare, from its learners' folders."""
    facts, expect = run.provenance, run.recipe.expect
    seeds, lines, folders = facts["train_seeds"], [], {}
    metric = TASKS[run.recipe.task].metrics[0]
    control: list[float] = []
    for method in facts["methods"]:
        results = [distill.result(f"{method}-{seed}", Run(run.path / f"{method}-{seed}")) for seed in seeds]
        folders |= {one.name: str(one.run.path) for one in results}
        values = [one.value for one in results]
        control = control or values
        line = _line(method, seeds, values, [one.best for one in results], control)
        published = expect.of(metric.name) if expect else {}
        line.published = published.get(method)
        if line.published is not None and CONTROL in published and method != CONTROL:
            line.published_gain = round(line.published - published[CONTROL], 4)
        lines.append(line)
    source, epoch = (expect.source, expect.epoch) if expect else ("", "")
    return Comparison(lines, metric, folders, source, epoch, str(run.path), facts["stands_for"])


def _line(method: str, seeds: list[int], values: list[float], best: list[float], control: list[float]) -> Line:
    spread = statistics.stdev(values) if len(values) > 1 else None
    line = Line(method, seeds, values, best, statistics.mean(values), spread, None, None, None, "control")
    if method == CONTROL:
        return line
    differences = [a - b for a, b in zip(values, control, strict=True)]
    line.gain = statistics.mean(differences)
    if len(differences) == 1:
        line.verdict = "one seed: no verdict"
        return line
    line.gain_spread = statistics.stdev(differences)
    half = _t95(len(differences) - 1) * line.gain_spread / len(differences) ** 0.5
    line.interval = (line.gain - half, line.gain + half)
    line.verdict = "within noise" if abs(line.gain) <= half else "better" if line.gain > 0 else "worse"
    return line


def _t95(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def table(comparison: Comparison) -> dict[str, Any]:
    """Title, columns and rows of the table a terminal shows."""
    columns = ["method", comparison.metric.title, "gain", "95 % interval", "verdict"]
    published = any(line.published is not None for line in comparison.lines)
    if published:
        columns += ["published", "its gain"]
    rows = []
    for line in comparison.lines:
        mean = f"{line.mean:.2f}" + (f" ± {line.spread:.2f}" if line.spread is not None else "")
        gain = "" if line.gain is None else f"{line.gain:+.2f}"
        interval = f"{line.interval[0]:+.2f} to {line.interval[1]:+.2f}" if line.interval else ""
        row = [line.method, mean, gain, interval, line.verdict]
        if published:
            row.append("" if line.published is None else f"{line.published:.2f}")
            row.append("" if line.published_gain is None else f"{line.published_gain:+.2f}")
        rows.append(row)
    seeds = comparison.lines[0].seeds
    return {"title": f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}", "columns": columns, "rows": rows}
