"""A classroom's banks: which they are, whether they may be used, and their filling ahead of any training."""

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdcli.data import Batch, DataSet
from kdcli.errors import DataError, InterruptedRun, RecipeError
from kdcli.mentors import bank_files
from kdcli.mentors.bank import Bank
from kdcli.mentors.bank_files import WITHOUT
from kdcli.mentors.bank_format import MOST_CLASSES
from kdcli.mentors.classroom import Classroom
from kdcli.mentors.mentors import Mentors
from kdcli.models.member import NOTHING, Member
from kdcli.recipe import Recipe
from kdcli.system import device as devices
from kdcli.system.interrupts import Signals, Stop
from kdcli.system.sizes import plain

SAMPLE = 64  # answers of every bank that are asked for again before it is trusted
SHARE = {"fp32": 0.02, "fp16": 0.1, "bf16": 0.25}  # of the logits' spread: what other kernels change at a precision


def refuse(recipe: Recipe, data: DataSet) -> None:
    """Raise RecipeError where a bank cannot hold what the recipe asks of mentors."""
    config, top = recipe.train, recipe.classroom.bank_top
    if config.mixup or config.cutmix:
        raise RecipeError(
            "classroom.bank: mixup and cutmix make images that no bank can name",
            hint=f"--set train.mixup=0 --set train.cutmix=0, or {WITHOUT}.",
        )
    if data.views is None:
        raise RecipeError(
            f"classroom.bank: augmentation {data.augment} gives an image more views than can be counted",
            hint=f"--set data.views=8 keeps to eight of every image; or a countable one (crop-flip), or {WITHOUT}.",
        )
    classes = len(data.classes)
    if top is not None and (top >= classes or classes > MOST_CLASSES):
        raise RecipeError(
            f"classroom.bank_top = {top}: {data.name} has {classes} classes",
            hint=f"Leave it out to keep all, or choose at most {classes - 1}; a bank numbers up to {MOST_CLASSES}.",
        )


def identity(member: Member, data: DataSet, precision: str, recipe: Recipe) -> dict[str, Any]:
    """Everything that a mentor's banked answers depend on; as JSON it is the bank's name."""
    samples = covered(data)
    index = torch.arange(data.train.full) if samples is None else samples
    columns = None if member.class_index is None else member.class_index.tolist()
    return {
        "format": bank_files.FORMAT,
        "architecture": member.architecture.full,
        "weights": member.digest,
        "data": data.pixels,
        "left_out": _sha("\n".join(sorted(data.skipped))) if data.skipped else None,
        "samples": len(index),
        "which": _sha(index.numpy().astype("<i8").tobytes()),
        "image_size": plain(data.image_size),
        "augment": data.augment,
        "views": data.views,
        "mean": list(member.mean),
        "std": list(member.std),
        "input_size": plain(member.input_size),
        "interpolation": member.interpolation,
        "class_index": None if columns is None else _sha(str(columns)),
        "classes": member.num_classes,
        "precision": precision,
        "top": recipe.classroom.bank_top,
        "pooled": member.width if recipe.classroom.bank_pooled else 0,
    }


def covered(data: DataSet) -> Tensor | None:
    """The samples a bank has rows for: those trained on, or, when they are most, all (None), so that runs that hold
    out others share it."""
    return None if 2 * len(data.train) >= data.train.full else data.train.index.sort().values


def _sha(what: str | bytes) -> str:
    return hashlib.sha256(what.encode() if isinstance(what, str) else what).hexdigest()[:16]


def needed(classroom: Classroom, recipe: Recipe, precision: str) -> dict[str, dict[str, Any]]:
    """The identity of every mentor's bank, by the mentor's name. Raises RecipeError as `refuse`."""
    refuse(recipe, classroom.data)
    return {m.name: identity(m, classroom.data, precision, recipe) for m in classroom.mentors}


