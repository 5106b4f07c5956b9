"""The recorded API of TensorRT's bindings is that of the real wheels; what our module names is in all of them."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.targets.tensorrt_surface import SURFACE, WHEELS, download, read_surface

RECORDED = json.loads(SURFACE.read_text())
FOLDER = Path(__file__).parents[2] / "bar_edge" / "targets" / "tensorrt"
MODULES = [FOLDER / name for name in ("bindings.py", "build.py", "engine.py")]


def module_names() -> set[str]:
    """Every `trt.A.B` in our modules, as "A.B"."""
    found = set()
    for node in (node for module in MODULES for node in ast.walk(ast.parse(module.read_text()))):
        chain = []
        while isinstance(node, ast.Attribute):
            chain.append(node.attr)
            node = node.value
        if chain and isinstance(node, ast.Name) and node.id == "trt":
            found.add(".".join(reversed(chain)))
    return found


@pytest.mark.parametrize("version", WHEELS)
def test_names_that_our_module_uses_exist_in_every_version(version: str) -> None:
    surface = RECORDED[version]
    names = module_names()
    assert {"Builder", "OnnxParser", "Runtime", "BuilderFlag.TF32"} <= names
    for name in names - {"__version__"}:
        first, _, rest = name.partition(".")
        assert first in surface["names"], f"tensorrt {version} has no {first}"
        if rest:
            members = (
                {"Severity", *(f"Severity.{level}" for level in surface["severity"])} if first == "ILogger" else set()
            )
            members |= {**surface["enums"], **surface["classes"]}[first].keys()
            assert rest in members, f"tensorrt {version} has no {name}"


#: what our module does with the bindings before it needs a GPU
FIRST_STEPS = """
import sys
import tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
from bar_edge.errors import EnvironmentLacks
from bar_edge.targets.tensorrt.bindings import make, new_log, import_tensorrt
import numpy as np
trt = import_tensorrt()
log = new_log(trt)
for level in ("ERROR", "INTERNAL_ERROR", "WARNING", "INFO"):
    log.log(getattr(trt.ILogger.Severity, level), level)
assert log.errors == ["ERROR", "INTERNAL_ERROR"] and log.warnings == ["WARNING"], (log.errors, log.warnings)
assert 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) in (1, 2)
types = [np.dtype(trt.nptype(kind)).name for kind in (trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.UINT8)]
assert types == ["float32", "float16", "uint8"]
for kind in (trt.Builder, trt.Runtime):
    try:
        make(kind, log)
    except EnvironmentLacks as error:
        assert kind.__name__ in str(error)
    else:
        raise AssertionError("made without a GPU")
print("done")
"""


@pytest.mark.network
@pytest.mark.parametrize("version", WHEELS)
def test_the_real_bindings(version: str, tmp_path: Path, repository: Path) -> None:
    """Their API is the recorded one, and our first steps run on them."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: the bindings need stubs to load")
    try:
        folder = download(WHEELS[version], tmp_path)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"{WHEELS[version]} cannot be downloaded: {type(error).__name__}")
    assert read_surface(folder, version.split(".")[0]) == RECORDED[version]
    environment = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{folder}:{repository}"}
    command = [sys.executable, "-c", FIRST_STEPS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


def test_removed_flags_are_really_gone() -> None:
    """The record tells versions apart: what 11 removed is there in 10 only."""
    flags = {version: RECORDED[version]["enums"]["BuilderFlag"] for version in WHEELS}
    assert all({"FP16", "INT8", "BF16"} <= flags[v].keys() for v in ("10.3", "10.16"))
    assert not any({"FP16", "INT8", "BF16"} & flags[v].keys() for v in ("11.0", "11.4"))
