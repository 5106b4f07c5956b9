"""TensorRT, by the modules of bar-edge that build and run an engine."""

from __future__ import annotations

import functools
import importlib
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .inputs import random_inputs
from .records import Loaded, Problem, Runtime, Settings
from .telling import doing, package


def load_tensorrt(path: Path, name: str, settings: Settings) -> Loaded:
    """Load the engine beside an ONNX file, or build one for this batch; a run copies inputs there and outputs back."""
    package("numpy")
    if sys.version_info < (3, 10):
        raise Problem("EnvironmentLacks", "Python 3.10 for TensorRT", f"Python {platform.python_version()}")
    sys.path.insert(0, settings.modules)
    ours, builder = (importlib.import_module(f"bar_edge.targets.tensorrt.{name}") for name in ("engine", "build"))
    engine_path = path.with_suffix(".engine")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if not engine_path.is_file():
                doing("building the engine of", {"name": name})
                engine_path = Path(scratch) / "model.engine"
                options = builder.EngineOptions(batch=(settings.batch,) * 3, timing_caches=settings.caches)
                builder.build(path, engine_path, options)
            engine = ours.load(engine_path, path)
        inputs = [(str(engine.dtypes[n]), [s if s > 0 else None for s in shape]) for n, shape in engine.inputs.items()]
        parts: list[Any] = []
        version = str(package("tensorrt").__version__)
        layers = functools.partial(_layer_times, ours, engine)
        loaded = Loaded(functools.partial(_timed_run, engine, parts), inputs, version, parts, layers)
        loaded.run(random_inputs(loaded, settings.batch, 0))  # says at once whether the engine takes the batch
    except ours.BarEdgeError as error:
        raise _told(error) from error
    return loaded


def _timed_run(engine: Any, parts: list[Any], arrays: list[Any]) -> Sequence[Any]:
    outputs: Sequence[Any] = engine.run(arrays)
    parts.append(engine.timing)
    return outputs


def _told(error: Any) -> Problem:
    """Return one of bar_edge's errors as an answer."""
    return Problem(type(error).__name__, error.required, error.got, error.remedy)


def _layer_times(ours: Any, engine: Any, arrays: list[Any]) -> dict[str, float]:
    try:
        return dict(engine.layers_ms(arrays))
    except ours.BarEdgeError as error:
        raise _told(error) from error


TENSORRT = Runtime("tensorrt", load_tensorrt, ("fp32",), gpu=True, builds=True)
