"""kdcli zoo: trained models with their score, hash, licence and origin."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kdcli.cli import options as o

app = typer.Typer(no_args_is_help=True, help="Trained models: list, add, verify.")


@app.command("ls", epilog="Examples:\n\nkdcli zoo ls\n\nkdcli zoo ls --json")
def ls(json: o.Json = False) -> None:
    """List the models of your zoo and the cards that ship with kdcli."""
    from kdcli.cli import tables
    from kdcli.models import cards

    found = cards.cards()
    if json:
        tables.as_json([{**_facts(card), "weights": str(cards.weights_path(card) or "")} for card in found])
        return
    rows = [
        [card.architecture, card.dataset, "" if card.value is None else f"{card.metric.label} {card.value:.2f}",
         card.epoch, card.sha256[:12], card.licence, card.origin, "here" if cards.weights_path(card) else "card only"]
        for card in found
    ]  # fmt: skip
    tables.table(["architecture", "data", "score %", "epoch", "sha256", "licence", "origin", "weights"], rows, left=2)
    tables.next_line("kdcli train --model NAME --data NAME")


@app.command(
    "add",
    epilog="Examples:\n\nkdcli zoo add runs/my-run\n\n"
    "kdcli zoo add net.pth --architecture resnet18 --data npz:photos.npz --set task=multilabel",
)
def add(
    what: Annotated[str, typer.Argument(help="A run, or a checkpoint file.")],
    architecture: Annotated[
        str | None, typer.Option(help="The checkpoint's architecture, unless a shipped card lists the file.")
    ] = None,
    data: o.Data = None,
    licence: Annotated[str, typer.Option(help="The licence of the weights.")] = "",
    data_root: o.Root = None,
    sets: o.Set = None,
    json: o.Json = False,
) -> None:
    """Add a run's student or a checkpoint file to your zoo; a file is scored on its data first."""
    from kdcli.cli import tables
    from kdcli.training import run as runs
    from kdcli.workflows.distill import into_zoo

    if Path(what).is_file():
        card = _from_file(Path(what), architecture, data, licence, data_root, sets)
    else:
        card = into_zoo(runs.find(what))
    if json:
        tables.as_json(_facts(card))
        return
    tables.line("added", f"{card.line()} ({card.sha256[:12]})")
    tables.next_line("kdcli zoo ls")


@app.command("verify", epilog="Examples:\n\nkdcli zoo verify\n\nkdcli zoo verify --json")
def verify(json: o.Json = False) -> None:
    """Check every file of your zoo against its card's sha256."""
    from kdcli.cli import tables
    from kdcli.errors import WeightsError
    from kdcli.models import cards

    found = [(card, *cards.verify(card)) for card in cards.cards(shipped=False)]
    if json:
        tables.as_json([{"model": card.line(), "state": state, "detail": detail} for card, state, detail in found])
    else:
        tables.table(["model", "state", ""], [[card.line(), state, detail] for card, state, detail in found], left=3)
    bad = [card for card, state, _ in found if state != "ok"]
    if bad:
        paths = ", ".join(str(card.path) for card in bad)
        raise WeightsError(
            f"{len(bad)} of {len(found)} models differ from their cards: {paths}",
            hint="Delete the card and its weights, and train the model again with `kdcli train`.",
        )


def _facts(card: Any) -> dict[str, Any]:
    """A card as --json prints it, with its metrics at the top level too."""
    return {**card.model_dump(mode="json"), card.metric.name: card.value, **card.score}


def _from_file(
    path: Path, architecture: str | None, data: str | None, licence: str, root: str | None, sets: list[str] | None
) -> Any:
    """Score a checkpoint file on its data's test images and add it to the zoo; returns the card."""
    import torch

    from kdcli.cli.resolve import mentor_on
    from kdcli.errors import RecipeError
    from kdcli.models import cards
    from kdcli.recipe import Recipe, parse_set
    from kdcli.tasks import TASKS
    from kdcli.training import student
    from kdcli.training.evaluate import score

    public = cards.identify(path)
    architecture = architecture or (public.architecture if public else None)
    if architecture is None or data is None:
        raise RecipeError(
            f"{path}: its architecture or its data is not named", hint="Add --architecture NAME --data NAME."
        )
    over = {**parse_set(sets or []), "data.name": data, **({"data.root": root} if root else {})}
    recipe, cpu = Recipe().with_(**over), torch.device("cpu")
    member, opened = mentor_on(f"{architecture}@{path}", recipe, cpu)
    task = TASKS[recipe.task](len(opened.classes))
    found = score(member, opened.test, task, cpu)
    origin = public.origin if public else str(path)
    card = student.card(member, opened, task=task.name, epoch=None, score=found, origin=origin)
    card = card.model_copy(update={"licence": licence or (public.licence if public else "")})
    return cards.add(member.net.state_dict(), card)
