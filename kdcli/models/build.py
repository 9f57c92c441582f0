"""From a name to a Member: which weights, the network, its head, and the input it expects."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from kdcli.models import checkpoint, graduates, registry, weights
from kdcli.models.cards import RGB, Card
from kdcli.models.class_map import ClassMap, map_classes, same_name
from kdcli.models.member import Member
from kdcli.models.registry import ModelName, Net
from kdcli.models.weights import Found
from kdcli.system.sizes import Size, text

Note = tuple[str, object, str]
"""(what, value, why) of something that was chosen for the user."""


class Data(Protocol):
    """What a network must know of the data it is built for."""

    name: str
    classes: list[str]
    wnids: list[str] | None
    hash: str
    mean: RGB
    std: RGB
    image_size: Size


@dataclass
class Built:
    """A Member, and what was chosen on the way."""

    member: Member
    notes: list[Note] = field(default_factory=list)


def build(
    name: ModelName, data: Data, role: Literal["student", "mentor"], *, seed: int = 0, class_map: ClassMap = "off"
) -> Built:
    """The network that `name` means for this data, with its weights.

    A student has the initial weights that `seed` names, or those its name gives (`@...`); a mentor is frozen and in eval
    mode. Raises WeightsError (exit 3) for weights that are missing or do not fit.
    """
    found = weights.choose(
        name,
        role=role,
        data_hash=data.hash,
        num_classes=len(data.classes),
        data_name=data.name,
        class_map=role == "mentor" and class_map != "off",
    )
    net = _network(name, found, len(data.classes) if role == "student" else found.num_classes, seed)
    notes: list[Note] = []
    if role == "student":
        member = _member(net, name, found, data, of_library=found.pretrained, size_of_library=net.fixed_size)
        return Built(member, notes)
    notes.append((name.full, found.origin, "weights"))
    if found.card is not None:
        net.classes = found.card.classes or net.classes
    library = found.pretrained or (name.source != "zoo" and found.num_classes == registry.has_pretrained(name))
    member = _member(net, name, found, data, of_library=True, size_of_library=library or net.fixed_size)
    member.class_index = map_classes(name, net, data.classes, data.wnids, data.name, class_map)
    member.digest = checkpoint.digest(net.module)
    if found.card is None and not found.pretrained:
        read = f"{text(member.input_size)} px, mean {net.mean}, std {net.std}"
        notes.append((name.full, read, "default of the architecture, no model card"))
    theirs = found.card.classes if found.card is not None and class_map == "off" else []
    if theirs and [*map(same_name, theirs)] != [*map(same_name, data.classes)]:
        why = "classes taken in order; --set classroom.class_map=auto matches names"
        notes.append((name.full, f"its classes have other names: {', '.join(theirs[:3])}, ...", why))
    return Built(member.requires_grad_(False).eval(), notes)


def from_card(card: Card, state: dict[str, Tensor]) -> Member:
    """The network a card describes, with its weights and its input."""
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
    """The network with its weights; a fresh one's are drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = registry.create(name, num_classes, pretrained=found.pretrained)
    if found.state is not None:
        _fill(net, found.state, found.card, name, name.typed)
    return net


def _member(net: Net, name: ModelName, found: Found, data: Data, *, of_library: bool, size_of_library: bool) -> Member:
    """The input is what the weights' card says, else the library's values for the architecture, else the data's.

    of_library: normalise as the library does rather than by the data's mean and std.
    size_of_library: read the library's input size rather than the data's.
    """
    card = found.card
    return Member(
        net.module,
        name,
        mean=card.mean if card else net.mean if of_library else data.mean,
        std=card.std if card else net.std if of_library else data.std,
        input_size=card.input_size if card else net.input_size if size_of_library else data.image_size,
        interpolation=card.interpolation if card else net.interpolation,
        num_classes=len(data.classes),
        origin=found.origin,
    )


def _fill(net: Net, state: dict[str, Tensor], card: Card | None, name: ModelName, where: str) -> None:
    """Load weights; a network that its card calls a graduate is first put together around the architecture."""
    if card is not None and card.graduate is not None:
        net.module = graduates.build(net.module, card.graduate, image_size=card.input_size, name=name.full)
    checkpoint.fill(net.module, state, arch=name.arch, where=where)
