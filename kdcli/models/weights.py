"""Which weights a network starts from: a file, a run, the zoo's, the library's, or none."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kdcli.errors import WeightsError, did_you_mean
from kdcli.models import cards
from kdcli.models.cards import Card
from kdcli.models.checkpoint import class_cure, load_state, renamed
from kdcli.models.registry import ModelName, create, has_pretrained, names_weights


@dataclass(frozen=True)
class Found:
    """The weights a network starts from."""

    state: dict[str, Tensor] | None  # None: from scratch, or the library's own (`pretrained`)
    origin: str  # what to print
    num_classes: int | None  # of the weights' head; None: unknown, or there is no head yet
    card: Card | None
    pretrained: bool  # to be loaded by `registry.create(..., pretrained=True)`


def choose(
    name: ModelName,
    *,
    role: Literal["student", "mentor"],
    data_hash: str,
    num_classes: int,
    data_name: str,
    class_map: bool,
    runs_dir: Path = Path("runs"),
) -> Found:
    """Which weights a member of the classroom starts from (DESIGN section 3, "Names").

    `@path`, `@RUN`, `@RUN#epoch`, `@pretrained`, `@none`; left out, a student starts from scratch and a mentor takes
    the zoo's newest for this data set, else the library's pretrained weights when the class count fits. With
    `class_map` a mentor's class count may differ. Raises WeightsError (exit 3) with the cure.
    """
    asked = name.weights
    if role == "student" and asked in (None, "none"):
        return Found(None, "from scratch", None, None, False)
    if asked == "none":
        raise WeightsError(
            f"{name.typed}: a mentor without training teaches noise",
            hint=f"Leave out @none, or train it first: kdcli train --model {name.arch} --data {data_name}",
        )
    if asked == "pretrained" or names_weights(name):
        return _pretrained(name, role, num_classes, data_name, class_map)
    if asked is not None:
        found = _from_file(name, asked, runs_dir)
    else:
        card = cards.find(name.full, data_hash)
        if card is None:
            return _pretrained(name, role, num_classes, data_name, class_map)
        path = cards.weights_path(card)
        assert path is not None
        found = _carded(name, path, card, f"zoo: {card.line()}")
    if found.num_classes not in (None, num_classes) and not (class_map and role == "mentor"):
        raise WeightsError(
            f"{found.origin}: its head has {found.num_classes} classes, {data_name} has {num_classes}",
            hint=class_cure(name.arch, data_name, role),
        )
    return found


def _pretrained(name: ModelName, role: str, num_classes: int, data_name: str, class_map: bool) -> Found:
    own = has_pretrained(name)
    train = f"kdcli train --model {name.arch if name.source == 'zoo' else name.full} --data {data_name}"
    asked = name.weights is not None
    if own is None:
        what = f"{name.full} has no pretrained weights" + ("" if asked else f", and the zoo none for {data_name}")
        here = [c for c in cards.cards() if cards.weights_path(c) and c.dataset == data_name]
        near = did_you_mean(name.arch, [c.architecture.rpartition(":")[2] for c in here]) if here and not asked else ""
        raise WeightsError(what, hint=f"Train it: {train}; or name a checkpoint: {name.arch}@PATH. {near}".strip())
    if role == "student":
        head = "" if own == num_classes else f", a fresh head for {num_classes} classes"
        return Found(None, f"{name.source}'s pretrained weights{head}", own or None, None, True)
    if own == num_classes or (class_map and own):
        return Found(None, f"{name.source}'s pretrained weights, {own} classes", own, None, True)
    head = f"know {own} classes" if own else "have no head"
    cures = [f"Train it on your data: {train}", f"or name a checkpoint: {name.arch}@PATH"]
    if own > num_classes:
        cures.append("or use the classes they share: --set classroom.class_map=auto")
    raise WeightsError(
        f"{name.full}: {name.source}'s pretrained weights {head}, {data_name} has {num_classes}", hint=", ".join(cures)
    )


def _from_file(name: ModelName, asked: str, runs_dir: Path) -> Found:
    path = Path(asked).expanduser()
    if path.is_file():
        told = path.with_suffix(".toml")
        card = cards.read_card(told) if path.suffix == ".safetensors" and told.is_file() else cards.identify(path)
        if card is None:
            state = load_state(path)
            return Found(state, str(path), _head_classes(name, state), None, False)
        return _carded(name, path, card, f"{path}: {card.line()}")
    run, _, epoch = asked.rpartition("#") if re.search(r"#\d+$", asked) else (asked, "", "")
    folder = next((f for f in (Path(run).expanduser(), runs_dir / run) if f.is_dir()), None)
    if folder is None:
        if path.suffix or path.parent != Path("."):
            load_state(path)  # says what is wrong with it
        runs = [p.name for p in runs_dir.glob("*") if p.is_dir()] if runs_dir.is_dir() else []
        raise WeightsError(
            f"{name.typed}: {asked!r} is neither a file nor a run in {runs_dir}",
            hint=did_you_mean(run, runs) or "`kdcli runs ls` lists the runs.",
        )
    return _from_run(name, folder, int(epoch) if epoch else None)


def _from_run(name: ModelName, folder: Path, epoch: int | None) -> Found:
    last = folder / "student.safetensors"
    path = last if epoch is None else folder / f"epoch-{epoch:03d}.safetensors"
    if not path.is_file():
        kept = sorted(int(p.stem.removeprefix("epoch-")) for p in folder.glob("epoch-*.safetensors"))
        if epoch is not None:
            have = f"It kept {', '.join(map(str, kept))}." if kept else "It kept none."
            raise WeightsError(
                f"run {folder} kept no epoch {epoch}", hint=f"{have} `kdcli train --keep {epoch}` keeps it."
            )
        raise WeightsError(
            f"run {folder} has no {last.name}: it has not finished",
            hint=f"`kdcli runs show {folder}` says how to continue it"
            + (f", or use an epoch it kept: @{folder}#{kept[-1]}" if kept else ""),
        )
    told = path.with_suffix(".toml")
    if told.is_file():
        card = cards.read_card(told)
        return _carded(name, path, card, f"run {folder.name}: {card.line()}")
    whole = last.with_suffix(".toml")
    card = None
    if whole.is_file():  # an epoch kept without a card of its own: the run's says all but score and hash
        card = cards.read_card(whole).model_copy(update={"epoch": epoch, "score": {}, "sha256": "", "file": path.name})
    if card is not None:
        return _carded(name, path, card, f"run {folder.name}: {card.line()}")
    state = load_state(path)
    return Found(state, f"run {folder.name}: {path.name}", _head_classes(name, state), None, False)


def _carded(name: ModelName, path: Path, card: Card, origin: str) -> Found:
    """Weights with a card: of this architecture, and the bytes the card was written for."""
    if not cards.same_architecture(name.full, card.architecture):
        right = card.architecture.removeprefix("zoo:")
        raise WeightsError(f"{path} is a {right}, not a {name.arch}", hint=f"Write {right}@{name.weights or path}")
    if card.sha256 and cards.file_hash(path) != card.sha256:
        raise WeightsError(
            f"{path} is not the file its card was written for (sha256 differs)",
            hint="`kdcli zoo verify` checks the zoo. Copy or train it again, or delete both files.",
        )
    return Found(load_state(path), origin, card.num_classes, card, False)


def _head_classes(name: ModelName, state: dict[str, Tensor]) -> int | None:
    """How many classes a checkpoint's head has, None when its tensors are not this architecture's.

    The head is what changes with the class count: of a network built, without memory, for a count that is no width.
    """
    odd = 1237
    try:
        with torch.device("meta"):
            own = create(name, odd).module.state_dict()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        own = create(name, odd).module.state_dict()
    given = renamed(name.arch, state)
    heads = {given[k].shape[0] for k, v in own.items() if v.ndim and v.shape[0] == odd and k in given and given[k].ndim}
    return heads.pop() if len(heads) == 1 else None
