"""The flags that mean the same in every command, and how they become a recipe."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli import recipe as recipes
from kdcli.data import sources
from kdcli.errors import RecipeError
from kdcli.recipe import Recipe
from kdcli.system import user_code

if TYPE_CHECKING:
    import torch

CLASSROOM, DATA, TRAINING, MACHINE, OUTPUT = "Classroom", "Data", "Training", "Machine", "Output"
"""The groups in which --help shows the flags."""

Student = Annotated[
    str | None,
    typer.Option(help="The network that learns and ships.", metavar="NAME", rich_help_panel=CLASSROOM),
]
Teacher = Annotated[
    str | None, typer.Option(help="The largest mentor.", metavar="NAME[@WEIGHTS]", rich_help_panel=CLASSROOM)
]
Peers = Annotated[
    str | None,
    typer.Option(help="Further mentors, separated by commas.", metavar="A,B,C", rich_help_panel=CLASSROOM),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="classroom (default), kd, dkd, ...; a class of your own is my_file.py:Mine.", metavar="NAME",
        rich_help_panel=CLASSROOM,
    ),
]  # fmt: skip
From = Annotated[
    str | None,
    typer.Option("--recipe", help="A recipe file or a built-in name.", metavar="RECIPE", rich_help_panel=CLASSROOM),
]
Data = Annotated[
    str | None,
    typer.Option(help=sources.HELP, metavar="NAME", rich_help_panel=DATA),
]
Root = Annotated[
    str | None,
    typer.Option(help="The folder that holds data sets (default: KDCLI_DATA).", metavar="DIR", rich_help_panel=DATA),
]
SkipCorrupt = Annotated[
    bool, typer.Option("--skip-corrupt", help="Leave out images that cannot be read.", rich_help_panel=DATA)
]
Epochs = Annotated[int | None, typer.Option(help="Length of the training.", min=1, rich_help_panel=TRAINING)]
Seed = Annotated[
    int | None, typer.Option(help="Initial weights and noise (train.seed).", min=0, rich_help_panel=TRAINING)
]
Seeds = Annotated[
    str | None,
    typer.Option(help="`3` is seeds 0, 1, 2; `4,7` is those two.", metavar="N|A,B", rich_help_panel=TRAINING),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any recipe key, e.g. train.lr=0.01. Repeatable.", metavar="KEY=VALUE", rich_help_panel=TRAINING
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(help="Continue this run where it was stopped.", metavar="RUN", rich_help_panel=TRAINING),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:N, mps; default: the best here.", metavar="NAME", rich_help_panel=MACHINE),
]
Gpus = Annotated[
    int | None,
    typer.Option(
        help="Divide every batch among N GPUs; with --device cpu, among N processes.", min=1, metavar="N",
        rich_help_panel=MACHINE,
    ),
]  # fmt: skip
Bank = Annotated[
    bool,
    typer.Option("--bank", help="Keep the mentors' outputs on disk and read them from there.", rich_help_panel=MACHINE),
]
Out = Annotated[
    str | None,
    typer.Option(
        help="The run's folder (default: runs/<time>-<student>-<method>).", metavar="DIR", rich_help_panel=OUTPUT
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON and nothing else.", rich_help_panel=OUTPUT)
]
RunName = Annotated[str | None, typer.Argument(help="A run's folder or name; default: the newest.", metavar="RUN")]


def assemble(
    base: Recipe | str | None = None,
    *,
    data: str | None = None,
    root: str | None = None,
    student: str | None = None,
    teacher: str | None = None,
    peers: str | None = None,
    method: str | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    skip_corrupt: bool = False,
    bank: bool = False,
    sets: list[str] | None = None,
) -> tuple[Recipe, list[tuple[str, object, str]]]:
    """The recipe that flags add up to: defaults for the data, then the recipe, then flags, then --set.

    Also returns notes on what was chosen for the user.
    """
    notes: list[tuple[str, object, str]] = []
    given = recipes.parse_set(sets or [])
    method = given.pop("method.name", method)  # the same as --method: a method brings its own options
    flags: dict[str, Any] = {
        "data.name": data,
        "data.root": str(Path(root).expanduser()) if root else None,
        "data.skip_corrupt": True if skip_corrupt else None,
        "classroom.bank": True if bank else None,
        "classroom.student": student,
        "classroom.teacher": teacher,
        "classroom.peers": [name.strip() for name in peers.split(",") if name.strip()] if peers is not None else None,
        "train.epochs": epochs,
        "train.seed": seed,
    }
    over = {key: value for key, value in flags.items() if value is not None}
    if isinstance(base, Recipe):
        start = base
    else:
        name = base or _defaults(data or str(given.get("data.name") or ""), root)
        if base is None:
            notes.append(("training", f"recipe {name}", "no --recipe was given"))
        start = recipes.load(name)
    if method:
        start = start.with_method(user_code.resolve(method))
    return start.with_(**{**over, **given}), notes


def _defaults(data: str, root: str | None) -> str:
    """The built-in recipe with the training settings that suit a data set."""
    if not data:
        raise RecipeError("no data is named", hint="Add --data NAME or --recipe NAME; `kdcli data ls` lists data.")
    return sources.recipe_for(data, root)


def seeds(text: str) -> list[int]:
    """`3` is seeds 0, 1, 2; `4,7` is those two."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or (len(numbers) == 1 and "," not in text and numbers[0] == 0):
        raise RecipeError(f"--seeds {text}: neither a number of seeds nor a list", hint="--seeds 3, or --seeds 4,7")
    if len(set(numbers)) < len(numbers):
        raise RecipeError(f"--seeds {text}: a seed is named twice", hint="Name each seed once.")
    return list(range(numbers[0])) if len(numbers) == 1 and "," not in text else numbers


def typed(command: str, sets: list[str] | None, skip_corrupt: bool, **given: object) -> str:
    """A command line with the flags that were given: the next command to type."""
    words = [
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in given.items() if value is not None
    ]
    words += [f"--set {shlex.quote(pair)}" for pair in sets or []] + ["--skip-corrupt"] * skip_corrupt
    return " ".join([command, *words])


def place(ctx: typer.Context, device: str | None, gpus: int | None) -> "torch.device":
    """The device to compute on. With `gpus` ranks run the command line instead, and this process exits with them."""
    from kdcli.cli import launch, tables
    from kdcli.system import device as devices, distributed

    if gpus is not None and distributed.expected_ranks() == 1:
        entry, argv = ctx.obj  # `main`, and the command line it was called with
        launch.launch(entry, argv, gpus, device, debug="--debug" in argv)
    picked = distributed.join(devices.pick(device), gpus)
    if distributed.restarts():
        tables.errors.print(f"[dim]a rank died: all were started again, {distributed.restarts()} times so far[/]")
    return picked


def no_flags_with_resume(resume: str | None, **flags: object) -> None:
    """Refuse flags that would change a resumed run, which keeps its recipe."""
    extra = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value not in (None, False, [])]
    if resume and extra:
        raise RecipeError(
            f"--resume continues a run with its own recipe; {', '.join(extra)} would change it",
            hint=f"Leave out {', '.join(extra)}, or start a new run.",
        )
