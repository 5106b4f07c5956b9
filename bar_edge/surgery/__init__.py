"""From a plan to a smaller network."""

from bar_edge.network.mixed import MixedAdd
from bar_edge.surgery.slicing import slice_network

__all__ = ["MixedAdd", "slice_network"]
