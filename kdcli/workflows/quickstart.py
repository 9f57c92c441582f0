"""The whole tool on real images that come with scikit-learn: mentors, students, a comparison, exported files."""

import json
from dataclasses import dataclass

import torch

from kdcli.mentors.classroom import build_classroom
from kdcli.recipe import Recipe
from kdcli.system import files
from kdcli.tasks import TASKS
from kdcli.training.run import Run
from kdcli.training.student import student_of
from kdcli.workflows import compare, distill, groups, quickstart_mentors
from kdcli.workflows.compare import Comparison
from kdcli.workflows.groups import Follow
from kdcli.workflows.ship import Shipped, ship

METHODS = ["aver", "classroom"]


@dataclass
class Outcome:
    """The result of a quickstart."""

    run: Run
    comparison: Comparison
    shipped: list[Shipped]


def quickstart(recipe: Recipe, seeds: list[int], device: torch.device, follow: Follow, *, out: str | None) -> Outcome:
    """Train the mentors, compare the methods, export and time teacher, control and ClassroomKD's student."""
    folder = distill.run_folder(out, recipe, "quickstart")
    quickstart_mentors.train(recipe, device, follow)
    found = compare.compare(recipe, METHODS, seeds, device, follow, out=str(folder.path))
    runs = {name: Run(folder.path / f"{name}-{seeds[0]}") for name in (compare.CONTROL, "classroom")}  # never the best
    data = groups.data_of(recipe, device)
    members = {
        "teacher": build_classroom(recipe, data, device).mentors[0],  # those that trained may be in half precision
        "control": student_of(runs[compare.CONTROL]),
        "student": student_of(runs["classroom"]),
    }
    facts = {"dataset": data.name, "classes": json.dumps(data.classes)}
    sources = {"control": {"run": str(runs[compare.CONTROL].path)}, "student": {"run": str(runs["classroom"].path)}}
    shipped = ship(
        members,
        data,
        TASKS[recipe.task](len(data.classes)),
        folder.path,
        {role: facts | sources.get(role, {}) for role in members},
    )
    files.write_text(folder.path / "shipping.json", json.dumps([row.json() for row in shipped], indent=1))
    return Outcome(folder, found, shipped)
