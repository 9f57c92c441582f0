"""The quickstart's recipe and its mentors, trained where the user's zoo lacks them."""

import torch

from kdcli import recipe as recipes
from kdcli.data import open_data
from kdcli.models import cards
from kdcli.models.registry import resolve
from kdcli.recipe import Recipe
from kdcli.system import distributed
from kdcli.training import run as runs
from kdcli.workflows import distill, groups
from kdcli.workflows.groups import Follow

EPOCHS, BATCH = 8, 32


def recipe() -> Recipe:
    """The built-in quickstart recipe."""
    return recipes.load("quickstart")


def train(config: Recipe, device: torch.device, follow: Follow) -> None:
    """Train the recipe's mentors on all of its training set, and put them into the user's zoo.

    The students see a part of that set only (`data.per_class`): what the mentors know of the rest is what can be
    gained from them.
    """
    for name in dict.fromkeys([config.classroom.teacher, *config.classroom.peers]):
        arch = resolve(str(name)).arch
        tables = config.model_dump(exclude_none=True)
        tables["data"].pop("per_class", None)
        tables["classroom"] = {"student": arch}
        tables["method"] = {"name": "nokd"}
        tables["train"] |= {
            "epochs": EPOCHS, "batch_size": BATCH, "warmup_epochs": 1, "seed": 0, "eval_every": EPOCHS,
        }  # fmt: skip
        alone = recipes.from_dict(tables, "quickstart mentor")
        run = distributed.on_rank0(lambda arch=arch: runs.new(arch, "train"))
        distill.train_into(run, alone, device, groups.labelled(follow, "mentor "), kind="train")


def prepare(config: Recipe, device: torch.device, follow: Follow) -> None:
    """Train the quickstart's mentors where a recipe has its data and mentors and the zoo lacks one of them."""
    ours, named = recipe(), config.classroom
    if (config.data.name, named.teacher, named.peers) != (ours.data.name, ours.classroom.teacher, ours.classroom.peers):
        return
    content = open_data(config.data, task=config.task).hash
    if any(cards.find(resolve(str(name)).full, content) is None for name in (named.teacher, *named.peers)):
        train(config, device, follow)
