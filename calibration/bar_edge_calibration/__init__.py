"""Re-estimates what a network measured on its data."""

from bar_edge_calibration.batchnorm import reestimate_batchnorm

__all__ = ["reestimate_batchnorm"]
