"""From a plan to a smaller network."""

from bar_edge.network.leaves import MixedAdd
from bar_edge.surgery.masked import masked_outputs, relative_difference
from bar_edge.surgery.slicer import slice_network

__all__ = ["MixedAdd", "masked_outputs", "relative_difference", "slice_network"]
