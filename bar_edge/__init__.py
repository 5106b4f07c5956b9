"""Budget-aware pruning of convolutional networks, from training to a measured artifact.

In your own training loop: `bar_edge.BAR` and `bar_edge.export(module, example_input, path)`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bar_edge.methods import BAR as BAR
    from bar_edge.network import Network as Network
    from bar_edge.targets.onnx.module import export as export

__all__ = ["BAR", "Network", "export"]

_HOMES = {"BAR": "bar_edge.methods", "Network": "bar_edge.network", "export": "bar_edge.targets.onnx.module"}


def __getattr__(name: str) -> Any:
    # loaded on first use: the process that measures latency, and `--help`, load no torch
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bar_edge' has no attribute '{name}'")
