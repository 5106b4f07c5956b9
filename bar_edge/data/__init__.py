"""Sources of images: what a data SPEC names, as three splits of normalised batches."""

from bar_edge.data.load import load_data
from bar_edge.data.source import DataSource, Split

__all__ = ["DataSource", "Split", "load_data"]
