"""What a model file is run on, and whether its outputs are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records import Loaded, Problem

if TYPE_CHECKING:
    import numpy as np

#: the least tolerance of the outputs: bf16 keeps 8 bits of each number, layer after layer
LEAST_TOLERANCE = {"fp32": 0.0, "fp16": 0.02, "bf16": 0.05, "int8": 0.05}


def parity(model: Loaded, file: dict[str, Any], batch: int, least: float) -> dict[str, Any]:
    """Run the file's samples and return max|a-b| / max|a| against the outputs that it carries, with the verdict.

    The last samples are repeated to fill a batch. Not a number, or another shape, is as wrong as can be.
    """
    import numpy as np

    tensors = read_safetensors(Path(file["samples"]))
    inputs, expected = ([tensors[name] for name in file[side]] for side in ("inputs", "outputs"))
    n, error, scale = len(inputs[0]), 0.0, 0.0
    for start in range(0, n, batch):
        rows = [min(start + i, n - 1) for i in range(batch)]
        outputs = model.run([np.ascontiguousarray(array[rows]) for array in inputs])
        for a, b in zip(expected, outputs):
            a, b = a[start : start + batch].astype(np.float64), np.asarray(b)[: n - start]
            same = a.shape == b.shape and np.isfinite(a - b).all()
            error = max(error, float(np.abs(a - b).max())) if same else float("inf")
            scale = max(scale, float(np.abs(a).max()))
    off = relative(error, scale)
    tolerance = max(file["tolerance"], least)
    within = off <= tolerance
    return {"error": off if off < float("inf") else None, "tolerance": tolerance, "within": within, "n": n}


def relative(error: float, scale: float) -> float:
    """Return error / scale, where no error on an output of zeros is none."""
    return 0.0 if error == 0 else error / scale if scale else float("inf")


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file: 8 bytes of length, a JSON header, raw little-endian buffers."""
    import numpy as np

    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8", "BOOL": "?"}
    try:
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = {name: entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
        return {
            name: np.frombuffer(
                data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]], kind
            ).reshape(entry["shape"])
            for name, entry in header.items()
            for kind in [kinds[entry["dtype"]]]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"{type(error).__name__}: {str(error)[:200]}"
        raise Problem("InputError", "a whole samples.safetensors in the artifact", got, "export it again") from error


def random_inputs(model: Loaded, batch: int, seed: int) -> list[np.ndarray]:
    """Make random inputs by the file's own specification: float32 normal, uint8 uniform."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 256, (batch, *shape[1:]), np.uint8)
        if dtype == "uint8"
        else rng.standard_normal((batch, *shape[1:]), np.float32)
        for dtype, shape in model.inputs
    ]


def check_inputs(model: Loaded, batch: int) -> None:
    """Refuse a file whose inputs cannot be made up, or that takes another batch."""
    for dtype, (first, *rest) in model.inputs:
        if dtype not in ("float32", "uint8"):
            raise Problem("InputError", "inputs of float32 or uint8", str(dtype))
        if isinstance(first, int) and first != batch:
            raise Problem(
                "InputError", f"batch {first}, which the file fixes", f"batch {batch}", f"use --batch {first}"
            )
        if not all(isinstance(size, int) for size in rest):
            raise Problem(
                "InputError", "inputs whose sizes are fixed except for the batch", f"{rest}", "export it again"
            )
