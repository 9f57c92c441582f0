"""The whole story on real pictures that come with scikit-learn: mentors, students, a comparison, a shipped file."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kdcli import recipe as recipes
from kdcli.data import open_data
from kdcli.mentors.classroom import Classroom, build_classroom
from kdcli.models import cards, checkpoint
from kdcli.models.registry import resolve
from kdcli.recipe import Recipe
from kdcli.system import distributed, files
from kdcli.tasks import TASKS
from kdcli.training import run as runs
from kdcli.training.run import Run
from kdcli.training.student import student_of
from kdcli.workflows import compare, distill
from kdcli.workflows.compare import Comparison
from kdcli.workflows.ship import Shipped, ship

METHODS = ["aver", "classroom"]
MENTOR_EPOCHS, MENTOR_BATCH = 8, 32
Follow = Callable[[Iterator[Any], str], None]


@dataclass
class Story:
    """What a quickstart did."""

    run: Run
    classroom: Classroom
    comparison: Comparison
    shipped: list[Shipped]


def recipe() -> Recipe:
    """The built-in quickstart recipe."""
    return recipes.load("quickstart")


def tell(config: Recipe, seeds: list[int], device: torch.device, out: str | None, follow: Follow) -> Story:
    """Train the mentors, compare the methods, export and time teacher, control and ClassroomKD's student."""
    folder = distill.run_folder(out, config, "quickstart")
    train_mentors(config, device, follow)
    data, classroom = distill.open_room(config, device)
    session = compare.open_session(config, METHODS, seeds, classroom, folder)
    with folder.writing():
        compare.start(session, classroom, config, METHODS, seeds)
        follow(compare.go(session), f"{len(session.learners)} students")
    found = compare.summarise(folder)
    learners = {"control": compare.CONTROL, "student": "classroom"}
    students = {role: Run(folder.path / f"{name}-{seeds[0]}") for role, name in learners.items()}  # never the best seed
    teacher = build_classroom(config, data, device).mentors[0]  # built again: the one in use may be in half precision
    members = {"teacher": teacher, **{role: student_of(run) for role, run in students.items()}}
    shipped = ship(members, data, TASKS[config.task](len(data.classes)), folder.path, students)
    files.write_text(folder.path / "shipping.json", json.dumps([row.json() for row in shipped], indent=1))
    return Story(folder, classroom, found, shipped)


def train_mentors(config: Recipe, device: torch.device, follow: Follow) -> None:
    """Train the recipe's mentors on all of its training set, and put them into the user's zoo.

    The students see a part of that set only (`data.per_class`): what the mentors know of the rest is what there is
    to gain.
    """
    for name in dict.fromkeys([config.classroom.teacher, *config.classroom.peers]):
        arch = resolve(str(name)).arch
        own = config.model_dump(exclude_none=True)
        own["data"].pop("per_class", None)
        own["classroom"] = {"student": arch}
        own["method"] = {"name": "nokd"}
        own["train"] |= {
            "epochs": MENTOR_EPOCHS,
            "batch_size": MENTOR_BATCH,
            "warmup_epochs": 1,
            "seed": 0,
            "eval_every": MENTOR_EPOCHS,
        }
        solo = recipes.from_dict(own, "quickstart mentor")
        _, classroom = distill.open_room(solo, device, mentors=False)
        folder = distributed.on_rank0(lambda arch=arch: runs.new(arch, "train"))
        session = distill.open_session({"nokd": solo}, classroom, folder, {"nokd": folder})
        with folder.writing():
            distill.start(session, "train", classroom)
            follow(distill.go(session), f"mentor {arch}")
        distributed.on_rank0(lambda folder=folder: _into_zoo(folder))


def _into_zoo(folder: Run) -> None:
    cards.add(checkpoint.load_state(folder.path / "student.safetensors"), cards.read_card(folder.path / "student.toml"))


def prepare_mentors(config: Recipe, device: torch.device, follow: Follow) -> None:
    """Train the quickstart's mentors where its own data and mentors are asked for and the zoo lacks one of them."""
    ours, named = recipe(), config.classroom
    if (config.data.name, named.teacher, named.peers) != (ours.data.name, ours.classroom.teacher, ours.classroom.peers):
        return
    content = open_data(config.data).hash
    if any(cards.find(resolve(str(name)).full, content) is None for name in (named.teacher, *named.peers)):
        train_mentors(config, device, follow)
