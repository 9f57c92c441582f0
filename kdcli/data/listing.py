"""The data sets in the data root, listed without opening any of them: for `kdcli data ls`."""

from typing import Any

from kdcli.data.sources import SOURCES
from kdcli.system.paths import data_root


def available(root: str | None = None) -> list[dict[str, Any]]:
    """The data sets that can be named: the built-in ones, and folders, packs and .npz files in the data root.

    One dict each: `name` (as --data takes it), `where`, `images`, `classes` (counts; None when unknown), `present`.
    """
    return [found for kind, source in SOURCES.items() for found in source.load().rows(kind, data_root(root))]
