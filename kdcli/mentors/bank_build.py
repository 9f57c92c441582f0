"""A classroom's banks: which they are, opening them, checking that they are still true, filling them before a run."""

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
from kdcli.mentors.classroom import Classroom
from kdcli.mentors.mentors import Mentors
from kdcli.models.member import NOTHING, Member
from kdcli.recipe import Recipe
from kdcli.system import device as devices
from kdcli.system.interrupts import Signals, Stop
from kdcli.system.sizes import plain

SAMPLE = 64  # records of every bank that are computed again before it is trusted
SHARE = {"fp32": 0.02, "fp16": 0.1, "bf16": 0.25}  # of the logits' spread: what other kernels change at a precision


def needed(classroom: Classroom, recipe: Recipe, precision: str) -> dict[str, dict[str, Any]]:
    """The identity of every mentor's bank, by the mentor's name.

    Raises RecipeError where views cannot be named by a sample and a small number, so that no bank is possible.
    """
    data = classroom.data
    if recipe.train.mixup or recipe.train.cutmix:
        raise RecipeError(
            "classroom.bank: mixup and cutmix blend images at random, so a bank would never meet a view again",
            hint=f"--set train.mixup=0 --set train.cutmix=0, or {WITHOUT}.",
        )
    if data.views is None:
        raise RecipeError(
            f"classroom.bank: augmentation {data.augment} has too many views of an image to store",
            hint=f"--set data.views=8 limits every image to eight; or one with few (crop-flip), or {WITHOUT}.",
        )
    return {one.name: identity(one, data, precision, recipe) for one in classroom.mentors}


def identity(member: Member, data: DataSet, precision: str, recipe: Recipe) -> dict[str, Any]:
    """Everything that a mentor's stored outputs depend on. Its JSON is hashed to the bank's id."""
    samples = covered(data)
    index = torch.arange(data.train.full) if samples is None else samples
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
        "class_index": None if member.class_index is None else _sha(str(member.class_index.tolist())),
        "classes": member.num_classes,
        "precision": precision,
        "top": None,  # banks of earlier versions could store the most probable classes only; kept for the same ids
        "pooled": member.width if recipe.classroom.bank_pooled else 0,
    }


def covered(data: DataSet) -> Tensor | None:
    """The sample numbers that a bank has rows for: those trained on, or all (None) if these are at least half of them,
    so that runs with different holdouts share a bank."""
    return None if 2 * len(data.train) >= data.train.full else data.train.index.sort().values


def _sha(what: str | bytes) -> str:
    return hashlib.sha256(what.encode() if isinstance(what, str) else what).hexdigest()[:16]


def open_banks(classroom: Classroom, recipe: Recipe, precision: str) -> list[Bank]:
    """Every mentor's bank, created if it does not exist; entered in the classroom's notes and `banks`.

    On CUDA they are copied to the device if half of its free memory holds them.
    Raises RecipeError where no bank is possible, DataError for a damaged one or too little disk space.
    """
    wanted = needed(classroom, recipe, precision)
    paths = {name: bank_files.folder() / bank_files.id_of(one) for name, one in wanted.items()}
    new = {path: wanted[name] for name, path in paths.items() if not path.is_dir()}
    bank_files.check_space([*new.values()])
    opened: dict[str, Bank] = {}
    for name, path in paths.items():
        if path.name not in opened:
            if path in new:
                bank_files.create(wanted[name], mentor=name, dataset=classroom.data.name)
            opened[path.name] = Bank(path, covered(classroom.data))
            os.utime(path / "bank.json")  # the time of last use
        about = bank_files.describe(path)
        facts = {"id": about["id"], "form": about["form"], "views": about["views"], "filled": round(about["filled"], 4)}
        classroom.banks[name] = facts
        size = bank_files.amount(bank_files.bytes_of(wanted[name]))
        text = f"{about['id']}, {about['form']}, {about['views']} views, {100 * about['filled']:.1f} % filled, {size}"
        classroom.notes.append((f"bank of {name}", text, "classroom.bank = true; outputs rounded to float16"))
    device, size = classroom.device, sum(bank.table.nbytes for bank in opened.values())
    if device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // 2:
        for bank in opened.values():
            bank.load_to(device)
    return [opened[path.name] for path in paths.values()]


