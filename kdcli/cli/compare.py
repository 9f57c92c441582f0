"""kdcli compare: methods and seeds on one classroom, with the no-teacher control."""

from typing import Annotated

import typer

from kdcli.cli import options as o

EXAMPLES = (
    "kdcli compare --methods aver,classroom",
    "kdcli compare --recipe cifar100/r56-r20 --methods kd,aver,classroom --seeds 3",
)


def compare(
    methods: Annotated[
        str | None,
        typer.Option(help="Separated by commas (default aver,classroom); the control is always added.", metavar="A,B"),
    ] = None,
    seeds: o.Seeds = None,
    independent: Annotated[
        bool, typer.Option("--independent", help="Tie the stream of pictures to the seed instead of sharing one.")
    ] = False,
    run: o.RunName = None,
    data: o.Data = None,
    student: o.Student = None,
    teacher: o.Teacher = None,
    peers: o.Peers = None,
    method: o.Method = None,
    recipe: o.From = None,
    epochs: o.Epochs = None,
    sets: o.Set = None,
    data_root: o.Root = None,
    skip_corrupt: o.SkipCorrupt = False,
    bank: o.Bank = False,
    device: o.Device = None,
    gpus: o.Gpus = None,
    out: o.Out = None,
    resume: o.Resume = None,
    json: o.Json = False,
) -> None:
    """Compare methods on one classroom: same pictures, same mentors, paired differences, a verdict.

    Without a recipe the newest run's classroom is used, and with no run at all the quickstart's.
    """
    o.no_flags_with_resume(
        resume, data=data, student=student, teacher=teacher, peers=peers, method=method, recipe=recipe, epochs=epochs,
        set=sets, out=out, independent=independent, methods=methods, seeds=seeds, run=run, data_root=data_root,
        skip_corrupt=skip_corrupt, bank=bank,
    )  # fmt: skip
    from kdcli.cli import tables
    from kdcli.cli.distill import to_resume
    from kdcli.errors import RecipeError
    from kdcli.system import user_code
    from kdcli.workflows import distill as room

    picked = o.place(device, gpus)
    resume = resume or room.begun()
    if resume:
        folder = to_resume(resume, "compare", finished_too=True)
        found = resumed(folder, picked, quiet=json)
    else:
        if run and recipe:
            raise RecipeError(f"both the run {run} and --recipe {recipe}", hint="Name one of them.")
        base, why = (recipe, "as asked") if recipe or (data and not run) else _base(run)
        config, notes = o.assemble(
            base, data=data, root=data_root, student=student, teacher=teacher, peers=peers, method=method,
            epochs=epochs, skip_corrupt=skip_corrupt, bank=bank, sets=sets,
        )  # fmt: skip
        asked = ("aver,classroom" if methods is None else methods).split(",")
        names = [user_code.resolve(name.strip()) for name in asked if name.strip()]
        if not names:
            raise RecipeError("--methods: no method is named", hint="For example --methods aver,classroom")
        if why != "as asked":
            notes.append(("classroom", why, "as asked" if run else "no recipe or data was given"))
        found = compared(config, names, o.seeds(seeds or "2"), picked, out, notes, independent=independent, quiet=json)
        folder = found[1]
    if json:
        print(found[0].json())
        return
    show_comparison(found[0])
    tables.line("run", folder.path)
    best = max(found[0].lines, key=lambda line: line.mean)
    tables.next_line(f"kdcli export --onnx {folder.path / f'{best.method}-{best.seeds[0]}'}")


def _base(run):
    """The newest run's recipe, or the quickstart's when nothing was ever run here."""
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


def compared(config, names, seeds, device, out, notes, *, independent=False, quiet=False):
    """Run a comparison; returns it and its folder."""
    from kdcli import methods as known
    from kdcli.cli import tables
    from kdcli.cli.distill import teller
    from kdcli.system import distributed
    from kdcli.workflows import compare as room, distill, quickstart

    for name in names:
        known.find(config.with_method(name).method.name)
    folder = distill.run_folder(out, config, "compare")
    quickstart.prepare_mentors(config, device, lambda e, s: tables.follow(e, s, quiet=quiet))
    room.check(config, names, seeds, device)
    if independent:
        with folder.writing():
            return room.independent(config, names, seeds, device, folder, teller(notes, quiet)), folder
    classroom = room.open_room(config, device)
    session = room.open_session(config, names, seeds, classroom, folder)
    if not quiet:
        tables.notes([*notes, *classroom.notes])
    with folder.writing():
        room.start(session, classroom, config, names, seeds)
        tables.follow(room.go(session), f"{len(session.learners)} students", quiet=quiet)
        room.staged(config, names, seeds, device, folder, teller([], quiet))
    return distributed.on_rank0(lambda: room.summarise(folder)), folder


def resumed(folder, device, *, quiet=False):
    """Continue a compare where it stopped."""
    from kdcli.cli import tables
    from kdcli.cli.distill import teller
    from kdcli.system import distributed
    from kdcli.workflows import compare as room, distill

    if distributed.on_rank0(lambda: folder.finished):
        return distributed.on_rank0(lambda: room.summarise(folder)), folder
    with folder.writing():
        config, facts = folder.recipe, folder.provenance
        names, seeds = room.again(folder), facts["train_seeds"]
        if facts["independent"]:
            room.independent(config, names, seeds, device, folder, teller([], quiet), resume=True)
        else:
            if not distributed.on_rank0(lambda: room.through(folder, config, names, seeds)):
                classroom = room.open_room(config, device)
                distill.same_room(folder, classroom)
                session = room.open_session(config, names, seeds, classroom, folder)
                tables.follow(room.go(session, resume=True), f"{len(session.learners)} students", quiet=quiet)
            room.staged(config, names, seeds, device, folder, teller([], quiet))
    return distributed.on_rank0(lambda: room.summarise(folder)), folder


def show_comparison(comparison) -> None:
    """The table, with what its words mean."""
    from kdcli.cli import tables
    from kdcli.workflows import compare as room

    table = room.table(comparison)
    tables.table(table["columns"], table["rows"], title=table["title"])
    if comparison.source:
        tables.line("published", f"{comparison.source} ({comparison.epoch} epoch)")
    tables.console.print(
        "[dim]top-1: mean ± spread over seeds, of what ships; gain: points over nokd, the control, paired by seed.[/]"
    )
