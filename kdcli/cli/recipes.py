"""kdcli recipes: the built-in recipes, listed, shown and copied."""

from pathlib import Path
from typing import Annotated

import typer

from kdcli.cli import options as o

app = typer.Typer(no_args_is_help=True, help="The built-in recipes: list, show, copy.")


@app.command("ls", epilog="Examples:\n\nkdcli recipes ls\n\nkdcli recipes ls cifar100")
def ls(
    part: Annotated[str, typer.Argument(help="Only names that contain this.", metavar="PART")] = "",
    json: o.Json = False,
) -> None:
    """List the built-in recipes."""
    from kdcli import recipe as recipes
    from kdcli.cli import tables
    from kdcli.errors import RecipeError

    found = [(name, recipes.load(name)) for name in recipes.names() if part in name]
    if not found:
        raise RecipeError(f"no built-in recipe has {part!r} in its name", hint="`kdcli recipes ls` lists all.")
    if json:
        tables.as_json([{"name": name, "title": one.title, "source": one.source} for name, one in found])
        return
    rows = [[name, one.title, _published(one)] for name, one in found]
    tables.table(["recipe", "what", "published %"], rows, left=2)
    tables.next_line(f"kdcli recipes cat {found[0][0]}")


def _published(recipe) -> str:
    """The published figure of the recipe's method, in the primary metric."""
    from kdcli.tasks import TASKS

    figures = recipe.expect.of(TASKS[recipe.task].metrics[0].name) if recipe.expect else {}
    return f"{figures[recipe.method.name]:.2f}" if recipe.method.name in figures else ""


@app.command("cat", epilog="Examples:\n\nkdcli recipes cat quickstart\n\nkdcli recipes cat cifar100/r56-r20 --whole")
def cat(
    name: Annotated[str, typer.Argument(help="A built-in name or a file.")],
    whole: Annotated[bool, typer.Option("--whole", help="With everything it extends and every default.")] = False,
    json: o.Json = False,
) -> None:
    """Print a recipe as written or, with --whole, complete."""
    from kdcli import recipe as recipes
    from kdcli.cli import tables

    if json:
        tables.as_json(recipes.load(name).model_dump(mode="json"))
    elif whole:
        print(recipes.load(name).toml(), end="")
    else:
        print(recipes.find(name).read_text(encoding="utf-8"), end="")


@app.command("cp", epilog="Examples:\n\nkdcli recipes cp quickstart my.toml\n\nkdcli recipes cp cifar100/r110-r20")
def cp(
    name: Annotated[str, typer.Argument(help="A built-in name or a file.")],
    to: Annotated[
        Path | None, typer.Argument(help="The new file (default: the recipe's name, in this folder).")
    ] = None,
) -> None:
    """Copy a recipe, with everything it extends, to edit it."""
    from kdcli import recipe as recipes
    from kdcli.cli import tables
    from kdcli.errors import RecipeError
    from kdcli.system import files

    target = to or Path(Path(name).with_suffix(".toml").name)
    if target.exists():
        raise RecipeError(f"{target} exists already", hint="Name another file.")
    files.write_text(target, recipes.load(name).toml())
    tables.line("wrote", target)
    tables.next_line(f"kdcli check --recipe {target}")
