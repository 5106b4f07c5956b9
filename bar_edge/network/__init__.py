"""Networks as graphs: tracing, channel spaces, costs, saving and loading."""

from bar_edge.network.counted_cost import LayerCount, count, layers
from bar_edge.network.leaves import Expand, MixedAdd
from bar_edge.network.network import Network, is_network_folder
from bar_edge.network.prunable import prunable
from bar_edge.network.trace import trace

__all__ = ["Expand", "LayerCount", "MixedAdd", "Network", "count", "is_network_folder", "layers", "prunable", "trace"]
