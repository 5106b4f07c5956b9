"""The networks of the paper, the user's own, and weights from files."""

from bar_edge.models.weights import load_weights
from bar_edge.models.zoo import ZOO, build

__all__ = ["ZOO", "build", "load_weights"]
