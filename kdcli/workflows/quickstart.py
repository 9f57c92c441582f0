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
    learners = {"control": compare.CONTROL, "student": "classroom"}
    runs = {role: Run(folder.path / f"{name}-{seeds[0]}") for role, name in learners.items()}  # never the best seed
    data = groups.data_of(recipe, device)
    teacher = build_classroom(recipe, data, device).mentors[0]  # the one used in training may be in half precision
    members = {"teacher": teacher, **{role: student_of(run) for role, run in runs.items()}}
    shipped = ship(members, data, TASKS[recipe.task](len(data.classes)), folder.path, runs)
    files.write_text(folder.path / "shipping.json", json.dumps([row.json() for row in shipped], indent=1))
    return Outcome(folder, found, shipped)
