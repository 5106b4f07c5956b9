"""One module of the user's as one ONNX file: `bar_edge.export`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from bar_edge.errors import BarEdgeError
from bar_edge.targets.onnx.file import export_onnx, parity_onnx
from bar_edge.targets.onnx.parity import TOLERANCES


def export(module: nn.Module, example_input: Tensor | tuple[Tensor, ...], path: str | Path) -> float:
    """Write `module` to one ONNX file with a free batch size and return its parity error on `example_input`.

    example_input: (N, ...), as the module takes it, or a tuple of several. Raises InputError if the module cannot be
    exported and BarEdgeError if the file computes something else; `path` then keeps what it held.
    """
    path = Path(path)
    candidate = path.with_name(f".{path.name}.candidate")
    try:
        inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
        export_onnx(module, tuple(tuple(x.shape[1:]) for x in inputs), candidate)
        error = parity_onnx(module, candidate, tuple(x.detach().cpu().float() for x in inputs))
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
