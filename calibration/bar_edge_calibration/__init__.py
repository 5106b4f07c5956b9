"""Re-estimates what a network measured on its data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bar_edge_calibration.batchnorm import reestimate_batchnorm as reestimate_batchnorm

__all__ = ["reestimate_batchnorm"]


def __getattr__(name: str) -> Any:
    # loaded on first use: `verify` needs no torch
    if name == "reestimate_batchnorm":
        from bar_edge_calibration.batchnorm import reestimate_batchnorm as found

        return found
    raise AttributeError(f"module 'bar_edge_calibration' has no attribute '{name}'")
