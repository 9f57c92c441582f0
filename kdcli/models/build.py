"""From a name to a Member: which weights, the network, the input it expects, its classes."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kdcli.models import checkpoint, graduates, registry, weights
from kdcli.models.cards import Card
from kdcli.models.class_map import ClassMap, map_classes, same_name
from kdcli.models.data import Data
from kdcli.models.member import Member
from kdcli.models.net import RGB, ModelName, Net
from kdcli.models.weights import Found
from kdcli.system.sizes import Size, text

Role = Literal["student", "mentor"]
Note = tuple[str, object, str]
"""(what, value, why) of something that was chosen for the user."""


@dataclass
class Built:
    """A Member, and what was chosen for the user while it was built."""

    member: Member
    notes: list[Note] = field(default_factory=list)


def build(name: ModelName, data: Data, role: Role, *, seed: int = 0, class_map: ClassMap = "off") -> Built:
    """The network that `name` means for this data, with its weights.

    A student has initial weights drawn from `seed`, or those its name gives (`@...`). A mentor is frozen and in eval
    mode; `class_map` maps the data's classes to its outputs.
    Raises WeightsError (exit 3) for weights that are missing or do not fit.
    """
    found = weights.choose(name, data, role, mapped=role == "mentor" and class_map != "off")
    net = _network(name, found, len(data.classes) if role == "student" else found.num_classes, seed)
    mean, std, size, interpolation = _input(name, net, found, data, role)
    member = Member(
        net.module,
        name,
        mean=mean,
        std=std,
        input_size=size,
        interpolation=interpolation,
        num_classes=len(data.classes),
        origin=found.origin,
    )
    notes = _resizing(name, net, size, data)
    if role == "student":
        return Built(member, notes)
    if found.card is not None:
        net.classes = found.card.classes or net.classes
    member.class_index = map_classes(name, net, data, class_map)
    member.digest = checkpoint.digest(net.module)
    notes = [(name.full, found.origin, "weights"), *_guesses(member, found, data, class_map), *notes]
    return Built(member.requires_grad_(False).eval(), notes)


def from_card(card: Card, state: dict[str, Tensor]) -> Member:
    """The network that a card describes, with its weights, input and classes, in eval mode."""
    name = registry.resolve(card.architecture)
    net = registry.create(name, card.num_classes)
    _fill(net, state, card, name, card.name)
    return Member(
        net.module,
        name,
        mean=card.mean,
        std=card.std,
        input_size=card.input_size,
        interpolation=card.interpolation,
        num_classes=card.num_classes,
        origin=card.origin,
        digest=card.sha256,
    ).eval()


def _network(name: ModelName, found: Found, num_classes: int | None, seed: int) -> Net:
    """The network with its weights; initial ones are drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = registry.create(name, num_classes, pretrained=found.pretrained)
    if found.state is not None:
        _fill(net, found.state, found.card, name, name.typed)
    return net


def _fill(net: Net, state: dict[str, Tensor], card: Card | None, name: ModelName, where: str) -> None:
    """Load weights; where the card describes a graduate, build that around the architecture first."""
    if card is not None and card.graduate is not None:
        net.module = graduates.build(net.module, card.graduate, image_size=card.input_size, name=name.full)
    checkpoint.fill(net.module, state, arch=name.arch, where=where)


def _input(name: ModelName, net: Net, found: Found, data: Data, role: Role) -> tuple[RGB, RGB, Size, str]:
    """Mean, std, input size and interpolation: the card's, else those that the network's weights expect.

    Without a card: mentors and pretrained students use the library's mean and std, other students the data's; the size
    is the data's unless the architecture's is fixed or a mentor has the library's weights.
    """
    if (card := found.card) is not None:
        return card.mean, card.std, card.input_size, card.interpolation
    of_library = found.pretrained or (name.source != "zoo" and found.num_classes == registry.pretrained_classes(name))
    mean, std = (net.mean, net.std) if found.pretrained or role == "mentor" else (data.mean, data.std)
    size = net.input_size if net.fixed_size or (role == "mentor" and of_library) else data.image_size
    return mean, std, size, net.interpolation


def _resizing(name: ModelName, net: Net, size: Size, data: Data) -> list[Note]:
    """A note where the data's images are resized before the network, and stretched where the shapes differ."""
    if size == data.image_size:
        return []
    why = "the architecture's input size is fixed" if net.fixed_size else "the size its weights were trained at"
    stretched = size[0] * data.image_size[1] != size[1] * data.image_size[0]
    done = "resized, which changes their aspect ratio" if stretched else "resized"
    return [(name.full, f"input {text(size)} px: images of {text(data.image_size)} px are {done}", why)]


def _guesses(member: Member, found: Found, data: Data, class_map: ClassMap) -> list[Note]:
    """What was assumed about a mentor's weights: without a card its input, with one the order of its classes."""
    if found.card is None:
        if found.pretrained:
            return []
        read = f"{text(member.input_size)} px, mean {member.mean}, std {member.std}"
        return [(member.architecture.full, read, "default of the architecture, no model card")]
    names = found.card.classes if class_map == "off" else []
    if not names or [*map(same_name, names)] == [*map(same_name, data.classes)]:
        return []
    why = "classes taken in order; --set classroom.class_map=auto matches names"
    return [(member.architecture.full, f"its classes have other names: {', '.join(names[:3])}, ...", why)]
