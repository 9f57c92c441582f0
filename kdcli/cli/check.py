"""kdcli check: a classroom before anything is trained; a method's options and its contract."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.cli import options as o

if TYPE_CHECKING:
    from kdcli.workflows.check import Checked

EXAMPLES = (
    "kdcli check --recipe cifar100/r110-r20",
    "kdcli check --method my_file.py:Mine",
)


def check(
    student: o.Student = None,
    teacher: o.Teacher = None,
    peers: o.Peers = None,
    method: o.Method = None,
    recipe: o.From = None,
    data: o.Data = None,
    data_root: o.Root = None,
    skip_corrupt: o.SkipCorrupt = False,
    images: Annotated[
        int,
        typer.Option(help="Score mentors on at most this many test images; 0: all.", min=0, rich_help_panel=o.DATA),
    ] = 2000,
    epochs: o.Epochs = None,
    seed: o.Seed = None,
    sets: o.Set = None,
    device: o.Device = None,
    json: o.Json = False,
) -> None:
    """Check a recipe without training: names, sizes, weights, each mentor's score, a few steps, the cost.

    With --method and no classroom: list the method's options, tasks and needs, and test the contract of all methods on
    small networks. A method of your own is tested in any case.
    """
    from kdcli import recipe as recipes
    from kdcli.cli import tables
    from kdcli.system import device as devices, user_code
    from kdcli.workflows import check as workflow

    given = recipes.parse_set(sets or [])
    named = given.get("method.name", method)
    if named and not any((data, student, teacher, peers, recipe)) and all(key.startswith("method.") for key in given):
        own_options = {key.removeprefix("method."): value for key, value in given.items() if key != "method.name"}
        contract = _contract(user_code.resolve(named), own_options, device, json)
        if json:
            tables.as_json(contract)
        _judge(user_code.label(named), contract["checks"])
        if not json:
            flag = o.typed("kdcli distill", sets, False, method=method)
            tables.next_line(f"{flag} --teacher NAME --student NAME --data NAME")
        return
    config, notes = o.assemble(
        recipe, data=data, root=data_root, student=student, teacher=teacher, peers=peers, method=method,
        epochs=epochs, seed=seed, skip_corrupt=skip_corrupt, sets=sets,
    )  # fmt: skip
    found = workflow.check(config, devices.pick(device), images)
    found.notes[:0] = notes
    if not json:
        _show(found)
    plain, verdicts = found.json(), []
    if user_code.named(config.method.name):
        plain["contract"] = _contract(config.method.name, config.method.options, device, json)
        verdicts = plain["contract"]["checks"]
    if json:
        tables.as_json(plain)
    _judge(config.method.label, verdicts)
    if json:
        return
    again = o.typed(
        "kdcli distill", sets, skip_corrupt, recipe=recipe, teacher=teacher, peers=peers, student=student, data=data,
        method=method, epochs=epochs, seed=seed, data_root=data_root, device=device,
    )  # fmt: skip
    tables.next_line(again)


def _show(found: "Checked") -> None:
    from kdcli.cli import tables
    from kdcli.system.sizes import text
    from kdcli.workflows.check import epochs

    tables.notes(found.notes)
    columns = ["role", "name", "parameters", "multiply-adds", "input", found.metric.title]
    rows = [
        [row.role, row.name, f"{row.params:,}", tables.count(row.macs), f"{text(row.input_size)} px",
         f"{row.score[found.metric.name]:.2f}" if row.score else ""]
        for row in found.rows
    ]  # fmt: skip
    tables.table(columns, rows, left=2)
    for name, taps in found.taps.items():
        listed = ", ".join(f"{tap} {'x'.join(map(str, shape))}" for tap, shape in taps.items())
        tables.line("", f"taps of {name}: {listed}")
    for fact in found.facts:
        tables.line("", fact)
    tables.line("", f"{epochs(found.epochs)}, estimated time: {tables.duration(found.seconds)}")
    for warning in found.warnings:
        tables.line("warning:", warning, style="yellow")


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
            hint="The table gives the reasons; kdcli/workflows/method_contract.py holds the checks.",
        )
