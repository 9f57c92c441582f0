"""kdcli distill: one student, one method."""

from kdcli.cli import options as o

EXAMPLES = (
    "kdcli distill --teacher resnet34 --peers mobilenetv3_small,regnetx_004 --student resnet18 --data imagenet",
    "kdcli distill --recipe cifar100/r110-r20 --epochs 60",
)


def distill(
    data: o.Data = None,
    student: o.Student = None,
    teacher: o.Teacher = None,
    peers: o.Peers = None,
    method: o.Method = None,
    recipe: o.From = None,
    epochs: o.Epochs = None,
    seed: o.Seed = None,
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
    """Train one student with one method; the newest run is then what export, evaluate and bench take."""
    o.no_flags_with_resume(
        resume, data=data, student=student, teacher=teacher, peers=peers, method=method, recipe=recipe, epochs=epochs,
        seed=seed, set=sets, out=out, data_root=data_root, skip_corrupt=skip_corrupt, bank=bank,
    )  # fmt: skip
    from kdcli.cli import tables
    from kdcli.training import run as runs
    from kdcli.workflows import distill as room

    picked = o.place(device, gpus)
    resume = resume or room.begun()
    if resume:
        run = to_resume(resume, "distill")
        config, notes = run.recipe, []
    else:
        config, notes = o.assemble(
            recipe, data=data, root=data_root, student=student, teacher=teacher, peers=peers, method=method,
            epochs=epochs, seed=seed, skip_corrupt=skip_corrupt, bank=bank, sets=sets,
        )  # fmt: skip
        run = room.run_folder(out, config, config.method.label)
    outcome = train_one(config, run, picked, "distill", notes=notes, resume=bool(resume), quiet=json)
    if json:
        tables.as_json(outcome)
        return
    tables.next_line("kdcli export --onnx" + ("" if run.path.parent == runs.ROOT else f" {run.path}"))


def to_resume(name, kind, *, finished_too=False):
    """The run that --resume names. Raises RecipeError when it is finished, or another command's."""
    from kdcli.errors import RecipeError
    from kdcli.system import distributed
    from kdcli.training import run as runs

    run = runs.find(name, learner=False)
    for whole in map(runs.Run, reversed([*run.path.parents][:3])):
        if whole.begun and (whole.kind == "compare" or "stages" in whole.provenance):
            raise RecipeError(f"{run.path} is a part of {whole.path}", hint=f"kdcli {whole.kind} --resume {whole.path}")
    if run.kind != kind:
        raise RecipeError(f"{run.path} is a {run.kind}", hint=f"kdcli {run.kind} --resume {run.path}")
    if run.finished and not finished_too and not distributed.restarts():  # a rank may have died after the end
        raise RecipeError(f"{run.path} is finished", hint=f"`kdcli runs show {run.path}` prints it.")
    run.check_methods()
    return run


def train_one(config, run, device, kind, *, notes, resume=False, quiet=False, keep=None):
    """Train one recipe into `run` and print its outcome; shared by distill and train."""
    import contextlib

    from kdcli import methods
    from kdcli.cli import tables
    from kdcli.workflows import distill as room, stages

    label = config.method.label
    with contextlib.ExitStack() as stack:
        if resume:
            stack.enter_context(run.writing())
        if (whole := stages.plan(config)).stages:
            checked = None if resume else stages.check(whole, room.data_of(config, device), device)
            if not resume:
                stack.enter_context(run.writing())
            stages.learn(config, run, device, teller(notes, quiet), checked=checked)
            return told(config, run, quiet)
        _, classroom = room.open_room(config, device, mentors=methods.find(config.method.name).teachers > 0)
        session = room.open_session({label: config}, classroom, run, {label: run}, keep)
        if not quiet:
            tables.notes([*notes, *classroom.notes])
        if resume:
            room.same_room(run, classroom)
        else:  # only now, so that what cannot be trained leaves no folder
            stack.enter_context(run.writing())
            room.start(session, kind, classroom)
        said = config.classroom.student.partition("@")[0] if kind == "train" else label
        tables.follow(room.go(session, resume=resume), said, quiet=quiet)
    return told(config, run, quiet)


def teller(notes, quiet):
    """Shows what was chosen for each classroom of several, then follows its training."""
    from kdcli.cli import tables

    def follow(classroom, events, label):
        if not quiet:
            tables.notes([*notes, *classroom.notes])
            tables.line("now", label)
        tables.follow(events, label, quiet=quiet)

    return follow


def told(config, run, quiet):
    """Print a finished run's outcome, and return it as data."""
    from kdcli.cli import tables
    from kdcli.system import distributed
    from kdcli.workflows import distill as room

    label = config.method.label
    result = distributed.on_rank0(lambda: room.result(label, run))
    facts = distributed.on_rank0(lambda: run.provenance)
    stages = facts.get("stages", {})
    if not quiet:
        metric = result.metric
        published = config.expect.of(metric.name).get(label) if config.expect else None
        rows = [[metric.title, f"{result.value:.2f}"], ["of epoch", result.epoch]]
        rows.append([f"last epoch {metric.unit}", f"{result.last:.2f}"])
        rows.append([f"best epoch {metric.unit} ({result.best_epoch})", f"{result.best:.2f}"])
        if config.expect and published is not None:
            measured = result.best if config.expect.epoch == "best" else result.last
            within = abs(measured - published) <= config.expect.tolerance
            rows.append([f"published ({config.expect.epoch} epoch) {metric.unit}", f"{published:.2f}"])
            rows.append(["", "reproduced" if within else f"off by {measured - published:+.2f}"])
        rows += [[f"stage {name} {metric.unit}", f"{one['score'][metric.name]:.2f}"] for name, one in stages.items()]
        tables.table(["", f"{facts['data']['name']} test"], rows)
        tables.line("run", run.path)
    plain = {name: {**one, **one["score"]} for name, one in stages.items()}
    return {**result.json(), **({"stages": plain} if stages else {})}