def open_banks(classroom: Classroom, recipe: Recipe, precision: str) -> list[Bank]:
    """Every mentor's bank, those that are not there yet made, all noted; on CUDA copied there when there is room.

    Raises RecipeError where no bank is possible, DataError for one that is broken or has no room.
    """
    wanted = needed(classroom, recipe, precision)
    samples = covered(classroom.data)
    new = {
        bank_files.id_of(one): one
        for one in wanted.values()
        if not (bank_files.folder() / bank_files.id_of(one)).is_dir()
    }
    bank_files.check_room([*new.values()])
    opened: dict[str, Bank] = {}
    for name, one in wanted.items():
        path = bank_files.folder() / bank_files.id_of(one)
        if path.name not in opened:
            if path.name in new:
                bank_files.make(one, mentor=name, dataset=classroom.data.name)
            opened[path.name] = Bank(path, samples)
            os.utime(path / "bank.json")  # when it was last used
        bank = opened[path.name]
        filled = bank.filled
        size, kept = bank_files.amount(bank_files.bytes_of(one)), bank_files.form(one)
        classroom.banks[name] = {"id": bank.id, "form": kept, "views": one["views"], "filled": round(filled, 4)}
        text = f"{bank.id}, {kept}, {one['views']} views, {100 * filled:.1f} % filled, {size}"
        classroom.notes.append((f"bank of {name}", text, "classroom.bank = true; answers rounded to float16"))
    device, size = classroom.device, sum(bank.table.nbytes for bank in opened.values())
    if device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // 2:
        for bank in opened.values():
            bank.reside(device)
    return [opened[bank_files.id_of(one)] for one in wanted.values()]


def check(mentors: Mentors, data: DataSet) -> None:
    """Ask every mentor for a sample of its bank again.

    Raises DataError for a bank that answers otherwise than float16 and the precision explain.
    """
    views = data.train.store.views
    for n, bank in enumerate(mentors.banks):
        rows = bank.sample(SAMPLE)
        if not len(rows):
            continue
        index, slots = bank.names_of(rows)
        pixels = next(data.train.store.batches(index, views.named(index, slots), len(index), mentors.device))
        out = mentors.run_fixed_batch(pixels, [n])[0].out.cpu()
        alike = bank.record.alike(bank.table[rows], out, SHARE[mentors.precision])
        if not bool(alike.all()):
            raise DataError(
                f"bank {bank.id} is not what {mentors.members[n].name} answers now: {int((~alike).sum())} of "
                f"{len(alike)} sampled answers differ by more than rounding",
                hint=f"`kdcli bank rm {bank.id}` makes room for a new one; or {WITHOUT}.",
            )


def build(mentors: Mentors, classroom: Classroom, recipe: Recipe, epochs: int | None) -> Iterator[tuple[int, int]]:
    """Fill the banks with all views, or with those that a run of `epochs` would meet: (views done, views in all).

    Raises InterruptedRun after SIGINT or SIGTERM; what is there stays, and another call goes on from it.
    """
    train, device = classroom.data.train, classroom.device
    views, size = train.store.views, recipe.train.batch_size
    assert views.slots is not None
    passes = views.slots if epochs is None else epochs
    done, signals = 0, Signals()
    try:
        with signals:
            for n in range(passes):
                if epochs is None:
                    view = views.named(train.index, torch.tensor(n))
                else:
                    view = views.draw(recipe.data.seed, n, train.index)
                rows = mentors.banks[0].rows_of(train.index, view)
                lack = (~torch.stack([bank.has(rows) for bank in mentors.banks]).all(0)).nonzero()[:, 0]
                done = (n + 1) * len(train) - len(lack)
                yield done, passes * len(train)
                with signals.breakable():
                    if not len(lack):
                        continue
                index, named = train.index[lack], view[lack]
                names = zip(train.targets[lack].split(size), index.split(size), named.split(size), strict=True)
                drawn = train.store.batches(index, named, size, device)
                for pixels, (target, some, its) in zip(signals.each(drawn), names, strict=True):
                    with signals.breakable():
                        mentors.answer(Batch(pixels, target, some, its, (some, its)).to(device))
                    done += len(some)
                    yield done, passes * len(train)
                mentors.flush()
    except Stop:
        mentors.flush()
        raise InterruptedRun(
            f"stopped by {signals.caught[0]} with {done} of {passes * len(train)} views done; they are kept",
            hint="The same command goes on where it stopped.",
        ) from None
    for bank in mentors.banks:
        bank.sync()


def open_mentors(
    classroom: Classroom,
    recipe: Recipe,
    *,
    needs: frozenset[str] = NOTHING,
    logits_only: bool = False,
    ahead: int = 1,
    cuda_graph: bool = False,
) -> Mentors:
    """The classroom's mentors, with their banks, checked, where the recipe asks for them."""
    config, device = recipe.classroom, classroom.device
    precision, _ = devices.precision(config.precision, device, frozen=True)
    found = open_banks(classroom, recipe, precision) if config.bank else []
    if config.bank and config.bank_pooled:
        needs |= {"pooled"}
    mentors = Mentors(
        classroom.mentors,
        precision,
        device,
        banks=found,
        needs=needs,
        logits_only=logits_only,
        ahead=ahead,
        cuda_graph=cuda_graph,
    )
    check(mentors, classroom.data)
    return mentors
