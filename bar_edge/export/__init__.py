"""Export: lowerings, ONNX files, artifacts. `bar_edge.export(module, example_input, path)` writes one file."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

from bar_edge.errors import BarEdgeError

if TYPE_CHECKING:
    from torch import Tensor, nn


def export(module: nn.Module, example_input: Tensor, path: str | Path) -> float:
    """Write `module` to one ONNX file with a free batch size and return its parity error on `example_input`.

    example_input: (N, ...), as the module takes it. Raises InputError if the module cannot be exported and
    BarEdgeError if the file computes something else; `path` then keeps what it held.
    """
    from bar_edge.export.onnx import export_onnx, parity_onnx
    from bar_edge.export.parity import TOLERANCES

    path = Path(path)
    candidate = path.with_name(f".{path.name}.candidate")
    try:
        export_onnx(module, tuple(example_input.shape[1:]), candidate)
        error = parity_onnx(module, candidate, example_input.detach().cpu().float())
        if not error <= TOLERANCES["fp32"]:
            raise BarEdgeError(
                f"a file that differs from the network by at most {TOLERANCES['fp32']:g}",
                got=f"{error:.3g}",
                consequence=f"{path.name} was not written",
                remedy="report the network: this is a bug of an exporter",
            )
        candidate.replace(path)
    finally:
        candidate.unlink(missing_ok=True)
    return error


class _CallableModule(types.ModuleType):
    # importing any submodule binds bar_edge.export to this module, so the module itself has to be the function
    def __call__(self, module: nn.Module, example_input: Tensor, path: str | Path) -> float:
        return export(module, example_input, path)


sys.modules[__name__].__class__ = _CallableModule
