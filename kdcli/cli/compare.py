"""kdcli compare: methods and seeds on one classroom, with the no-teacher control."""

from typing import TYPE_CHECKING, Annotated

import typer

from kdcli.cli import options as o

if TYPE_CHECKING:
    from kdcli.recipe import Recipe
    from kdcli.workflows.compare import Comparison

EXAMPLES = (
    "kdcli compare --methods aver,classroom",
    "kdcli compare --recipe cifar100/r56-r20 --methods kd,aver,classroom --seeds 3",
)


def compare(
    ctx: typer.Context,
    run: o.RunName = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Separated by commas (default: aver,classroom); the control is always added.", metavar="A,B",
            rich_help_panel=o.CLASSROOM,
        ),
    ] = None,
    student: o.Student = None,
    teacher: o.Teacher = None,
    peers: o.Peers = None,
    method: o.Method = None,
    recipe: o.From = None,
    data: o.Data = None,
    data_root: o.Root = None,
    skip_corrupt: o.SkipCorrupt = False,
    epochs: o.Epochs = None,
    seeds: o.Seeds = None,
    independent: Annotated[
        bool,
        typer.Option(
            "--independent", help="Give every seed its own stream of images instead of one for all.",
            rich_help_panel=o.TRAINING,
        ),
    ] = False,
    sets: o.Set = None,
    resume: o.Resume = None,
    device: o.Device = None,
    gpus: o.Gpus = None,
    bank: o.Bank = False,
    out: o.Out = None,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Compare methods on one classroom: the same images and mentors, paired differences, a verdict.

    Without a recipe the newest run's classroom is used, and with no run at all the quickstart's.
    """
    o.no_flags_with_resume(
        resume, data=data, student=student, teacher=teacher, peers=peers, method=method, recipe=recipe, epochs=epochs,
        set=sets, out=out, independent=independent, methods=methods, seeds=seeds, run=run, data_root=data_root,
        skip_corrupt=skip_corrupt, bank=bank,
    )  # fmt: skip
    from kdcli.cli import tables
    from kdcli.errors import RecipeError
    from kdcli.system import user_code
    from kdcli.workflows import compare as workflow, distill

    picked = o.place(ctx, device, gpus)
    if name := resume or distill.interrupted_run():
        folder = distill.to_resume(name, "compare", finished_too=True)
        found = workflow.resume(folder, picked, tables.follower(quiet=json))
    else:
        if run and recipe:
            raise RecipeError(f"both the run {run} and --recipe {recipe} are named", hint="Name one of them.")
        base, why = (recipe, "") if recipe or (data and not run) else _base(run)
        config, notes = o.assemble(
            base, data=data, root=data_root, student=student, teacher=teacher, peers=peers, method=method,
            epochs=epochs, skip_corrupt=skip_corrupt, bank=bank, sets=sets,
        )  # fmt: skip
        given = ("aver,classroom" if methods is None else methods).split(",")
        names = [user_code.resolve(name.strip()) for name in given if name.strip()]
        if not names:
            raise RecipeError("--methods: no method is named", hint="For example --methods aver,classroom")
        if why:
            notes.append(("classroom", why, "given" if run else "no recipe or data was given"))
        follow = tables.follower(notes, quiet=json)
        numbers = o.seeds(seeds or "2")
        found = workflow.compare(config, names, numbers, picked, follow, independent=independent, out=out)
    if json:
        print(found.json())
        return
    show(found)
    tables.line("run", found.run)
    tables.next_line(f"kdcli export --onnx {found.runs[found.stands_for]}")


def _base(run: str | None) -> "tuple[Recipe, str]":
    """The recipe of the named or the newest run with mentors, or the quickstart's where there is none."""
    from kdcli import recipe as recipes
    from kdcli.errors import RecipeError
    from kdcli.training import run as runs

    found = [runs.find(run, learner=False)] if run else runs.every()[::-1]
    for one in found:
        if one.recipe.classroom.teacher:  # a model trained alone has no classroom to compare in
            return one.recipe, f"that of run {one.name}"
    if run:
        raise RecipeError(f"{found[0].path} has no mentors", hint="Name a run of distill or compare, or a --recipe.")
    return recipes.load("quickstart"), "the quickstart's (no run here has mentors)"


def show(found: "Comparison") -> None:
    """Print a comparison's table, with what its words mean."""
    from kdcli.cli import tables
    from kdcli.workflows import compare as workflow

    table = workflow.table(found)
    tables.table(table["columns"], table["rows"], title=table["title"])
    if found.source:
        tables.line("published", f"{found.source} ({found.epoch} epoch)")
    tables.console.print(
        f"[dim]{found.metric.label}: mean ± spread over seeds, of what ships; gain: points over nokd, the control, "
        "paired by seed.[/]"
    )
