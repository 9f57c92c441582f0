"""Which of a mentor's classes are the data's: by WordNet id, by name, or as a recipe says."""

import torch
from torch import Tensor

from kdcli.errors import WeightsError
from kdcli.models.registry import ModelName, Net

ClassMap = str | dict[str, str | int]
"""`off`, `auto`, or a table from the data's class to a mentor's class or its column."""


def map_classes(
    name: ModelName, net: Net, classes: list[str], wnids: list[str] | None, data_name: str, class_map: ClassMap
) -> Tensor | None:
    """For every class of the data its column in the mentor's output, or None where they agree.

    Raises WeightsError when the counts differ and no map was asked for, or a class has no counterpart.
    """
    k = len(classes)
    if class_map == "off":
        if net.num_classes == k:
            return None
        raise WeightsError(
            f"{name.full} answers {net.num_classes} classes, {data_name} has {k}",
            hint="`--set classroom.class_map=auto` matches classes by WordNet id or name; "
            f"or train a mentor: `kdcli train --model {name.arch} --data {data_name}`.",
        )
    given = class_map if isinstance(class_map, dict) else {}
    if net.num_classes == k:  # a mentor of these very classes next to one of other classes, for which the map is meant
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
            f"{name.full}: no class of its {net.num_classes} is called {shown}",
            hint='Say which: [classroom.class_map] with lines like "my class" = "golf ball", or a column number.',
        )
    if len(set(columns)) < k:
        raise WeightsError(
            f"{name.full}: two classes of {data_name} map to the same one of its classes",
            hint="Give each its own in [classroom.class_map].",
        )
    return torch.tensor(columns)


def same_name(label: str) -> str:
    """A class name as it is compared: lower case, `_` and `-` as spaces."""
    return label.lower().replace("_", " ").replace("-", " ").strip()
