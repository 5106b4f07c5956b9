"""TensorRT's Python bindings, as far as building and running have them in common.

The only module that imports `tensorrt`, and only when asked to. With build.py and engine.py it uses what the bindings
of 10.3, 10.16, 11.0 and 11.4 have in common (tests/targets/tensorrt_surface.json), and was run against a stand-in
generated from them: **not yet on a real TensorRT**.
"""

from __future__ import annotations

import re
from typing import Any

from bar_edge.errors import BarEdgeError, EnvironmentLacks

#: majors that this module was written against
MAJORS = (10, 11)


def import_tensorrt() -> Any:
    """Import TensorRT's Python bindings; raises EnvironmentLacks if they are missing or of an unknown major."""
    remedy = (
        "on a Jetson: apt install python3-libnvinfer (JetPack has it), elsewhere: pip install tensorrt; "
        "or export --target trt-bundle, which also builds with trtexec"
    )
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:  # OSError: bindings without the libraries
        raise EnvironmentLacks("TensorRT with its Python bindings", got=f"{error}", remedy=remedy) from error
    if numbers(trt.__version__)[0] not in MAJORS:
        raise EnvironmentLacks("TensorRT 10 or 11", got=trt.__version__, remedy=remedy)
    return trt


def new_log(trt: Any) -> Any:
    """Make a logger that keeps what TensorRT says instead of printing it."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg.strip())
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(msg.strip())

        def text(self) -> str:
            return " | ".join(dict.fromkeys(self.errors)) or "no reason given"

    return Log()


def make(kind: Any, log: Any) -> Any:
    """Make a Builder, Runtime or parser; where TensorRT gives none, the bindings raise TypeError."""
    try:
        return kind(log)
    except TypeError as error:
        raise EnvironmentLacks(
            f"a TensorRT {kind.__name__}, which needs a working GPU and driver",
            got=log.text() if log.errors else f"{error}",
            remedy="check nvidia-smi (on a Jetson: tegrastats), and that driver and TensorRT fit together",
        ) from error


def given(value: Any, log: Any) -> Any:
    """Return what TensorRT returned, unless that is None or False: its failure must not travel."""
    if value is None or value is False:
        raise BarEdgeError("TensorRT to answer", got=log.text(), consequence="nothing was built or run")
    return value


def numbers(version: str) -> tuple[int, ...]:
    """Return (10, 3, 0) for 10.3.0 and 10.3.0.post1."""
    return tuple(int(n) for n in re.match(r"[\d.]*\d", version).group().split("."))  # type: ignore[union-attr]
