"""Which of a mentor's outputs are the data's classes: by WordNet id, by name, or by the recipe's table."""

import torch
from torch import Tensor

from kdcli.errors import WeightsError
from kdcli.models.data import Data
from kdcli.models.net import ModelName, Net

ClassMap = str | dict[str, str | int]
"""`off`, `auto`, or a table from the data's class to a mentor's class or its column (counted from 0)."""


def map_classes(name: ModelName, net: Net, data: Data, class_map: ClassMap) -> Tensor | None:
    """For every class of the data its column in the mentor's output [K], or None where the classes are the same.

    Raises WeightsError when the counts differ and the map is off, or a class has no counterpart.
    """
    classes, wnids, k = data.classes, data.wnids, len(data.classes)
    if class_map == "off":
        if net.num_classes == k:
            return None
        raise WeightsError(
            f"{name.full} has {net.num_classes} classes, {data.name} has {k}",
            hint="`--set classroom.class_map=auto` matches classes by WordNet id or name; "
            f"or train a mentor: `kdcli train --model {name.arch} --data {data.name}`.",
        )
    given = class_map if isinstance(class_map, dict) else {}
    if net.num_classes == k:  # perhaps the same classes: the map may be meant for another mentor
        labels = net.classes or net.wnids
        if labels is None and not any(isinstance(column, int) for column in given.values()):
            return None
        if labels is not None and [*map(same_name, labels)] in ([*map(same_name, classes)], wnids):
            return None
    table: dict[str, int] = {}
    for labels in (net.classes, net.wnids):
        for column, label in enumerate(labels or []):
            for part in (label, *label.split(", ")):
                table.setdefault(same_name(part), column)
    columns: list[int] = []
    missing: list[str] = []
    for i, label in enumerate(classes):
        wnid = wnids[i] if wnids else label
        wanted = given.get(label, given.get(wnid, wnid))
        column = wanted if isinstance(wanted, int) else table.get(same_name(wanted), table.get(same_name(label)))
        if column is None or not 0 <= column < net.num_classes:
            missing.append(label)
        else:
            columns.append(column)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise WeightsError(
            f"{name.full}: none of its {net.num_classes} classes is called {shown}",
            hint='Name them in [classroom.class_map]: lines like "my class" = "golf ball", or a column number.',
        )
    if len(set(columns)) < k:
        raise WeightsError(
            f"{name.full}: two classes of {data.name} map to the same one of its classes",
            hint="Give each a class of its own in [classroom.class_map].",
        )
    return torch.tensor(columns)


def same_name(label: str) -> str:
    """A class name as it is compared: lower case, `_` and `-` as spaces."""
    return label.lower().replace("_", " ").replace("-", " ").strip()
