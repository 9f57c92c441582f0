"""Pictures in, named batches out: sources, splits, views and the stream of training batches."""

from kdcli.data.batch import Batch
from kdcli.data.dataset import DataSet, Split
from kdcli.data.listing import available
from kdcli.data.sources import open_data, packing
from kdcli.data.stream import Stream
from kdcli.data.views import AUGMENTS

__all__ = ["AUGMENTS", "Batch", "DataSet", "Split", "Stream", "available", "open_data", "packing"]
