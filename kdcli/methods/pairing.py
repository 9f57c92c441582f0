"""Which stages of two networks belong together, and the tap that an option names.

Any two networks that have maps can be paired, convolutional networks and transformers alike (tokens come as a grid).
"""

from jaxtyping import Float
from torch import Tensor

from kdcli.errors import RecipeError, did_you_mean
from kdcli.models.outputs import Output
from kdcli.models.taps import is_pre


def pair(student: dict[str, Tensor], mentor: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Pairs of stages, (the student's, the mentor's), counted from the last one backwards, where the features of two
    networks are most alike; the first stages of the deeper network have no partner."""
    ours, theirs = ([tap for tap in maps if not is_pre(tap)] for maps in (student, mentor))
    n = min(len(ours), len(theirs))
    return list(zip(ours[len(ours) - n :], theirs[len(theirs) - n :], strict=True))


def stages(output: Output) -> dict[str, Tensor]:
    """One model's stages in order, without the maps before their activations (`pre`)."""
    return {name: x for name, x in output.stages.items() if not is_pre(name)}


def last(output: Output) -> Float[Tensor, "B C H W"]:
    """One model's last stage."""
    return list(stages(output).values())[-1]


def tap(maps: dict[str, Tensor], name: str, who: str, option: str) -> str:
    """The tap that an option names: `last`, or one of `maps`. Raises RecipeError that lists them with their shapes."""
    if name == "last":
        return [one for one in maps if not is_pre(one)][-1]
    if name not in maps:
        shapes = ", ".join(f"{one} {'x'.join(map(str, x.shape[1:]))}" for one, x in maps.items())
        raise RecipeError(
            f"method.{option}: {who} has no tap {name!r}", hint=f"{did_you_mean(name, maps)} It has {shapes}.".strip()
        )
    return name
