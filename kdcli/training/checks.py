"""Settings that are refused before anything is trained: what a method's equation, a graph or a rank cannot do."""

import torch

from kdcli.data import DataSet
from kdcli.errors import RecipeError
from kdcli.methods import Method, Need
from kdcli.recipe import Recipe, TrainConfig
from kdcli.system import distributed, shards
from kdcli.tasks import Task

GRAPHED = ("sgd", "adam", "adamw")  # optimizers whose fused kernels read their rate from the device


def check_task(task: type[Task], train: TrainConfig) -> None:
    """Raise RecipeError for training settings that mean nothing for the task's targets."""
    if task.mixable:
        return
    given = {"mixup": train.mixup, "cutmix": train.cutmix, "label_smoothing": train.label_smoothing}
    if wrong := [f"train.{key} = {value}" for key, value in given.items() if value]:
        raise RecipeError(
            f"{', '.join(wrong)}: task {task.name} has no mixed or smoothed labels",
            hint="Set them to 0, or leave them out.",
        )


def check_method(method: Method, recipe: Recipe, data: DataSet, mentors: int) -> None:
    """Raise RecipeError for settings under which the method's equation has no meaning."""
    name, train, needs = recipe.method.label, recipe.train, method.needs
    if recipe.task not in method.tasks:
        raise RecipeError(
            f"method {name} is for {' and '.join(sorted(method.tasks))}, not for task = {recipe.task!r}: its equation "
            "has a softmax over classes",
            hint="kd, aver and classroom are for every task; `kdcli check --method NAME` lists a method's tasks.",
        )
    if mentors < method.teachers:
        raise RecipeError(
            f"method {name} needs {method.teachers} mentor{'s' * (method.teachers > 1)}, and the classroom has "
            f"{mentors or 'none'}",
            hint="Add --teacher NAME (and --peers A,B).",
        )
    mixing = train.mixup or train.cutmix
    if Need.HARD_TARGET in needs and mixing:
        raise RecipeError(
            f"method {name} needs hard labels; mixup and cutmix make soft ones",
            hint="--set train.mixup=0 --set train.cutmix=0, or a method for soft labels (kd, aver).",
        )
    if needs & {Need.INDEX, Need.TWO_VIEWS} and mixing:
        what = "remembers single images by their number" if Need.INDEX in needs else "reads two views of each image"
        raise RecipeError(
            f"method {name} {what}; mixup and cutmix mix two images into one",
            hint="--set train.mixup=0 --set train.cutmix=0",
        )
    few, left = train.batch_size // train.accumulate, len(data.train) % train.batch_size
    if Need.PAIRS in needs and (few < 2 or (left == 1 and not train.drop_last)):
        where = "the last batch of an epoch" if few >= 2 else "a batch"
        raise RecipeError(
            f"method {name} compares the images of a batch, and {where} is one image "
            f"({len(data.train)} images in batches of {train.batch_size})",
            hint="--set train.drop_last=true"
            if few >= 2
            else "A larger --set train.batch_size, and train.accumulate=1.",
        )
    if Need.FULL_BATCHES in needs and train.accumulate > 1:
        cure = method.cures.get(Need.FULL_BATCHES)
        raise RecipeError(
            f"train.accumulate = {train.accumulate}: the loss of method {name} couples the samples of a batch, so "
            "gradient accumulation (micro-batches) would change it",
            hint="--set train.accumulate=1" + (f", or {cure}." if cure else ""),
        )
    if recipe.classroom.bank and method.teachers:
        _check_bank(name, needs, recipe)


def _check_bank(name: str, needs: frozenset[Need], recipe: Recipe) -> None:
    """Raise RecipeError where a bank does not hold what the method reads of its mentors."""
    if needs & {Need.MAPS, Need.PRE, Need.TWO_VIEWS}:
        raise RecipeError(
            f"classroom.bank: method {name} reads its mentors' intermediate maps or a second view, and a bank stores "
            "logits (and pooled vectors) of one view",
            hint="--set classroom.bank=false",
        )
    if Need.POOLED in needs and not recipe.classroom.bank_pooled:
        raise RecipeError(
            f"classroom.bank: method {name} reads its mentors' pooled features, which this bank does not store",
            hint="--set classroom.bank_pooled=true, or --set classroom.bank=false.",
        )


def check_graph(method: Method, recipe: Recipe, device: torch.device, precision: str) -> None:
    """Raise RecipeError where a step is not the same arithmetic every time, so that no CUDA graph can replay it."""
    train = recipe.train
    reasons = {
        f"{device.type} has no CUDA graphs": device.type != "cuda",
        "fp16 skips updates": precision == "fp16",
        f"train.accumulate = {train.accumulate} seeds within a step": train.accumulate > 1,
        f"train.optimizer = {train.optimizer!r} is not sgd, adam or adamw": train.optimizer not in GRAPHED,
        f"method {recipe.method.label} counts steps on the host": not method.capturable,
        "several ranks exchange outputs within a step": not distributed.alone(),
        f"method {recipe.method.label} reads intermediate maps or two views": bool(
            method.needs & {Need.MAPS, Need.PRE, Need.TWO_VIEWS}
        ),
    }
    if train.cuda_graph and (why := [reason for reason, true in reasons.items() if true]):
        raise RecipeError(f"train.cuda_graph: {'; '.join(why)}", hint="--set train.cuda_graph=false")


def check_ranks(images: int, config: TrainConfig) -> None:
    """Raise RecipeError for batches that leave a rank without images."""
    if distributed.alone():
        return
    mixing = bool(config.mixup or config.cutmix)
    rest = 0 if config.drop_last else images % config.batch_size
    for size in {config.batch_size, 0 if mixing and rest % 2 else rest} - {0}:
        step = -(-size // config.accumulate)
        for start in range(0, size, step):
            end = min(start + step, size)
            if not shards.layout(size, start, end, mixing, torch.device("cpu")).fewest:
                kind = "a micro-batch" if step < size else "a batch" if size == config.batch_size else "the last batch"
                raise RecipeError(
                    f"train.batch_size = {config.batch_size}: {kind} of {end - start} images has too few for each of "
                    f"{distributed.world()} ranks",
                    hint="Fewer ranks, a larger batch, a smaller train.accumulate; --set train.drop_last=true leaves a "
                    "short last batch out.",
                )
