"""What loads a model file and runs it: one short adapter per runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bar_edge.errors import EnvironmentLacks, InputError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A model file that is ready to run."""

    #: runs once on one array per input, in order; the outputs do not matter here
    run: Callable[[list[Any]], Any]
    #: (numpy dtype, shape) of each input; an axis of free size is a text or None
    inputs: tuple[tuple[str, tuple[int | str | None, ...]], ...]
    version: str


def load_onnxruntime_cpu(path: Path, threads: int, alone: bool) -> Loaded:
    """Load an ONNX file in ONNX Runtime on the CPU.

    threads: of one operator; operators run one after the other. alone: no other model runs in this process.
    Raises EnvironmentLacks without onnxruntime and InputError for a file that it cannot load.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentLacks("onnxruntime", got=f"{error}", remedy="pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if not alone:  # idle threads of one session would spin on the cores that the other one is measured on
        options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        got = f"{path.name}: {str(error).strip()[:200]}"
        raise InputError("an ONNX file that ONNX Runtime loads", got=got, consequence="nothing was measured") from error
    specifications = session.get_inputs()
    names = [value.name for value in specifications]
    return Loaded(
        run=lambda arrays: session.run(None, dict(zip(names, arrays, strict=True))),
        inputs=tuple((_dtype(value.type), tuple(value.shape)) for value in specifications),
        version=str(onnxruntime.__version__),
    )


def _dtype(kind: str) -> str:
    dtypes = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}
    if kind not in dtypes:
        raise InputError("inputs of float32 or uint8", got=kind, consequence="nothing was measured")
    return dtypes[kind]


#: name -> load(path, threads, alone)
RUNTIMES: dict[str, Callable[[Path, int, bool], Loaded]] = {"onnxruntime-cpu": load_onnxruntime_cpu}
