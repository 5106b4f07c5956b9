"""The recorded API of TensorRT's bindings is that of the real wheels; what our module names is in all of them."""

import ast
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tensorrt_surface import SURFACE, WHEELS, download, read_surface

RECORDED = json.loads(SURFACE.read_text())
MODULE = Path(__file__).parent.parent / "bar_edge" / "export" / "tensorrt.py"


def module_names() -> set[str]:
    """Every `trt.A.B` in our module, as "A.B"."""
    found = set()
    for node in ast.walk(ast.parse(MODULE.read_text())):
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


@pytest.mark.network
@pytest.mark.parametrize("version", WHEELS)
def test_the_recorded_surface_is_that_of_the_real_wheel(version: str, tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: the bindings need stubs to load")
    try:
        folder = download(WHEELS[version], tmp_path)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"{WHEELS[version]} cannot be downloaded: {type(error).__name__}")
    assert read_surface(folder, version.split(".")[0]) == RECORDED[version]


def test_removed_flags_are_really_gone() -> None:
    """The record tells versions apart: what 11 removed is there in 10 only."""
    flags = {version: RECORDED[version]["enums"]["BuilderFlag"] for version in WHEELS}
    assert all({"FP16", "INT8", "BF16"} <= flags[v].keys() for v in ("10.3", "10.16"))
    assert not any({"FP16", "INT8", "BF16"} & flags[v].keys() for v in ("11.0", "11.4"))
