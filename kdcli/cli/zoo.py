"""kdcli zoo: trained mentors, with score, hash, licence and origin."""

from pathlib import Path
from typing import Annotated

import typer

from kdcli.cli import options as o

app = typer.Typer(no_args_is_help=True, help="Trained mentors: list, add, verify.")


@app.command("ls", epilog="Examples:\n\nkdcli zoo ls\n\nkdcli zoo ls --json")
def ls(json: o.Json = False) -> None:
    """List the models of your zoo and the cards that ship with kdcli."""
    from kdcli.cli import tables
    from kdcli.models import cards as zoo

    cards = zoo.cards()
    if json:
        tables.as_json(
            [
                {**card.model_dump(mode="json"), **card.score, "weights": str(zoo.weights_path(card) or "")}
                for card in cards
            ]
        )
        return
    rows = [
        [card.architecture, card.dataset, "" if card.value is None else f"{card.value:.2f}", card.epoch,
         card.sha256[:12], card.licence, card.origin, "here" if zoo.weights_path(card) else "card only"]
        for card in cards
    ]  # fmt: skip
    tables.table(["architecture", "data", "score %", "epoch", "sha256", "licence", "origin", "weights"], rows, left=2)
    tables.next_line("kdcli train --model NAME --data NAME")


@app.command(
    "add",
    epilog="Examples:\n\nkdcli zoo add runs/my-run\n\nkdcli zoo add net.th --data cifar10",
)
def add(
    what: Annotated[str, typer.Argument(help="A run, or a checkpoint file.")],
    architecture: Annotated[str | None, typer.Option(help="What the checkpoint is, unless a card knows it.")] = None,
    data: o.Data = None,
    licence: Annotated[str, typer.Option(help="Under which licence it may be used.")] = "",
    data_root: o.Root = None,
    json: o.Json = False,
) -> None:
    """Add a run's student or a checkpoint file to your zoo; a file is scored on its data first."""
    from kdcli.cli import tables
    from kdcli.training import run as runs
    from kdcli.workflows.distill import into_zoo

    if Path(what).is_file():
        card = _from_file(Path(what), architecture, data, licence, data_root)
    else:
        card = into_zoo(runs.find(what))
    if json:
        tables.as_json({**card.model_dump(mode="json"), **card.score})
        return
    tables.line("added", f"{card.line()} ({card.sha256[:12]})")
    tables.next_line("kdcli zoo ls")


@app.command("verify", epilog="Examples:\n\nkdcli zoo verify\n\nkdcli zoo verify --json")
def verify(json: o.Json = False) -> None:
    """Check every file of your zoo against its card's sha256."""
    from kdcli.cli import tables
    from kdcli.errors import WeightsError
    from kdcli.models import cards as zoo

    found = [(card, *zoo.verify(card)) for card in zoo.cards(shipped=False)]
    if json:
        tables.as_json([{"model": card.line(), "state": state, "detail": detail} for card, state, detail in found])
    else:
        tables.table(["model", "state", ""], [[card.line(), state, detail] for card, state, detail in found], left=3)
    bad = [card for card, state, _ in found if state != "ok"]
    if bad:
        paths = ", ".join(str(card.path) for card in bad)
        raise WeightsError(
            f"{len(bad)} of {len(found)} models are not what their cards say: {paths}",
            hint="Remove the card and its weights, and train the model again with `kdcli train`.",
        )


def _from_file(path: Path, architecture: str | None, data: str | None, licence: str, root: str | None):
    import torch

    from kdcli.cli.resolve import mentor_on
    from kdcli.errors import RecipeError
    from kdcli.models import cards as zoo
    from kdcli.recipe import Recipe
    from kdcli.tasks import TASKS
    from kdcli.training import student
    from kdcli.training.evaluate import score

    known = zoo.identify(path)
    architecture = architecture or (known.architecture if known else None)
    if architecture is None or data is None:
        raise RecipeError(
            f"{path}: which network is it, and for which data?", hint="Add --architecture NAME --data NAME."
        )
    over = {"data.name": data, "data.root": root} if root else {"data.name": data}
    recipe = Recipe().with_(**over)
    member, opened = mentor_on(f"{architecture}@{path}", recipe, torch.device("cpu"))
    task = TASKS[recipe.task](len(opened.classes))
    found = score(member, opened.test, task, torch.device("cpu"))
    card = student.card(
        member, opened, task=task.name, epoch=None, score=found, origin=known.origin if known else str(path)
    )
    card = card.model_copy(update={"licence": licence or (known.licence if known else "")})
    return zoo.add(member.net.state_dict(), card)
