"""Methods side by side: one stream, one answer of the mentors, every learner trained as if it were alone.

A method whose mentors must be trained first (takd, dgkd, a recipe's stages) has a classroom of its own: its learners
come after those that share one, each by itself, from the same stream of pictures.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kdcli.errors import InterruptedRun, RecipeError
from kdcli.mentors.classroom import Classroom
from kdcli.recipe import STAGE, Recipe, staged as stages_of
from kdcli.system import distributed, files, user_code
from kdcli.training import run as runs
from kdcli.training.loop import Event, Session
from kdcli.training.run import Run
from kdcli.workflows import distill, stages
from kdcli.workflows.stages import Follow

CONTROL = "nokd"


@dataclass
class Line:
    """One method's row: percent and percentage points."""

    method: str
    seeds: list[int]
    top1: list[float]  # each seed's, of what would be shipped
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
    """What a compare found."""

    lines: list[Line]
    runs: dict[str, str] = field(default_factory=dict)  # learner -> folder
    source: str = ""  # of the published figures
    epoch: str = ""  # which epoch they report

    def line(self, method: str) -> Line:
        return next(line for line in self.lines if line.method == method)

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def learners(recipe: Recipe, methods: list[str], seeds: list[int]) -> dict[str, Recipe]:
    """A recipe for every method and seed, the control first, each as its own `distill` would run it."""
    names = called(methods)
    return {
        f"{label}-{seed}": recipe.with_method(name).with_(**{"train.seed": seed})
        for label, name in names.items()
        for seed in seeds
    }


def called(methods: list[str]) -> dict[str, str]:
    """The control and the methods by the name their folders have. Raises RecipeError where two have the same."""
    names: dict[str, str] = {}
    for method in dict.fromkeys([CONTROL, *methods]):
        label = user_code.label(method)
        if twin := next((one for one in names if one.lower() == label.lower()), None):  # some disks ignore case
            raise RecipeError(
                f"--methods: {names[twin]} and {method} would both go by the name of {twin}",
                hint="Give one of the classes another name.",
            )
        names[label] = method
    return names


def parted(recipes: dict[str, Recipe]) -> tuple[dict[str, Recipe], dict[str, Recipe]]:
    """The learners that can share one classroom, and those whose mentors must be trained first."""
    later = {name for name, one in recipes.items() if stages.plan(one).stages}
    return (
        {name: one for name, one in recipes.items() if name not in later},
        {name: one for name, one in recipes.items() if name in later},
    )


def check(recipe: Recipe, methods: list[str], seeds: list[int], device: torch.device) -> None:
    """Raise KdcliError for whatever would stop a learner's stages, before anything is trained."""
    if (recipe.classroom.student or "").startswith(STAGE):
        raise RecipeError(
            f"classroom.student = {recipe.classroom.student!r}: a compare's control would have to wait for that stage",
            hint="Train it by itself and name its run: ARCHITECTURE@RUN.",
        )
    _, later = parted(learners(recipe, methods, seeds[:1]))
    if later:
        data = distill.data_of(recipe, device)
        for one in later.values():
            stages.check(stages.plan(one), data, device)


def open_room(recipe: Recipe, device: torch.device) -> Classroom:
    """The classroom that learners share; without mentors where those are a stage's graduates."""
    if stages_of(recipe.classroom):
        alone = recipe.with_(**{"stage": [], "classroom.teacher": None, "classroom.peers": []})
        return distill.open_room(alone, device)[1]
    return distill.open_room(recipe, device)[1]


def open_session(recipe: Recipe, methods: list[str], seeds: list[int], classroom: Classroom, run: Run) -> Session:
    """The learners that share a classroom over one stream, each with its own folder inside the compare's."""
    recipes, _ = parted(learners(recipe, methods, seeds))
    return distill.open_session(recipes, classroom, run, {name: Run(run.path / name) for name in recipes})


def start(session: Session, classroom: Classroom, recipe: Recipe, methods: list[str], seeds: list[int]) -> None:
    """Lay out the compare's folder and every learner's inside it."""
    _lay_out(session.run, classroom, recipe, methods, seeds, independent=False)
    _lay_out_learners(session, classroom)


def _lay_out(
    run: Run, classroom: Classroom, recipe: Recipe, methods: list[str], seeds: list[int], *, independent: bool
) -> None:
    names = list(called(methods))
    method = recipe.method.label if recipe.method.label in names else names[-1]
    recipe = recipe.with_(baselines={name: {} for name in methods if user_code.named(name)})  # whose files are kept too
    facts = {
        **distill.facts_of(classroom),
        "methods": names,
        "train_seeds": seeds,
        "independent": independent,
        "stands_for": f"{method}-{seeds[0]}",  # wherever one run is wanted: never the best seed, but the first
    }
    distributed.first(lambda: run.start(recipe, runs.provenance("compare", recipe, **facts)))


def _lay_out_learners(session: Session, classroom: Classroom) -> None:
    """Lay out the folders of learners that have none yet."""
    facts = distill.facts_of(classroom)

    def lay_out() -> None:
        for learner in session.learners:
            folder = session.runs[learner.name]
            if not folder.begun:
                folder.start(learner.recipe, runs.provenance("distill", learner.recipe, **facts))

    distributed.first(lay_out)


