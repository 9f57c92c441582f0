"""kdcli distill: one student, one method."""

import typer

from kdcli.cli import options as o

EXAMPLES = (
    "kdcli distill --teacher resnet34 --peers mobilenetv3_small,regnetx_004 --student resnet18 --data imagenet",
    "kdcli distill --recipe cifar100/r110-r20 --epochs 60",
)


def distill(
    ctx: typer.Context,
    student: o.Student = None,
    teacher: o.Teacher = None,
    peers: o.Peers = None,
    method: o.Method = None,
    recipe: o.From = None,
    data: o.Data = None,
    data_root: o.Root = None,
    skip_corrupt: o.SkipCorrupt = False,
    epochs: o.Epochs = None,
    seed: o.Seed = None,
    sets: o.Set = None,
    resume: o.Resume = None,
    device: o.Device = None,
    gpus: o.Gpus = None,
    bank: o.Bank = False,
    out: o.Out = None,
    json: o.Json = False,
) -> None:
    """Train one student with one method; export, evaluate and bench then use this run, the newest."""
    o.no_flags_with_resume(
        resume, data=data, student=student, teacher=teacher, peers=peers, method=method, recipe=recipe, epochs=epochs,
        seed=seed, set=sets, out=out, data_root=data_root, skip_corrupt=skip_corrupt, bank=bank,
    )  # fmt: skip
    from kdcli.cli import tables
    from kdcli.training import run as runs
    from kdcli.workflows import distill as workflow

    picked = o.place(ctx, device, gpus)
    if name := resume or workflow.interrupted_run():
        result = workflow.resume(workflow.to_resume(name, "distill"), picked, tables.follower(quiet=json))
    else:
        config, notes = o.assemble(
            recipe, data=data, root=data_root, student=student, teacher=teacher, peers=peers, method=method,
            epochs=epochs, seed=seed, skip_corrupt=skip_corrupt, bank=bank, sets=sets,
        )  # fmt: skip
        result = workflow.distill(config, picked, tables.follower(notes, quiet=json), out=out)
    if json:
        tables.as_json(result.json())
        return
    tables.result(result)
    tables.next_line("kdcli export --onnx" + ("" if result.run.path.parent == runs.ROOT else f" {result.run.path}"))
