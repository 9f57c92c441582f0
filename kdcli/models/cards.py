"""The zoo: trained weights with a card each (one TOML file of the same stem), shipped ones and the user's own."""

import hashlib
import re
import tomllib
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from kdcli.errors import WeightsError
from kdcli.models.checkpoint import digest
from kdcli.system.files import write_atomic
from kdcli.system.paths import home, shipped
from kdcli.system.sizes import Size, pair
from kdcli.tasks import TASKS, Metric

RGB = tuple[float, float, float]


def now() -> str:
    """The present as ISO 8601, UTC, to the microsecond, so that text order is time order."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def stamp() -> str:
    """`now`, or just after the newest card of the user's zoo where the clock was set back: the newest must win."""
    newest = max((card.created for card in cards(shipped=False)), default="")
    if now() > newest:
        return now()
    return (datetime.fromisoformat(newest) + timedelta(microseconds=1)).isoformat(timespec="microseconds")


class Card(BaseModel):
    """What is known of one file of weights."""

    model_config = ConfigDict(extra="forbid")

    name: str  # for people: `cifar_resnet20 on cifar100`
    architecture: str  # with its source: `zoo:cifar_resnet20`
    dataset: str  # cifar100
    data_hash: str = ""  # content hash of the data set it learned from; empty: unknown, and never matched
    num_classes: int = Field(ge=1)
    classes: list[str] = []
    task: str = "classify"
    image_size: int | tuple[int, int]  # pixels; [height, width] where the two differ
    mean: RGB
    std: RGB
    interpolation: str = "bilinear"
    score: dict[str, float] = {}  # metric -> value on the data set's test images
    sha256: str = ""  # of the weights file
    licence: str = ""
    origin: str = ""  # a run, a repository and commit, a paper
    created: str = Field(default_factory=now)  # ISO 8601, UTC; a shipped card may know the year alone
    epoch: int | None = None  # of the weights; None: unknown
    params: int | None = None
    graduate: dict[str, Any] | None = None  # what is around the architecture (kdcli/models/graduates.py); None: nothing
    file: str | None = None  # the weights' file name, when not the card's stem + .safetensors
    path: Path | None = Field(None, exclude=True)  # where this card was read from; never written

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_form(cls, table: Any) -> Any:
        """Cards of earlier versions have their one metric as a key of its own."""
        if not isinstance(table, dict):
            return table
        known = {metric.name for task in TASKS.values() for metric in task.metrics}
        score = {key: value for key, value in table.items() if key in known and value is not None}
        rest = {key: value for key, value in table.items() if key not in known}
        return {**rest, "score": {**score, **rest.get("score", {})}} if score else rest

    @property
    def input_size(self) -> Size:
        """(height, width) of the network's input."""
        return pair(self.image_size)

    @property
    def metric(self) -> Metric:
        """The metric that the network's task is compared by."""
        return TASKS[self.task].metrics[0]

    @property
    def value(self) -> float | None:
        """Its primary metric; None: unknown."""
        return self.score.get(self.metric.name)

    def line(self) -> str:
        """`cifar_resnet56 on cifar100, 72.4 %, 2026-11-20`: what is printed when these weights are chosen."""
        arch = self.architecture.removeprefix("zoo:")
        arch += f" ({self.graduate.get('kind')} graduate)" if self.graduate else ""
        score = [] if self.value is None else [f"{self.value:.4g} {self.metric.unit}"]
        epoch = [] if self.epoch is None else [f"epoch {self.epoch}"]
        return ", ".join([f"{arch} on {self.dataset}", *score, *epoch, self.created[:10]])


def write_card(path: Path, card: Card) -> None:
    """Write a card as TOML, all at once. Raises WeightsError when the disk refuses."""
    plain = card.model_dump(mode="json", exclude_none=True)
    _write(path, tomlkit.dumps(plain).encode())


def read_card(path: Path) -> Card:
    """Read and check a card. Raises WeightsError naming the file and the key."""
    hint = "Delete it, or put back the one that was written with the weights."
    try:
        card = Card.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is not TOML: {error}", hint=hint) from None
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}", hint=hint) from None
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors()]
        raise WeightsError("\n".join(lines), hint=hint) from None
    card.path = path
    return card


