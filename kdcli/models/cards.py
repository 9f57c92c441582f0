"""The zoo: trained weights, each with a card (a TOML file of the same stem), shipped with kdcli or the user's."""

import hashlib
import re
import tomllib
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Self

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from torch import Tensor

from kdcli.errors import WeightsError, did_you_mean
from kdcli.models.checkpoint import digest
from kdcli.models.net import RGB
from kdcli.system.files import write_atomic
from kdcli.system.paths import home, shipped
from kdcli.system.sizes import Size, pair
from kdcli.tasks import TASKS, Metric


def now() -> str:
    """The current time as ISO 8601, UTC, to the microsecond, so that text order is time order."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def stamp() -> str:
    """`now`, or just after the newest card of the user's zoo if the clock was set back: the newest card must win."""
    newest = max((card.created for card in cards(shipped=False)), default="")
    if now() > newest:
        return now()
    return (datetime.fromisoformat(newest) + timedelta(microseconds=1)).isoformat(timespec="microseconds")


class Card(BaseModel):
    """What is known about one file of weights. Written as TOML next to it; unknown keys are an error."""

    model_config = ConfigDict(extra="forbid")

    name: str  # for people: `cifar_resnet20 on cifar100`
    architecture: str  # with its source: `zoo:cifar_resnet20`
    dataset: str  # cifar100
    data_hash: str = ""  # content hash of the data set it was trained on; empty: unknown, and never matched
    num_classes: int = Field(ge=1)
    classes: list[str] = []
    task: str = "classify"
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt]  # pixels of a square, or [height, width]
    mean: RGB
    std: RGB
    interpolation: str = "bilinear"
    score: dict[str, float] = {}  # metric -> value on the data set's test images
    sha256: str = ""  # of the weights file
    licence: str = ""
    origin: str = ""  # a run, a repository and commit, a paper
    created: str = Field(default_factory=now)  # ISO 8601, UTC; a shipped card may have the year only
    epoch: int | None = None  # of the weights; None: unknown
    params: int | None = None
    graduate: dict[str, Any] | None = None  # the layers around the architecture (models/graduates.py); None: none
    file: str | None = None  # the weights' file name, when not the card's stem + .safetensors
    path: Path | None = Field(None, exclude=True)  # where this card was read from; never written

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_form(cls, table: Any) -> Any:
        """Cards of earlier versions have one metric, classification's primary one, as a key at the top."""
        metric = TASKS["classify"].metrics[0].name
        if not isinstance(table, dict) or metric not in table:
            return table
        rest = {key: value for key, value in table.items() if key != metric}
        value = table[metric]
        return rest if value is None else {**rest, "score": {metric: value, **rest.get("score", {})}}

    @model_validator(mode="after")
    def _check_score(self) -> Self:
        """Only the task's metrics, and percentages from 0 to 100."""
        if self.task not in TASKS:
            raise ValueError(f"task: no task called {self.task!r}. {did_you_mean(self.task, TASKS)}")
        metrics = {metric.name: metric for metric in TASKS[self.task].metrics}
        for name, value in self.score.items():
            if name not in metrics:
                raise ValueError(f"score.{name}: not a metric of {self.task}. {did_you_mean(name, metrics)}")
            if metrics[name].unit == "%" and not 0 <= value <= 100:
                raise ValueError(f"score.{name}: {value} is not a percentage from 0 to 100")
        return self

    @property
    def input_size(self) -> Size:
        """(height, width) of the network's input, in pixels."""
        return pair(self.image_size)

    @property
    def metric(self) -> Metric:
        """The primary metric of the network's task."""
        return TASKS[self.task].metrics[0]

    @property
    def value(self) -> float | None:
        """The primary metric's value; None: unknown."""
        return self.score.get(self.metric.name)

    def line(self) -> str:
        """`cifar_resnet56 on cifar100, 72.4 %, 2026-11-20`: what is printed when these weights are chosen."""
        arch = self.architecture.removeprefix("zoo:")
        arch += f" ({self.graduate.get('kind')} graduate)" if self.graduate else ""
        score = [] if self.value is None else [f"{self.value:.4g} {self.metric.unit}"]
        epoch = [] if self.epoch is None else [f"epoch {self.epoch}"]
        return ", ".join([f"{arch} on {self.dataset}", *score, *epoch, self.created[:10]])


def write_card(path: Path, card: Card) -> None:
    """Write a card as TOML, whole or not at all. Raises DataError (exit 3) when it cannot be written."""
    table = card.model_dump(mode="json", exclude_none=True)
    score = tomlkit.inline_table()
    score.update(table["score"])
    _write(path, tomlkit.dumps({**table, "score": score}).encode())


def read_card(path: Path) -> Card:
    """Read and check a card. Raises WeightsError (exit 3) naming the file and the key."""
    hint = "Delete it, or restore the card that was written with the weights."
    try:
        card = Card.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is not TOML: {error}", hint=hint) from None
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}", hint=hint) from None
    except ValidationError as error:
        raise WeightsError("\n".join(f"{path}: {_problem(p)}" for p in error.errors()), hint=hint) from None
    card.path = path
    return card


def _problem(problem: Any) -> str:
    """One of pydantic's findings as `key: what is wrong`; findings about several keys name them in their text."""
    key = ".".join(map(str, problem["loc"]))
    return f"{key}: {problem['msg']}" if key else problem["msg"].removeprefix("Value error, ")


def save(folder: Path, stem: str, state: dict[str, Tensor], card: Card) -> Path:
    """Write `stem.safetensors` and its card `stem.toml`; each appears whole or not at all.

    The card's sha256 is filled in. Returns the weights' path. Raises DataError (exit 3) when they cannot be written,
    leaving no temporary file.
    """
    from safetensors.torch import save as to_bytes

    # safetensors refuses tensors that share memory (tied weights) or are strided: each is copied
    data = to_bytes({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, metadata={"format": "pt"})
    weights, path = folder / f"{stem}.safetensors", folder / f"{stem}.toml"
    card = card.model_copy(update={"sha256": hashlib.sha256(data).hexdigest(), "file": None, "path": path})
    _write(weights, data)
    write_card(path, card)
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

    The user's cards come before shipped ones. A timm name without a pretrained tag finds tagged ones too: a tag names
    weights, not an architecture. A graduate with layers around its architecture is found by its run or path only.
    """
    if not data_hash:
        return None
    for card in cards():
        fits = card.data_hash == data_hash and card.graduate is None and _same(architecture, card.architecture)
        if fits and weights_path(card):
            return card
    return None


def weights_path(card: Card) -> Path | None:
    """The weights' file next to the card; None when there is none (some cards ship without their weights)."""
    if card.path is None:
        return None
    path = card.path.parent / card.file if card.file else card.path.with_suffix(".safetensors")
    return path if path.is_file() else None


def verify(card: Card) -> tuple[Literal["ok", "changed", "missing"], str]:
    """Whether the weights next to a card are those it was written for; with the path or what is wrong."""
    path = weights_path(card)
    if path is None:
        return "missing", f"no weights next to {card.path}"
    found = file_hash(path)
    if found != card.sha256:
        return "changed", f"{path}: sha256 {found[:12]}... is not the card's {card.sha256[:12]}..."
    return "ok", str(path)


def identify(path: Path) -> Card | None:
    """The shipped card with this file's sha256; they describe public checkpoints, which do not ship with kdcli."""
    known = {card.sha256: card for card in cards(user=False) if card.sha256}
    return known.get(file_hash(path)) if known and path.is_file() else None


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_architecture(a: str, b: str) -> bool:
    """Whether two names, with or without source prefix or timm tag, may mean the same architecture."""
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
