"""Which weights a network starts from: a file, a run, the zoo's, the library's, or none."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from kdcli.errors import WeightsError, did_you_mean
from kdcli.models import cards
from kdcli.models.cards import Card
from kdcli.models.checkpoint import class_cure, load_state, renamed
from kdcli.models.data import Data
from kdcli.models.from_torchvision import names_weights
from kdcli.models.net import ModelName
from kdcli.models.registry import create_on_meta, pretrained_classes


@dataclass(frozen=True)
class Found:
    """The weights a network starts from."""

    state: dict[str, Tensor] | None  # None: initial weights, or the library's (`pretrained`)
    origin: str  # to print
    num_classes: int | None  # of the weights' head; None: unknown, or there is no head yet
    card: Card | None
    pretrained: bool  # to be loaded by `registry.create(..., pretrained=True)`


def choose(
    name: ModelName, data: Data, role: Literal["student", "mentor"], *, mapped: bool = False, runs: Path = Path("runs")
) -> Found:
    """Which weights a network of the classroom starts from (DESIGN section 3, "Names").

    `@path`, `@RUN`, `@RUN#epoch`, `@pretrained`, `@none`; left out, a student starts from scratch and a mentor takes
    the zoo's newest for this data set, else the library's pretrained weights when the class count fits.

    mapped: a class map applies, so a mentor's class count may differ. runs: the folder of runs.
    Raises WeightsError (exit 3) with the cure.
    """
    given = name.weights
    if role == "student" and given in (None, "none"):
        return Found(None, "from scratch", None, None, False)
    if given == "none":
        raise WeightsError(
            f"{name.typed}: an untrained mentor would teach noise",
            hint=f"Leave out @none, or train it first: kdcli train --model {name.arch} --data {data.name}",
        )
    if given == "pretrained" or names_weights(name):
        return _pretrained(name, data, role, mapped)
    if given is not None:
        found = _named(name, given, runs)
    else:
        card = cards.find(name.full, data.hash)
        if card is None:
            return _pretrained(name, data, role, mapped)
        path = cards.weights_path(card)
        assert path is not None
        found = _with_card(name, path, card, f"zoo: {card.line()}")
    if found.num_classes not in (None, len(data.classes)) and not (mapped and role == "mentor"):
        raise WeightsError(
            f"{found.origin}: its head has {found.num_classes} classes, {data.name} has {len(data.classes)}",
            hint=class_cure(name.arch, data.name, role),
        )
    return found


def _pretrained(name: ModelName, data: Data, role: str, mapped: bool) -> Found:
    """The library's weights."""
    trained, wanted = pretrained_classes(name), len(data.classes)
    train = f"kdcli train --model {name.arch if name.source == 'zoo' else name.full} --data {data.name}"
    if trained is None:
        what, near = f"{name.full} has no pretrained weights", ""
        if name.weights is None:
            what += f", and the zoo has none for {data.name}"
            usable = [card for card in cards.cards() if cards.weights_path(card) and card.dataset == data.name]
            near = did_you_mean(name.arch, [c.architecture.rpartition(":")[2] for c in usable]) if usable else ""
        raise WeightsError(what, hint=f"Train it: {train}; or name a checkpoint: {name.arch}@PATH. {near}".strip())
    if role == "student":
        head = "" if trained == wanted else f", a fresh head for {wanted} classes"
        return Found(None, f"{name.source}'s pretrained weights{head}", trained or None, None, True)
    if trained == wanted or (mapped and trained):
        return Found(None, f"{name.source}'s pretrained weights, {trained} classes", trained, None, True)
    head = f"know {trained} classes" if trained else "have no head"
    cures = [f"Train it on your data: {train}", f"or name a checkpoint: {name.arch}@PATH"]
    if trained > wanted:
        cures.append("or use the classes they share: --set classroom.class_map=auto")
    raise WeightsError(
        f"{name.full}: {name.source}'s pretrained weights {head}, {data.name} has {wanted}", hint=", ".join(cures)
    )


def _named(name: ModelName, given: str, runs: Path) -> Found:
    """What `@...` names: a file of weights, or a run and perhaps one of its epochs."""
    path = Path(given).expanduser()
    if path.is_file():
        written = path.suffix == ".safetensors" and path.with_suffix(".toml").is_file()
        card = cards.read_card(path.with_suffix(".toml")) if written else cards.identify(path)
        if card is None:
            return _without_card(name, path, str(path))
        return _with_card(name, path, card, f"{path}: {card.line()}")
    run, _, epoch = given.rpartition("#") if re.search(r"#\d+$", given) else (given, "", "")
    folder = next((f for f in (Path(run).expanduser(), runs / run) if f.is_dir()), None)
    if folder is None:
        if path.suffix or path.parent != Path("."):
            load_state(path)  # raises, with what is wrong with the path
        known = [p.name for p in runs.glob("*") if p.is_dir()] if runs.is_dir() else []
        raise WeightsError(
            f"{name.typed}: {given!r} is neither a file nor a run in {runs}",
            hint=did_you_mean(run, known) or "`kdcli runs ls` lists the runs.",
        )
    return _from_run(name, folder, int(epoch) if epoch else None)


def _from_run(name: ModelName, folder: Path, epoch: int | None) -> Found:
    """A run's student, or the weights of an epoch that it kept."""
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
    if path.with_suffix(".toml").is_file():
        card = cards.read_card(path.with_suffix(".toml"))
    elif last.with_suffix(".toml").is_file():  # an epoch without a card: the run's card, but for its score and hash
        card = cards.read_card(last.with_suffix(".toml"))
        card = card.model_copy(update={"epoch": epoch, "score": {}, "sha256": "", "file": path.name})
    else:
        return _without_card(name, path, f"run {folder.name}: {path.name}")
    return _with_card(name, path, card, f"run {folder.name}: {card.line()}")


def _with_card(name: ModelName, path: Path, card: Card, origin: str) -> Found:
    """Weights with a card, once the card's architecture and sha256 agree with the name and the file."""
    if not cards.same_architecture(name.full, card.architecture):
        right = card.architecture.removeprefix("zoo:")
        raise WeightsError(f"{path} is a {right}, not a {name.arch}", hint=f"Write {right}@{name.weights or path}")
    if card.sha256 and cards.file_hash(path) != card.sha256:
        raise WeightsError(
            f"{path} is not the file its card was written for (sha256 differs)",
            hint="`kdcli zoo verify` checks the zoo. Copy or train it again, or delete both files.",
        )
    return Found(load_state(path), origin, card.num_classes, card, False)


def _without_card(name: ModelName, path: Path, origin: str) -> Found:
    state = load_state(path)
    return Found(state, origin, _head_classes(name, state), None, False)


def _head_classes(name: ModelName, state: dict[str, Tensor]) -> int | None:
    """How many classes a checkpoint's head has, None when its tensors are not this architecture's.

    The head is what changes with the class count: the tensors whose first dimension, in a network built for an odd
    number of classes, is that number.
    """
    odd = 1237  # no layer of a known network is this wide
    built = create_on_meta(name, odd).module.state_dict()
    given = renamed(name.arch, state)
    heads = {
        given[k].shape[0] for k, v in built.items() if v.ndim and v.shape[0] == odd and k in given and given[k].ndim
    }
    return heads.pop() if len(heads) == 1 else None
