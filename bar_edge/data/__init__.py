"""Sources of images: what a data SPEC names, as three splits of normalised batches."""

from bar_edge.data.load import check_data, load_data
from bar_edge.data.source import DataSource, Split

__all__ = ["DataSource", "Split", "check_data", "load_data"]
