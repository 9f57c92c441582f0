"""kdcli train: one model alone, into the user's zoo."""

from typing import Annotated

import typer

from kdcli.cli import options as o

EXAMPLES = (
    "kdcli train --model resnet34@pretrained --data folder:DIR",
    "kdcli train --model cifar_resnet14 --data cifar100 --recipe cifar100/mentor --keep 20,60",
)


def train(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            help="NAME trains from scratch, NAME@pretrained fine-tunes.", metavar="NAME", rich_help_panel=o.CLASSROOM
        ),
    ] = None,
    recipe: o.From = None,
    data: o.Data = None,
    data_root: o.Root = None,
    skip_corrupt: o.SkipCorrupt = False,
    epochs: o.Epochs = None,
    seed: o.Seed = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Epochs whose weights are kept, to be used as weaker mentors.", metavar="E1,E2",
            rich_help_panel=o.TRAINING,
        ),
    ] = None,
    sets: o.Set = None,
    resume: o.Resume = None,
    device: o.Device = None,
    gpus: o.Gpus = None,
    out: o.Out = None,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Train or fine-tune one model and add it to your zoo, where its name alone finds it for the same data."""
    o.no_flags_with_resume(
        resume, model=model, data=data, recipe=recipe, epochs=epochs, seed=seed, set=sets, out=out, keep=keep,
        data_root=data_root, skip_corrupt=skip_corrupt,
    )  # fmt: skip
    from kdcli import recipe as recipes
    from kdcli.cli import tables
    from kdcli.errors import RecipeError
    from kdcli.recipe import Recipe
    from kdcli.workflows import distill as workflow

    picked = o.place(ctx, device, gpus)
    if name := resume or workflow.interrupted_run():
        run = workflow.to_resume(name, "train", finished_too=True)  # it may have finished and not be in the zoo yet
        config, kept = run.recipe, set(run.provenance.get("keep", []))
        result = workflow.resume(run, picked, tables.follower(quiet=json))
    else:
        if not model:
            raise RecipeError("no model is named", hint="Add --model NAME; `kdcli models` searches the names.")
        base = Recipe() if recipe is None else recipes.load(recipe)
        config, notes = o.assemble(
            recipe, data=data, root=data_root, student=model, method="nokd", epochs=epochs, seed=seed,
            skip_corrupt=skip_corrupt, sets=sets,
        )  # fmt: skip
        config = config.with_(**{"classroom.teacher": None, "classroom.peers": [], "stage": []})
        if str(base.classroom.student).partition("@")[0] != model.partition("@")[0]:
            config = config.with_(expect=None)  # the recipe's published figures are another network's
        kept = _epochs(keep, config.train.epochs)
        follow = tables.follower(notes, quiet=json)
        result = workflow.distill(config, picked, follow, out=out, kind="train", keep=kept)
    if json:
        tables.as_json(result.json())
        return
    tables.result(result)
    arch, card = str(config.classroom.student).partition("@")[0], result.zoo
    assert card is not None
    tables.line(
        "zoo", f"{card.architecture} on {card.dataset}, {card.value:.2f} {card.metric.unit} ({card.sha256[:12]})"
    )
    for epoch in sorted(kept):
        tables.line("kept", f"{arch}@{result.run.path}#{epoch}")
    task = "" if config.task == "classify" else f" --set task={config.task}"
    tables.next_line(f"kdcli distill --teacher {arch} --student NAME --data {config.data.name}{task}")


def _epochs(text: str | None, last: int) -> set[int]:
    from kdcli.errors import RecipeError

    try:
        epochs = {int(part) for part in (text or "").split(",") if part.strip()}
    except ValueError:
        raise RecipeError(f"--keep {text}: not a list of epochs", hint="For example --keep 20,60") from None
    if any(not 1 <= epoch <= last for epoch in epochs):
        raise RecipeError(f"--keep {text}: this training has epochs 1 to {last}", hint="Name epochs within it.")
    return epochs
