"""The classroom: a student and frozen mentors, each normalising and resizing for itself."""

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.data import DataSet
from kdcli.errors import RecipeError, WeightsError
from kdcli.methods.base import Maps, View
from kdcli.models import graduates, registry, weights
from kdcli.models.cards import RGB, Card
from kdcli.models.registry import ModelName, Net
from kdcli.models.taps import Taps
from kdcli.recipe import ClassroomConfig, Recipe

NOTHING: frozenset[str] = frozenset()
READ = frozenset({"pooled", "maps", "pre"})  # of what a method may need, what a network's pass must be asked for


class Member(nn.Module):
    """A network and how it wants its input; pixels in, logits of the data's classes out.

    `mean`, `std` and `input_size` are its own. `class_index` [K] picks the data's classes out of its own.
    """

    mean_: Tensor
    std_: Tensor
    class_index: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        name: ModelName,
        *,
        mean: RGB,
        std: RGB,
        input_size: int,
        interpolation: str,
        num_classes: int,
        class_index: Tensor | None = None,
        origin: str = "",
        digest: str = "",
    ) -> None:
        super().__init__()
        self.net = net
        self.architecture = name
        self.name = name.arch  # unique within a classroom
        self.mean, self.std = mean, std
        self.input_size, self.interpolation = input_size, interpolation
        self.num_classes = num_classes  # of its answers
        self.origin, self.digest = origin, digest
        self.register_buffer("mean_", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std_", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("class_index", class_index, persistent=False)
        self._pooled: dict[int, Tensor | None] = {}  # thread -> its pooled vectors: threads may share one mentor
        self._head: list[nn.Module] = []  # a list, for a module would be listed among the parameters twice
        self._taps: dict[bool, Taps] = {}  # with what comes before activations, and without

    def read(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 S S"]:
        """Pixels in [0, 1] resized to this network's input size and normalised with its mean and std."""
        if pixels.shape[-1] != self.input_size or pixels.shape[-2] != self.input_size:
            mode = self.interpolation if self.interpolation in ("bilinear", "bicubic") else "bicubic"
            pixels = F.interpolate(pixels, size=(self.input_size, self.input_size), mode=mode, antialias=True)
        return (pixels - self.mean_) / self.std_

    def forward(self, pixels: Float[Tensor, "B 3 H W"], needs: frozenset[str] = NOTHING) -> Any:
        """Logits [B, K]; with `needs` what `see` makes a View of: logits, pooled vectors or None, maps or None."""
        x = self.read(pixels).to(next(self.net.parameters()).dtype)
        if not needs:
            return self._mine(self.net(x))
        if "pooled" not in needs:
            return *self._seen(x, needs), None
        thread = threading.get_ident()
        self.prepare(needs)
        self._pooled[thread] = None
        try:
            out, maps = self._seen(x, needs)
        finally:
            pooled = self._pooled.pop(thread)
        assert pooled is not None
        if pooled.ndim > 2:
            pooled = pooled.mean((2, 3)) if isinstance(self._head[0], nn.Conv2d) else pooled.flatten(1, -2).mean(1)
        return out, maps, pooled

    def _seen(self, x: Float[Tensor, "B 3 S S"], needs: frozenset[str]) -> tuple[Tensor, Maps | None]:
        if not needs & {"maps", "pre"}:
            return self._mine(self.net(x)), None
        self.prepare(needs)
        out, maps = self._taps["pre" in needs](x)
        return self._mine(out), maps

    def _mine(self, out: Float[Tensor, "B C"]) -> Float[Tensor, "B K"]:
        return out if self.class_index is None else out.index_select(-1, self.class_index)

    def see(self, pixels: Float[Tensor, "B 3 H W"], needs: frozenset[str] = NOTHING) -> View:
        """Its answer with what is needed beside logits: `pooled` vectors, `maps` by tap, `pre` with both.

        pooled are the penultimate vectors: what the last linear layer is given, maps and tokens averaged.
        Raises WeightsError for a network that has none, or whose maps cannot be read.
        """
        needs &= READ
        if not needs:
            return View(self(pixels))
        out, maps, pooled = self(pixels, needs)
        return View(out, pooled, maps)

    def prepare(self, needs: frozenset[str]) -> None:
        """Make ready for `see`, which several threads may then call at once."""
        if "pooled" in needs and not self._head:
            self._head.append(last_linear(self.net, self.architecture.full))
            self._head[0].register_forward_pre_hook(self._keep)
        if needs & {"maps", "pre"} and ("pre" in needs) not in self._taps:
            taps = Taps(self.net, self.input_size, self.architecture.full, pre="pre" in needs)
            self._taps["pre" in needs] = taps

    def forget(self) -> None:
        """Modules of the network were replaced: what `prepare` found is no longer there."""
        self._taps.clear()
        self._head.clear()

    @property
    def head(self) -> nn.Linear | nn.Conv2d:
        """The layer that turns pooled vectors into logits. Raises WeightsError for a network without one."""
        return last_linear(self.net, self.architecture.full)  # pyright: ignore[reportReturnType]

    @property
    def width(self) -> int:
        """How long its pooled vectors are."""
        head = self.head
        return head.in_features if isinstance(head, nn.Linear) else head.in_channels

    def classify(self, pooled: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Logits of pooled vectors through this network's own head, which learns nothing by it."""
        head = self.head
        bias = None if head.bias is None else head.bias.detach().float()
        return self._mine(F.linear(pooled.float(), head.weight.detach().float().flatten(1), bias))

    @torch.no_grad()
    def check_head(self) -> None:
        """Raise WeightsError unless `classify` of its pooled vectors is its answer (SqueezeNet's ends in a ReLU)."""
        training = self.training
        seen = self.eval().see(torch.rand(2, 3, self.input_size, self.input_size).to(self.mean_), frozenset({"pooled"}))
        self.train(training)
        out, again = seen.out.float(), self.classify(seen.vectors)
        if not torch.allclose(again, out, rtol=1e-2, atol=1e-2 * float(out.abs().max())):
            raise WeightsError(
                f"{self.architecture.full} does more after its last linear layer, so that cannot be borrowed",
                hint="Choose another network as teacher, or a method that borrows no classifier.",
            )

    @torch.no_grad()
    def taps(self) -> dict[str, tuple[int, ...]]:
        """What can be read of it, by name, with its shape for one image: stages, pooled vectors, logits."""
        needs, training = frozenset({"maps", "pooled"}), self.training
        pixels = torch.zeros(2, 3, self.input_size, self.input_size, device=self.mean_.device)
        seen = self.eval().see(pixels, needs)
        self.train(training)
        assert isinstance(seen.maps, dict)
        return {
            name: tuple(x.shape[1:]) for name, x in {**seen.maps, "pooled": seen.vectors, "logits": seen.out}.items()
        }

    def _keep(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        if (thread := threading.get_ident()) in self._pooled:
            self._pooled[thread] = given[0]

    def with_net(self, net: nn.Module) -> "Member":
        """Another network that reads and answers as this one does."""
        twin = Member(
            net, self.architecture, mean=self.mean, std=self.std, input_size=self.input_size,
            interpolation=self.interpolation, num_classes=self.num_classes, class_index=self.class_index,
            origin=self.origin, digest=self.digest,
        )  # fmt: skip
        twin.name = self.name
        return twin.to(self.mean_.device).requires_grad_(False).eval()

    def count(self) -> tuple[int, int]:
        """Parameters, and multiply-adds of one image at this network's own input size."""
        return registry.count(self.net, self.input_size)


@dataclass
class Classroom:
    """Frozen mentors, the teacher first, and what is needed to seat any number of students beside them."""

    recipe: Recipe
    data: DataSet
    mentors: list[Member]
    device: torch.device
    student_name: ModelName
    notes: list[tuple[str, object, str]] = field(default_factory=list)
    """(what, value, why) of everything that was chosen for the user."""
    banks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What provenance says of each mentor's bank, by the mentor's name."""

    def student(self, seed: int, arch: str | None = None) -> Member:
        """A student with the initial weights that `seed` names, or the weights its name gives (`@...`).

        `arch` names another network for it.
        """
        name, data = registry.resolve(arch) if arch else self.student_name, self.data
        found = weights.choose(
            name,
            role="student",
            data_hash=data.hash,
            num_classes=len(data.classes),
            data_name=data.name,
            class_map=False,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = registry.create(name, len(data.classes), pretrained=found.pretrained)
        if found.state is not None:
            _fill(net, found.state, found.card, name, name.typed)
        card, own = found.card, found.pretrained  # weights that come with values of their own keep them
        member = Member(
            net.module,
            name,
            mean=card.mean if card else net.mean if own else data.mean,
            std=card.std if card else net.std if own else data.std,
            input_size=card.image_size if card else net.input_size if net.fixed_size else data.image_size,
            interpolation=card.interpolation if card else net.interpolation,
            num_classes=len(data.classes),
            origin=found.origin,
        )
        return member.to(self.device)


def seat(recipe: Recipe, data: DataSet, device: torch.device, *, mentors: bool = True) -> Classroom:
    """Resolve the recipe's names and load its mentors (frozen, in eval mode).

    Raises RecipeError for a name nobody knows, WeightsError for weights that are missing or do not fit.
    """
    config = recipe.classroom
    if not config.student:
        raise RecipeError("no student is named", hint="Add --student NAME; `kdcli models` searches the names.")
    student = registry.resolve(config.student)
    notes: list[tuple[str, object, str]] = list(data.notes)
    if student.guessed:
        notes.append((student.typed, student.full, "the only name that fits"))
    taught = [config.teacher, *config.peers] if config.teacher else list(config.peers)
    if config.peers and not config.teacher:
        raise RecipeError("peers without a teacher", hint="Name the largest mentor with --teacher.")
    members = [_mentor(spec, config, data, notes) for spec in taught] if mentors else []
    _make_unique(members)
    return Classroom(recipe, data, [m.to(device) for m in members], device, student, notes)


def from_card(card: Card, state: dict[str, Tensor]) -> Member:
    """The network a card describes, with its weights, reading its input as the card says."""
    name = registry.resolve(card.architecture)
    net = registry.create(name, card.num_classes)
    _fill(net, state, card, name, card.name)
    return Member(
        net.module,
        name,
        mean=card.mean,
        std=card.std,
        input_size=card.image_size,
        interpolation=card.interpolation,
        num_classes=card.num_classes,
        origin=card.origin,
        digest=card.sha256,
    ).eval()


def _fill(net: Net, state: dict[str, Tensor], card: Card | None, name: ModelName, where: str) -> None:
    """Load weights; a network that its card calls a graduate is first put together around the architecture."""
    if card is not None and card.graduate is not None:
        net.module = graduates.build(net.module, card.graduate, image_size=card.image_size, name=name.full)
    weights.fill(net.module, state, arch=name.arch, where=where)


def last_linear(net: nn.Module, name: str) -> nn.Module:
    """The layer a network ends in: what it calls its classifier, else its last nn.Linear or nn.Conv2d.

    Raises WeightsError when there is none, or several classifiers side by side.
    """
    named = net.get_classifier() if hasattr(net, "get_classifier") else None  # pyright: ignore[reportCallIssue]
    inside = named if isinstance(named, nn.Module) else net
    layers = [layer for layer in inside.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not layers or isinstance(named, tuple | list):
        raise WeightsError(
            f"{name} does not end in one linear layer, so it has no penultimate vectors",
            hint="Choose another mentor, or leave out what asks for pooled features (classroom.bank_pooled).",
        )
    return layers[-1]


def _mentor(spec: str, config: ClassroomConfig, data: DataSet, notes: list[tuple[str, object, str]]) -> Member:
    name = registry.resolve(spec)
    if name.guessed:
        notes.append((name.typed, name.full, "the only name that fits"))
    found = weights.choose(
        name,
        role="mentor",
        data_hash=data.hash,
        num_classes=len(data.classes),
        data_name=data.name,
        class_map=config.class_map != "off",
    )
    notes.append((name.full, found.origin, "weights"))
    card = found.card
    if found.pretrained:
        net = registry.create(name, None, pretrained=True)
    else:
        net = registry.create(name, found.num_classes)
        assert found.state is not None
        _fill(net, found.state, card, name, name.typed)
    if card is not None:
        net.classes = card.classes or net.classes
    library = found.pretrained or (name.source != "zoo" and found.num_classes == registry.has_pretrained(name))
    size = card.image_size if card else net.input_size if (library or net.fixed_size) else data.image_size
    if card is None and not found.pretrained:
        notes.append(
            (name.full, f"{size} px, mean {net.mean}, std {net.std}", "no card says; what the network expects")
        )
    if (
        card
        and config.class_map == "off"
        and card.classes
        and [*map(_fold, card.classes)] != [*map(_fold, data.classes)]
    ):
        why = "taken in order; --set classroom.class_map=auto matches names"
        notes.append((name.full, f"calls its classes otherwise: {', '.join(card.classes[:3])}, ...", why))
    member = Member(
        net.module,
        name,
        mean=card.mean if card else net.mean,
        std=card.std if card else net.std,
        input_size=size,
        interpolation=card.interpolation if card else net.interpolation,
        num_classes=len(data.classes),
        class_index=map_classes(name, net, data, config),
        origin=found.origin,
        digest=weights.digest(net.module),
    )
    return member.requires_grad_(False).eval()


def map_classes(name: ModelName, net: Net, data: DataSet, config: ClassroomConfig) -> Tensor | None:
    """For every class of the data its column in the mentor's answer, or None where they agree.

    Raises WeightsError when the counts differ and no map was asked for, or a class has no counterpart.
    """
    k = len(data.classes)
    if config.class_map == "off":
        if net.num_classes == k:
            return None
        raise WeightsError(
            f"{name.full} answers {net.num_classes} classes, {data.name} has {k}",
            hint="`--set classroom.class_map=auto` matches classes by WordNet id or name; "
            f"or train a mentor: `kdcli train --model {name.arch} --data {data.name}`.",
        )
    given = config.class_map if isinstance(config.class_map, dict) else {}
    if net.num_classes == k:  # a mentor of these very classes beside one of others, for whom the map is meant
        labels = net.classes or net.wnids
        if labels is None and not any(isinstance(column, int) for column in given.values()):
            return None
        if labels is not None and [*map(_fold, labels)] in ([*map(_fold, data.classes)], data.wnids):
            return None
    table: dict[str, int] = {}
    for labels in (net.classes, net.wnids):
        for column, label in enumerate(labels or []):
            for part in (label, *label.split(", ")):
                table.setdefault(_fold(part), column)
    columns: list[int] = []
    missing: list[str] = []
    for i, label in enumerate(data.classes):
        wnid = data.wnids[i] if data.wnids else label
        wanted = given.get(label, given.get(wnid, wnid))
        column = wanted if isinstance(wanted, int) else table.get(_fold(wanted), table.get(_fold(label)))
        if column is None or not 0 <= column < net.num_classes:
            missing.append(label)
        else:
            columns.append(column)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise WeightsError(
            f"{name.full}: no class of its {net.num_classes} goes by the name of {shown}",
            hint='Say which: [classroom.class_map] with lines like "my class" = "golf ball", or a column number.',
        )
    if len(set(columns)) < k:
        raise WeightsError(
            f"{name.full}: two classes of {data.name} map to the same one of its classes",
            hint="Give each its own in [classroom.class_map].",
        )
    return torch.tensor(columns)


def _fold(label: str) -> str:
    return label.lower().replace("_", " ").replace("-", " ").strip()


def _make_unique(members: list[Member]) -> None:
    seen: dict[str, int] = {}
    for member in members:
        seen[member.name] = seen.get(member.name, 0) + 1
        if seen[member.name] > 1:
            member.name = f"{member.name}#{seen[member.name]}"