def again(run: Run) -> list[str]:
    """The methods of a compare that is to be resumed, own ones as the run keeps them."""
    kept: dict[str, str] = run.recipe.own_methods()
    labels: list[str] = run.provenance["methods"]
    return [kept.get(label, label) for label in labels]


def go(session: Session, *, resume: bool = False) -> Iterator[Event]:
    """Train all learners and write compare.json; yields what `engine.train` yields."""
    if resume:  # it may have been killed between one folder and the next
        _lay_out_learners(session, session.learners[0].classroom)
    yield from distill.go(session, resume=resume)
    distributed.first(lambda: _write(session.run))


def through(run: Run, recipe: Recipe, methods: list[str], seeds: list[int]) -> bool:
    """Whether all learners that share a classroom have finished."""
    return all(Run(run.path / name).done for name in parted(learners(recipe, methods, seeds))[0])


def staged(
    recipe: Recipe, methods: list[str], seeds: list[int], device: torch.device, run: Run, follow: Follow
) -> None:
    """Train the learners whose mentors come first, with their stages, as far as they are not finished yet."""
    _, later = parted(learners(recipe, methods, seeds))
    for name, one in later.items():
        folder = Run(run.path / name)
        if distributed.first(lambda folder=folder: folder.done):
            continue

        def named(classroom: Classroom, events: Iterator[Event], label: str, name: str = name) -> None:
            follow(classroom, events, f"{name}: {label}")

        try:
            stages.learn(one, folder, device, named)
        except InterruptedRun as stopped:
            raise InterruptedRun(stopped.message, hint=f"Continue with: kdcli compare --resume {run.path}") from None
    if later:
        distributed.first(lambda: _write(run))


def independent(
    recipe: Recipe,
    methods: list[str],
    seeds: list[int],
    device: torch.device,
    run: Run,
    follow: Follow,
    *,
    resume: bool = False,
) -> Comparison:
    """As `go`, but every seed has its own stream too (data.seed = train.seed), one stream after the other."""
    for n, seed in enumerate(seeds):
        user_code = recipe.with_(**{"data.seed": seed})
        classroom = open_room(user_code, device)
        session = open_session(user_code, methods, [seed], classroom, Run(run.path / f".seed-{seed}"))
        session.runs = {learner.name: Run(run.path / learner.name) for learner in session.learners}
        if n == 0 and resume:
            distributed.first(run.mend)
            distill.same_room(run, classroom)
        elif n == 0:
            _lay_out(run, classroom, recipe, methods, seeds, independent=True)
        done, going_on = distributed.first(lambda session=session: _stands(session))
        if done:
            continue  # this seed was through before the compare was stopped
        _lay_out_learners(session, classroom)
        try:
            follow(classroom, distill.go(session, resume=going_on), f"seed {seed}: {len(session.learners)} students")
        except InterruptedRun as stopped:
            raise InterruptedRun(stopped.message, hint=f"Continue with: kdcli compare --resume {run.path}") from None
        distributed.first(session.run.remove)
    for seed in seeds:
        staged(recipe.with_(**{"data.seed": seed}), methods, [seed], device, run, follow)
    distributed.first(lambda: _write(run))
    return distributed.first(lambda: summarise(run))


def _stands(session: Session) -> tuple[bool, bool]:
    """Whether every learner of a seed is through, and else whether its training was begun."""
    going_on = session.run.path.is_dir()
    if all(one.done for one in session.runs.values()):
        if going_on:
            session.run.remove()
        return True, False
    files.make_folder(session.run.path)
    return False, going_on


def _write(run: Run) -> None:
    """Write compare.json, once every learner has finished."""
    facts = run.provenance
    names = [f"{method}-{seed}" for method in facts["methods"] for seed in facts["train_seeds"]]
    if all(Run(run.path / name).done for name in names):
        files.write_text(run.path / "compare.json", summarise(run).json())


def summarise(run: Run) -> Comparison:
    """The table of a finished compare, from its learners' folders."""
    facts, expect = run.provenance, run.recipe.expect
    seeds, lines, folders = facts["train_seeds"], [], {}
    control: list[float] = []
    for method in facts["methods"]:
        results = [distill.result(f"{method}-{seed}", Run(run.path / f"{method}-{seed}")) for seed in seeds]
        folders |= {one.name: str(one.run.path) for one in results}
        top1 = [one.top1 for one in results]
        control = control or top1
        line = _line(method, seeds, top1, [one.best for one in results], control)
        if expect:
            line.published = expect.top1.get(method)
            if line.published is not None and CONTROL in expect.top1 and method != CONTROL:
                line.published_gain = round(line.published - expect.top1[CONTROL], 4)
        lines.append(line)
    return Comparison(lines, folders, expect.source if expect else "", expect.epoch if expect else "")


def _line(method: str, seeds: list[int], top1: list[float], best: list[float], control: list[float]) -> Line:
    spread = statistics.stdev(top1) if len(top1) > 1 else None
    line = Line(method, seeds, top1, best, statistics.mean(top1), spread, None, None, None, "control")
    if method == CONTROL:
        return line
    differences = [a - b for a, b in zip(top1, control, strict=True)]
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
    columns = ["method", "top-1 %", "gain", "95 % interval", "verdict"]
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
