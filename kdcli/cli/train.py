"""kdcli train: one model alone, into the user's zoo."""

from typing import Annotated

import typer

from kdcli.cli import options as o

EXAMPLES = (
    "kdcli train --model resnet34@pretrained --data folder:pictures",
    "kdcli train --model cifar_resnet14 --data cifar100 --recipe cifar100/mentor --keep 20,60",
)


def train(
    model: Annotated[
        str | None, typer.Option(help="NAME trains from scratch, NAME@pretrained fine-tunes.", metavar="NAME")
    ] = None,
    data: o.Data = None,
    keep: Annotated[
        str | None, typer.Option(help="Epochs whose weights are kept as mentors of lesser skill.", metavar="E1,E2")
    ] = None,
    recipe: o.From = None,
    epochs: o.Epochs = None,
    seed: o.Seed = None,
    sets: o.Set = None,
    data_root: o.Root = None,
    skip_corrupt: o.SkipCorrupt = False,
    device: o.Device = None,
    gpus: o.Gpus = None,
    out: o.Out = None,
    resume: o.Resume = None,
    json: o.Json = False,
) -> None:
    """Train or fine-tune one model and add it to your zoo, where its bare name finds it for the same data."""
    o.no_flags_with_resume(
        resume, model=model, data=data, recipe=recipe, epochs=epochs, seed=seed, set=sets, out=out, keep=keep,
        data_root=data_root, skip_corrupt=skip_corrupt,
    )  # fmt: skip
    from kdcli import recipe as recipes
    from kdcli.cli import tables
    from kdcli.cli.distill import to_resume, train_one
    from kdcli.errors import RecipeError
    from kdcli.recipe import Recipe
    from kdcli.system import distributed
    from kdcli.workflows import distill as room

    picked = o.place(device, gpus)
    resume = resume or room.begun()
    if resume:
        run = to_resume(resume, "train", finished_too=True)  # one that was finished may not be in the zoo yet
        config, notes = run.recipe, []
        wanted = set(run.provenance.get("keep", []))
    else:
        if not model:
            raise RecipeError("no model is named", hint="Add --model NAME; `kdcli models` searches the names.")
        started = Recipe() if recipe is None else recipes.load(recipe)
        config, notes = o.assemble(
            recipe, data=data, root=data_root, student=model, method="nokd", epochs=epochs, seed=seed,
            skip_corrupt=skip_corrupt, sets=sets,
        )  # fmt: skip
        config = config.with_(**{"classroom.teacher": None, "classroom.peers": [], "stage": []})
        if str(started.classroom.student).partition("@")[0] != model.partition("@")[0]:
            config = config.with_(expect=None)  # the recipe's published figures are another network's
        run = room.run_folder(out, config, "train")
        wanted = _epochs(keep, config.train.epochs)
    outcome = train_one(config, run, picked, "train", notes=notes, resume=bool(resume), quiet=json, keep=wanted)
    added, name = distributed.on_rank0(lambda: into_zoo(run)), str(config.classroom.student).partition("@")[0]
    if json:
        tables.as_json({**outcome, "zoo": {**added.model_dump(), **added.score}})
        return
    tables.line(
        "zoo", f"{added.architecture} on {added.dataset}, {added.value:.2f} {added.metric.unit} ({added.sha256[:12]})"
    )
    for epoch in sorted(wanted):
        tables.line("kept", f"{name}@{run.path}#{epoch}")
    tables.next_line(f"kdcli distill --teacher {name} --student NAME --data {config.data.name}")


def into_zoo(run):
    """Add a finished run's student to the user's zoo."""
    from kdcli.models import cards, checkpoint

    card = cards.read_card(run.path / "student.toml")
    return cards.add(checkpoint.load_state(run.path / "student.safetensors"), card)


def _epochs(text: str | None, last: int) -> set[int]:
    from kdcli.errors import RecipeError

    try:
        wanted = {int(part) for part in (text or "").split(",") if part.strip()}
    except ValueError:
        raise RecipeError(f"--keep {text}: not a list of epochs", hint="For example --keep 20,60") from None
    if any(not 1 <= epoch <= last for epoch in wanted):
        raise RecipeError(f"--keep {text}: this training has epochs 1 to {last}", hint="Name epochs within it.")
    return wanted
