"""kdcli models: search the names."""

import re
from typing import Annotated

import typer

from kdcli.cli import options as o

EXAMPLES = (
    "kdcli models mobilenet",
    "kdcli models 'cifar_*' --classes 100 --image-size 32",
)


def models(
    pattern: Annotated[
        str, typer.Argument(help="A part of the name, or a pattern with *.", metavar="PATTERN")
    ] = "cifar_*",
    source: Annotated[str | None, typer.Option(help="Only zoo, timm or torchvision.")] = None,
    classes: Annotated[int | None, typer.Option(help="Count parameters for this many classes.", min=1)] = None,
    image_size: Annotated[
        str | None,
        typer.Option(help="Count multiply-adds at this size in pixels: one number, or HEIGHTxWIDTH.", metavar="N|HxW"),
    ] = None,
    limit: Annotated[int, typer.Option(help="List at most this many.", min=1)] = 40,
    json: o.Json = False,
) -> None:
    """Search timm, torchvision and the zoo: parameters, multiply-adds, input size, weights."""
    from kdcli.cli import tables
    from kdcli.errors import RecipeError
    from kdcli.models import cards, cost, registry
    from kdcli.system.sizes import text

    if source not in (None, *registry.SOURCES):
        raise RecipeError(f"--source {source}: no such source", hint="Allowed: zoo, timm, torchvision.")
    size = _size(image_size)
    hits = registry.search(pattern, source)
    if not hits:
        raise RecipeError(f"no model name matches {pattern!r}", hint="`kdcli models resnet`, or a pattern with *.")
    trained: dict[str, list[str]] = {}
    for card in cards.cards():
        if cards.weights_path(card):
            trained.setdefault(card.architecture, []).append(card.dataset)
    found = []
    for name in hits[:limit]:
        facts = cost.facts(name, classes, size)
        found.append({"name": name.arch, "source": name.source, **facts, "zoo": trained.get(name.full, [])})
    if json:
        tables.as_json(found)
        return
    rows = [
        [f["name"], f["source"], f"{f['params']:,}", "too small" if f["macs"] is None else tables.count(f["macs"]),
         f"{text(f['input_size'])} px", f["num_classes"],
         ", ".join([*(["pretrained"] if f["pretrained"] else []), *f["zoo"]])]
        for f in found
    ]  # fmt: skip
    tables.table(["name", "source", "parameters", "multiply-adds", "input", "classes", "weights"], rows, left=2)
    if len(hits) > limit:
        tables.console.print(f"[dim]{len(hits) - limit} more; --limit {len(hits)} shows them[/]")
    tables.next_line(f"kdcli train --model {hits[0].arch} --data NAME")


def _size(given: str | None) -> tuple[int, int] | None:
    """`32` or `256x192` as (height, width). Raises RecipeError for anything else, and below 8 pixels."""
    from kdcli.errors import RecipeError

    if given is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", given.strip().lower())
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) < 8:
        raise RecipeError(
            f"--image-size {given}: not an image size",
            hint="One number for a square, or HEIGHTxWIDTH, in pixels from 8: --image-size 32, --image-size 256x192.",
        )
    return size
