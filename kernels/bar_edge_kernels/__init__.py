"""Mixed connectivity, defined: the oracle of every lowering and every kernel."""

from bar_edge_kernels.reference import gather, gather_conv_scatter_add, scatter_add

__all__ = ["gather", "gather_conv_scatter_add", "scatter_add"]
