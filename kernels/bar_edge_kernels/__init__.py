"""Mixed connectivity, defined: the oracle of every lowering and every kernel; and the kernels."""

from bar_edge_kernels.reference import gather, gather_conv_scatter_add, mixed_convolution, scatter_add

__all__ = ["gather", "gather_conv_scatter_add", "mixed_convolution", "scatter_add"]
