"""One module of the user's as one ONNX file: `bar_edge.export`."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

from torch import Tensor, nn

from bar_edge.errors import BarEdgeError
from bar_edge.files import write_bytes
from bar_edge.lowering.lower import lower
from bar_edge.network import Network
from bar_edge.records.lowering import Lowering
from bar_edge.records.tolerance import TOLERANCES
from bar_edge.targets.onnx.file import export_onnx, parity_onnx
from bar_edge.targets.onnx.target import ONNX


def export(
    module: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    path: str | Path,
    *,
    lowering: str | None = None,
) -> float:
    """Write `module` to one ONNX file with a free batch size and return its parity error on `example_input`.

    Args:
        module: any module; the additions of a pruned network, or of one inside it, run in the form of `lowering`.
        example_input: (N, ...), as the module takes it; a tuple for several inputs.
        path: of the file.
        lowering: as for `bar-edge export`; by default the form that is first in docs/mixed_connectivity.md for ONNX
            Runtime. Only `paper` and `scatter` write a Scatter, which several runtimes lack.

    Raises InputError if the module cannot be exported or the lowering does not exist, and BarEdgeError if the file
    computes something else; `path` then keeps what it held.
    """
    path, form = Path(path), Lowering.parse(lowering) if lowering else ONNX.forms["fp32"].candidates[0]
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    with tempfile.TemporaryDirectory() as scratch:
        candidate = Path(scratch) / "model.onnx"
        export_onnx(_lowered(module, form), tuple(tuple(x.shape[1:]) for x in inputs), candidate)
        error = parity_onnx(module, candidate, tuple(x.detach().cpu().float() for x in inputs))
        if not error <= TOLERANCES["fp32"]:
            raise BarEdgeError(
                f"a file that differs from the network by at most {TOLERANCES['fp32']:g}",
                got=f"{error:.3g}",
                consequence=f"{path.name} was not written",
                remedy="report the network: this is a bug of an exporter",
            )
        write_bytes(path, candidate.read_bytes())
    return error


def _lowered(module: nn.Module, lowering: Lowering) -> nn.Module:
    """Return the module, a copy if there are networks in it, which are then lowered."""
    if isinstance(module, Network):
        return lower(module, lowering)
    inside = [name for name, part in module.named_modules() if isinstance(part, Network)]
    if not inside:
        return module
    module = copy.deepcopy(module)
    for name in inside:
        network = module.get_submodule(name)
        assert isinstance(network, Network)
        module.set_submodule(name, lower(network, lowering))
    return module
