"""kdcli check: a classroom looked over before anything is trained; a method put to the contract."""

from typing import Annotated, Any

import typer

from kdcli.cli import options as o

EXAMPLES = (
    "kdcli check --recipe cifar100/r110-r20",
    "kdcli check --method my_file.py:Mine",
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
    """Resolve a recipe without training: names, sizes, weights, each mentor's score, a dry step, the cost.

    With --method and no classroom: put the method to the contract that all methods keep, on toys (a method of your own
    is put to it in any case).
    """
    from dataclasses import asdict

    from kdcli import recipe as recipes
    from kdcli.cli import tables
    from kdcli.system import device as devices, user_code
    from kdcli.workflows import check as room

    given = recipes.parse_set(sets or [])
    named = given.get("method.name", method)
    if named and not any((data, student, teacher, peers, recipe)) and all(key.startswith("method.") for key in given):
        own_options = {key.removeprefix("method."): value for key, value in given.items() if key != "method.name"}
        found = _contract(user_code.resolve(named), own_options, device, json)
        if json:
            tables.as_json(found)
        _judge(user_code.label(named), found["checks"])
        if not json:
            flag = o.typed("kdcli distill", sets, False, method=method)
            tables.next_line(f"{flag} --teacher NAME --student NAME --data NAME")
        return
    config, notes = o.assemble(
        recipe, data=data, root=data_root, student=student, teacher=teacher, peers=peers, method=method,
        epochs=epochs, seed=seed, skip_corrupt=skip_corrupt, sets=sets,
    )  # fmt: skip
    found = room.look(config, devices.pick(device), images)
    facts = {**asdict(found), "notes": [*notes, *found.notes]}
    if not json:
        _show_room(found, notes)
    verdicts = []
    if user_code.named(config.method.name):
        facts["contract"] = _contract(config.method.name, config.method.options, device, json)
        verdicts = facts["contract"]["checks"]
    if json:
        tables.as_json(facts)
    _judge(config.method.label, verdicts)
    if json:
        return
    again = o.typed(
        "kdcli distill", sets, skip_corrupt, recipe=recipe, teacher=teacher, peers=peers, student=student, data=data,
        method=method, epochs=epochs, seed=seed, data_root=data_root, device=device,
    )  # fmt: skip
    tables.next_line(again)


def _show_room(found, notes) -> None:
    from kdcli.cli import tables

    tables.notes([*notes, *found.notes])
    columns = ["role", "name", "parameters", "multiply-adds", "input", found.metric.title]
    rows = [
        [s.role, s.name, f"{s.params:,}", tables.count(s.macs), f"{text(s.input_size)} px",
         f"{s.score[found.metric.name]:.2f}" if s.score else ""]
        for s in found.rows
    ]  # fmt: skip
    tables.table(columns, rows, left=2)
    for name, taps in found.taps.items():
        listed = ", ".join(f"{tap} {'x'.join(map(str, shape))}" for tap, shape in taps.items())
        tables.line("", f"taps of {name}: {listed}")
    for line in found.words:
        tables.line("", line)
    tables.line("", f"{found.epochs} epochs: about {tables.duration(found.seconds)}")
    for line in found.warnings:
        tables.line("warning:", line, style="yellow")


def _contract(name: str, options: dict[str, Any], device: str | None, quiet: bool) -> dict[str, Any]:
    """Describe a method and run every check of its contract, printed unless `quiet`; the same as data."""
    from dataclasses import asdict

    from kdcli import methods
    from kdcli.cli import tables
    from kdcli.system import device as devices, user_code
    from kdcli.workflows import method_contract

    label, method = user_code.label(name), methods.build(name, options)
    known = [
        {"name": one.name, "type": one.words, "default": one.default, "doc": one.doc}
        for one in methods.options(name).values()
    ]
    about = {"mentors": method.teachers, "tasks": sorted(method.tasks), "needs": sorted(method.needs)}
    if not quiet:
        rows = [[one["name"], one["type"], _value(one["default"]), one["doc"]] for one in known]
        if rows:
            tables.table(["option", "type", "default", "what it does"], rows, title=f"options of {label}", left=4)
        tables.line("mentors:", f"{method.teachers} or more" if method.teachers else "none")
        tables.line("tasks:", ", ".join(about["tasks"]))
        for need in sorted(method.needs):
            tables.line("needs:", f"{need}: {methods.fields.docs(methods.Need)[need.name]}")
    verdicts = list(method_contract.examine(name, options, devices.pick(device)))
    if not quiet:
        rows = [[one.check, one.result, one.reason] for one in verdicts]
        tables.table(["check", "result", "why"], rows, title=f"contract of {label}", left=3)
    checks = [asdict(one) for one in verdicts]
    return {"method": label, "options": options, "known_options": known, **about, "checks": checks}


def _value(default: Any) -> str:
    """A default as it is written in a recipe; an option that is left out has none."""
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default is None else str(list(default) if isinstance(default, tuple) else default)


def _judge(label: str, verdicts: list[dict[str, Any]]) -> None:
    """Raise RecipeError (exit 2) when a check failed."""
    from kdcli.errors import RecipeError

    failed = [one["check"] for one in verdicts if one["result"] == "failed"]
    if failed:
        raise RecipeError(
            f"method {label} fails {len(failed)} of {len(verdicts)} checks: {', '.join(failed)}",
            hint="The table says why; kdcli/workflows/method_contract.py is what they do.",
        )
