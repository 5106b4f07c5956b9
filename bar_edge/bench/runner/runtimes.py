"""All runtimes: one line for each module that has some."""

from __future__ import annotations

import importlib

from .records import Runtime

MODULES = (
    "on_onnxruntime",
    "on_openvino",
    "on_tensorrt",
)
RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for module in MODULES
    for runtime in importlib.import_module(f".{module}", __package__).RUNTIMES
}