def save(folder: Path, stem: str, state: dict[str, Tensor], card: Card) -> Path:
    """Write `stem.safetensors` and its card `stem.toml`; each appears whole or not at all.

    The card's sha256 is filled in. Returns the weights' path. Raises WeightsError (exit 3)
    when the disk is full or refuses, leaving no temporary file.
    """
    from safetensors.torch import save as pack

    # safetensors refuses tensors that share memory (tied weights) and strides: each gets memory of its own
    data = pack({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, metadata={"format": "pt"})
    weights, told = folder / f"{stem}.safetensors", folder / f"{stem}.toml"
    card = card.model_copy(update={"sha256": hashlib.sha256(data).hexdigest(), "file": None, "path": told})
    _write(weights, data)
    write_card(told, card)
    return weights


def add(state: dict[str, Tensor], card: Card) -> Card:
    """Put weights into the user's zoo, where the next command finds them. Returns the card as written."""
    words = [card.architecture.rpartition(":")[2], card.dataset, digest(state)[:8]]
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(words))
    return read_card(save(home() / "zoo", stem, state, card).with_suffix(".toml"))


def cards(user: bool = True, shipped: bool = True) -> list[Card]:
    """All cards, the user's first, newest first within each. A card that cannot be read is skipped with a warning."""
    out: list[Card] = []
    for folder in [home() / "zoo"] * user + [_shipped()] * shipped:
        found = []
        for path in sorted(folder.rglob("*.toml")):
            try:
                found.append(read_card(path))
            except WeightsError as error:
                warnings.warn(f"card skipped: {error.message}", stacklevel=2)
        out += sorted(found, key=lambda c: c.created, reverse=True)
    return out


def find(architecture: str, data_hash: str) -> Card | None:
    """The newest card with weights for an architecture (`zoo:cifar_resnet20` or `cifar_resnet20`) and a data set.

    The user's own come before shipped ones. A timm name without a pretrained tag finds tagged ones too: a tag names
    weights, not an architecture. A graduate that is more than its architecture is found by its run or path alone.
    """
    if not data_hash:
        return None
    for card in cards():
        fits = card.data_hash == data_hash and card.graduate is None and _same(architecture, card.architecture)
        if fits and weights_path(card):
            return card
    return None


def weights_path(card: Card) -> Path | None:
    """The file beside the card that holds its weights; None when there is none (a card alone may ship)."""
    if card.path is None:
        return None
    path = card.path.parent / card.file if card.file else card.path.with_suffix(".safetensors")
    return path if path.is_file() else None


def verify(card: Card) -> tuple[Literal["ok", "changed", "missing"], str]:
    """Whether the weights beside a card are the ones it was written for, and what is wrong in words."""
    path = weights_path(card)
    if path is None:
        return "missing", f"no weights beside {card.path}"
    found = file_hash(path)
    if found != card.sha256:
        return "changed", f"{path}: sha256 {found[:12]}... is not the card's {card.sha256[:12]}..."
    return "ok", str(path)


def identify(path: Path) -> Card | None:
    """The shipped card that knows this very file by its sha256, for checkpoints that do not ship themselves."""
    known = {card.sha256: card for card in cards(user=False) if card.sha256}
    return known.get(file_hash(path)) if known and path.is_file() else None


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_architecture(a: str, b: str) -> bool:
    """Whether two names, with or without source prefix or timm tag, may mean one architecture."""
    return _same(a, b) or _same(b, a)


def _same(asked: str, has: str) -> bool:
    source, _, arch = asked.rpartition(":")
    has_source, _, has_arch = has.rpartition(":")
    if source and has_source and source != has_source:
        return False
    return arch == has_arch or (has_source == "timm" and arch == has_arch.partition(".")[0])


def _shipped() -> Path:
    return shipped("zoo")


def _write(path: Path, data: bytes) -> None:
    write_atomic(path, lambda temporary: temporary.write_bytes(data))
