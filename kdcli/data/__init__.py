"""Images in, named batches out: sources, splits, views and the stream of training batches.

Names are imported when they are first used: the command line reads `kdcli.data.sources` without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcli.data.batch import Batch
    from kdcli.data.dataset import DataSet, Split
    from kdcli.data.listing import available
    from kdcli.data.opening import open_data, packing
    from kdcli.data.stream import Stream
    from kdcli.data.views import AUGMENTS

_FILES = {
    "Batch": "batch", "DataSet": "dataset", "Split": "dataset", "available": "listing", "open_data": "opening",
    "packing": "opening", "Stream": "stream", "AUGMENTS": "views",
}  # fmt: skip

__all__ = ["AUGMENTS", "Batch", "DataSet", "Split", "Stream", "available", "open_data", "packing"]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
