"""kdcli runs: list, show and remove what was trained here."""

from typing import Annotated

import typer

from kdcli.cli import options as o

app = typer.Typer(no_args_is_help=True, help="The runs under runs/: list, show, remove.")


@app.command("ls", epilog="Examples:\n\nkdcli runs ls\n\nkdcli runs ls --json")
def ls(json: o.Json = False) -> None:
    """List the runs, oldest first."""
    from kdcli.cli import tables
    from kdcli.training import run as runs

    found = []
    for run in runs.every():
        facts, recipe = run.provenance, run.recipe
        found.append({
            "run": run.name, "kind": run.kind, "student": recipe.classroom.student, "method": recipe.method.label,
            "data": recipe.data.name, **(run.score or {run.metric.name: None}), "metric": run.metric.name,
            "finished": run.finished, "size": run.size(),
            "started": facts.get("started"),
        })  # fmt: skip
    if json:
        tables.as_json(found)
        return
    if not found:
        tables.console.print("no runs under runs/ yet")
        tables.next_line("kdcli quickstart")
        return
    rows = [
        [f["run"], f["kind"], f["student"], f["method"], f["data"],
         "" if f[f["metric"]] is None else f"{f[f['metric']]:.2f}", "done" if f["finished"] else "stopped",
         tables.size(f["size"])]
        for f in found
    ]  # fmt: skip
    tables.table(["run", "kind", "student", "method", "data", "score %", "state", "size"], rows, left=5)
    last = found[-1]
    tables.next_line(f"kdcli runs show {last['run']}")


@app.command("show", epilog="Examples:\n\nkdcli runs show\n\nkdcli runs show runs/my-run --json")
def show_run(run: o.RunName = None, json: o.Json = False) -> None:
    """Show a run: its origin and its last metrics."""
    from kdcli.cli import tables
    from kdcli.training import run as runs

    found = runs.find(run, learner=False)
    facts, rows = found.provenance, found.metrics()
    if json:
        tables.as_json({"run": str(found.path), "provenance": facts, "metrics": rows})
        return
    plain = ("kind", "command", "started", "device", "recipe", "epoch", "best", "best_epoch")
    known = {key: facts[key] for key in plain if key in facts} | found.score
    lines = [[key, f"{fact:.2f}" if isinstance(fact, float) else fact] for key, fact in known.items()]
    lines += [["data", f"{facts['data']['name']} ({facts['data']['hash'][:12]})"]]
    lines += [[f"mentor {name}", f"{m['architecture']} ({m['sha256'][:12]})"] for name, m in facts["mentors"].items()]
    for name in facts.get("stages", {}):
        stage = runs.Run(found.path / "stages" / name)
        lines += [[f"stage {name}", f"{stage.score[stage.metric.name]:.2f}" if stage.done else "not finished"]]
    lines += [["state", "done" if found.finished else f"stopped after {len(rows)} epochs"]]
    tables.table([found.name, ""], lines, left=2)
    if found.kind == "compare":
        if found.finished:
            from kdcli.cli.compare import show
            from kdcli.workflows.compare import summarise

            show(summarise(found))
    elif rows:
        tables.table(["last epoch", ""], [[key, f"{value:.4g}"] for key, value in rows[-1].items()])
    verb = "compare" if found.kind == "compare" else "train" if found.kind == "train" else "distill"
    tables.next_line(
        "kdcli export --onnx " + str(found.path) if found.finished else f"kdcli {verb} --resume {found.path}"
    )


@app.command("rm", epilog="Examples:\n\nkdcli runs rm my-run\n\nkdcli runs rm my-run --yes")
def rm(
    run: Annotated[str, typer.Argument(help="A run's folder or name.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Remove a run's folder."""
    from kdcli.cli import tables
    from kdcli.system import lock
    from kdcli.training import run as runs

    found = runs.find(run, learner=False)
    lock.check(found.path)
    if not yes:
        typer.confirm(f"Remove {found.path} ({tables.size(found.size())})?", abort=True)
    found.remove()
    tables.line("removed", found.path)
    tables.next_line("kdcli runs ls")