def check(mentors: Mentors, data: DataSet) -> None:
    """Compute a sample of every bank's records again.

    Raises DataError for a bank whose records differ by more than rounding to float16 and the precision explain.
    """
    views = data.train.store.views
    for n, bank in enumerate(mentors.banks):
        rows = bank.sample(SAMPLE)
        if not len(rows):
            continue
        index, slots = bank.slots_of(rows)
        images = next(data.train.store.batches(index, views.named(index, slots), len(index), mentors.device))
        out = mentors.run_fixed_batch(images, [n])[0].out.cpu()
        wrong = int((~bank.record.matches(bank.table[rows], out, SHARE[mentors.precision])).sum())
        if wrong:
            raise DataError(
                f"bank {bank.id} does not match what {mentors.members[n].name} computes now: {wrong} of {len(rows)} "
                "sampled outputs differ by more than rounding",
                hint=f"`kdcli bank rm {bank.id}` removes it, and the next run creates a new one; or {WITHOUT}.",
            )


def build(mentors: Mentors, classroom: Classroom, recipe: Recipe, epochs: int | None) -> Iterator[tuple[int, int]]:
    """Fill the banks with all views, or with those of a run of `epochs`; yields (views done, views in total).

    Raises InterruptedRun after SIGINT or SIGTERM; what is stored stays, and another call continues from there.
    """
    train, views, size = classroom.data.train, classroom.data.train.store.views, recipe.train.batch_size
    assert views.slots is not None
    passes = views.slots if epochs is None else epochs
    total, done, signals = passes * len(train), 0, Signals()
    try:
        with signals:
            for n in range(passes):
                if epochs is None:
                    view = views.named(train.index, torch.tensor(n))
                else:
                    view = views.draw(recipe.data.seed, n, train.index)
                rows = mentors.banks[0].rows_of(train.index, view)
                missing = (~torch.stack([bank.has(rows) for bank in mentors.banks]).all(0)).nonzero()[:, 0]
                done = (n + 1) * len(train) - len(missing)
                yield done, total
                with signals.breakable():
                    if not len(missing):
                        continue
                index, view = train.index[missing], view[missing]
                parts = zip(train.targets[missing].split(size), index.split(size), view.split(size), strict=True)
                drawn = train.store.batches(index, view, size, classroom.device)
                for images, (target, some, named) in zip(signals.each(drawn), parts, strict=True):
                    with signals.breakable():
                        mentors.answer(Batch(images, target, some, named, (some, named)).to(classroom.device))
                    done += len(target)
                    yield done, total
                mentors.flush()
    except Stop:
        mentors.flush()
        raise InterruptedRun(
            f"stopped by {signals.caught[0]} with {done} of {total} views done; they are kept",
            hint="The same command continues where it stopped.",
        ) from None


def open_mentors(
    classroom: Classroom,
    recipe: Recipe,
    *,
    needs: frozenset[str] = NOTHING,
    logits_only: bool = False,
    ahead: int = 1,
    cuda_graph: bool = False,
) -> Mentors:
    """The classroom's mentors, with their banks, checked, if the recipe has `classroom.bank`. The other arguments are
    those of `Mentors`."""
    config, device = recipe.classroom, classroom.device
    precision, _ = devices.precision(config.precision, device, frozen=True)
    banks = open_banks(classroom, recipe, precision) if config.bank else []
    if config.bank and config.bank_pooled:
        needs |= {"pooled"}
    mentors = Mentors(
        classroom.mentors,
        precision,
        device,
        banks=banks,
        needs=needs,
        logits_only=logits_only,
        ahead=ahead,
        cuda_graph=cuda_graph,
    )
    check(mentors, classroom.data)
    return mentors
