"""A model.py for torch."""

from __future__ import annotations

from bar_edge.targets.row import Target
from bar_edge.targets.torch_source.source import write_torch_source

TORCH = Target(name="torch", files=("model.py", "model.safetensors"), precisions=("fp32",), write=write_torch_source)
