"""kdcli check: a classroom looked over before anything is trained."""

from typing import Annotated

import typer

from kdcli.cli import options as o

EXAMPLES = (
    "kdcli check --recipe cifar100/r110-r20",
    "kdcli check --teacher resnet34 --student resnet18 --data folder:pictures",
)


def check(
    data: o.Data = None,
    student: o.Student = None,
    teacher: o.Teacher = None,
    peers: o.Peers = None,
    method: o.Method = None,
    recipe: o.From = None,
    images: Annotated[int, typer.Option(help="Score mentors on at most this many test images; 0: all.")] = 2000,
    epochs: o.Epochs = None,
    seed: o.Seed = None,
    sets: o.Set = None,
    data_root: o.Root = None,
    skip_corrupt: o.SkipCorrupt = False,
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Resolve a recipe without training: names, sizes, weights, each mentor's score, a dry step, the cost."""
    from dataclasses import asdict

    from kdcli import check as room, device as devices
    from kdcli.cli import show

    config, notes = o.assemble(
        recipe, data=data, root=data_root, student=student, teacher=teacher, peers=peers, method=method,
        epochs=epochs, seed=seed, skip_corrupt=skip_corrupt, sets=sets,
    )  # fmt: skip
    found = room.look(config, devices.pick(device), images)
    if json:
        show.as_json({**asdict(found), "notes": [*notes, *found.notes]})
        return
    show.notes([*notes, *found.notes])
    columns = ["role", "name", "parameters", "multiply-adds", "input", "top-1 %"]
    rows = [
        [s.role, s.name, f"{s.params:,}", show.count(s.macs), f"{s.input_size} px",
         "" if s.top1 is None else f"{s.top1:.2f}"]
        for s in found.seats
    ]  # fmt: skip
    show.table(columns, rows, left=2)
    for name, taps in found.taps.items():
        listed = ", ".join(f"{tap} {'x'.join(map(str, shape))}" for tap, shape in taps.items())
        show.line("", f"taps of {name}: {listed}")
    for line in found.words:
        show.line("", line)
    show.line("", f"{config.train.epochs} epochs: about {show.duration(found.seconds)}")
    for line in found.warnings:
        show.line("warning:", line, style="yellow")
    again = o.typed(
        "kdcli distill", sets, skip_corrupt, recipe=recipe, teacher=teacher, peers=peers, student=student, data=data,
        method=method, epochs=epochs, seed=seed, data_root=data_root, device=device,
    )  # fmt: skip
    show.next_line(again)
