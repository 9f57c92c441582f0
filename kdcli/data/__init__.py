"""Pictures in, named batches out: sources, splits, views and the stream of training batches."""

from kdcli.data.available import available
from kdcli.data.base import Batch, DataSet, Split
from kdcli.data.sources import open_data, packing
from kdcli.data.stream import Stream
from kdcli.data.views import AUGMENTS

__all__ = ["AUGMENTS", "Batch", "DataSet", "Split", "Stream", "available", "open_data", "packing"]
