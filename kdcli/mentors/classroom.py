"""The classroom: a student to be built and frozen mentors, for one data set."""

from dataclasses import dataclass, field
from typing import Any

import torch

from kdcli.data import DataSet
from kdcli.errors import RecipeError
from kdcli.models import registry
from kdcli.models.build import Note, build
from kdcli.models.member import Member
from kdcli.models.net import ModelName
from kdcli.recipe import Recipe


@dataclass
class Classroom:
    """Frozen mentors, the teacher first, and all that is needed to build any number of students."""

    recipe: Recipe
    data: DataSet
    mentors: list[Member]
    device: torch.device
    student_name: ModelName
    notes: list[Note] = field(default_factory=list)
    """(what, value, why) of everything that was chosen for the user."""
    banks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The facts of each mentor's bank for the run's provenance, by the mentor's name."""

    def student(self, seed: int, arch: str | None = None) -> Member:
        """A student on the device, with initial weights drawn from `seed` or those its name gives (`@...`).

        `arch` names another network instead. What was chosen for the user is added to `notes`, once.
        """
        name = registry.resolve(arch) if arch else self.student_name
        built = build(name, self.data, "student", seed=seed)
        self.notes += [note for note in built.notes if note not in self.notes]
        return built.member.to(self.device)


def build_classroom(recipe: Recipe, data: DataSet, device: torch.device, *, mentors: bool = True) -> Classroom:
    """Resolve the recipe's names and load its mentors (frozen, in eval mode); without `mentors`, none.

    Raises RecipeError for a name that no source has, WeightsError for weights that are missing or do not fit.
    """
    config = recipe.classroom
    if not config.student:
        raise RecipeError("no student is named", hint="Add --student NAME; `kdcli models` searches the names.")
    if config.peers and not config.teacher:
        raise RecipeError("peers without a teacher", hint="Name the largest mentor with --teacher.")
    notes: list[Note] = list(data.notes)
    student = _resolved(config.student, notes)
    members: list[Member] = []
    for spec in [config.teacher, *config.peers] if config.teacher and mentors else []:
        built = build(_resolved(spec, notes), data, "mentor", class_map=config.class_map)
        notes += built.notes
        members.append(built.member.to(device))
    _make_unique(members)
    return Classroom(recipe, data, members, device, student, notes)


def _resolved(spec: str, notes: list[Note]) -> ModelName:
    """The name, with a note if it is not what was typed."""
    name = registry.resolve(spec)
    if name.guessed:
        notes.append((name.typed, name.full, "the only name that fits"))
    return name


def _make_unique(members: list[Member]) -> None:
    """Name the second of two equal networks `name#2`."""
    seen: dict[str, int] = {}
    for member in members:
        seen[member.name] = seen.get(member.name, 0) + 1
        if seen[member.name] > 1:
            member.name = f"{member.name}#{seen[member.name]}"
