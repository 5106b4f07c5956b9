"""The API of the real TensorRT bindings, read from their wheels: writes tests/targets/tensorrt_surface.json.

    python tests/targets/tensorrt_surface.py

The bindings are small wheels without TensorRT itself. They load on any x86-64 Linux once the dozen C functions that
they import exist, so a library of stubs that return nothing is compiled, and the classes are listed as Python sees
them. Nothing runs; no call into TensorRT is made.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

#: JetPack 6's version, the last 10.x, the first and the last 11.x at the time of writing
WHEELS = {
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.16": "tensorrt-cu13-bindings==10.16.1.11",
    "11.0": "tensorrt-cu13-bindings==11.0.0.114",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
}
SURFACE = Path(__file__).with_name("tensorrt_surface.json")
CLASSES = [
    "Builder",
    "EngineInspector",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProfiler",
    "ITensor",
    "ITimingCache",
    "Logger",
    "OnnxParser",
    "ParserError",
    "Runtime",
]
ENUMS = [
    "BuilderFlag",
    "DataType",
    "DeviceType",
    "ErrorCode",
    "HardwareCompatibilityLevel",
    "LayerInformationFormat",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParserFlag",
    "ProfilingVerbosity",
    "TensorIOMode",
    "TensorLocation",
]
UNUSED_ADDS = "INetworkDefinition"
#: how the versions of pybind11 spell the same types
SPELLINGS = {
    "tensorrt_bindings.tensorrt.": "",
    "typing.SupportsInt": "int",
    "typing.SupportsFloat": "float",
    "typing_extensions.Buffer": "buffer",
    "collections.abc.Sequence": "list",
    "List[": "list[",
}
STUBS = """
void* createInferBuilder_INTERNAL() { return 0; }
void* createInferRefitter_INTERNAL() { return 0; }
void* createInferRuntime_INTERNAL() { return 0; }
void* createNvOnnxParser_INTERNAL() { return 0; }
void* createNvOnnxParserRefitter_INTERNAL() { return 0; }
void* getBuilderPluginRegistry() { return 0; }
void* getPluginRegistry() { return 0; }
int getNvOnnxParserVersion() { return 0; }
int initLibNvInferPlugins() { return 1; }
"""


def download(requirement: str, folder: Path) -> Path:
    """Download one bindings wheel for Python 3.11 on x86-64 and unpack it; raises CalledProcessError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version=3.11", "--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_17_x86_64"]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def add_stubs(folder: Path, major: str, compiler: str = "cc") -> None:
    """Compile the libraries that the bindings ask for."""
    source = folder / "stubs.c"
    source.write_text(STUBS)
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        library = folder / f"lib{name}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(source)]
        subprocess.run(command, check=True, capture_output=True)


def read_surface(folder: Path, major: str) -> dict[str, Any]:
    """List the bindings in `folder` in a process of its own."""
    add_stubs(folder, major)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, __file__, "--list"], env=environment, check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def list_bindings() -> dict[str, Any]:
    """Return what the importable bindings hold: module names, enum members, and each class's members."""
    import tensorrt_bindings as bindings

    return {
        "version": bindings.__version__,
        "names": sorted(name for name in dir(bindings) if not name.startswith("_")),
        "enums": {
            name: {member: int(value) for member, value in getattr(bindings, name).__members__.items()}
            for name in ENUMS
        },
        "severity": {member: int(value) for member, value in bindings.ILogger.Severity.__members__.items()},
        "classes": {name: members(getattr(bindings, name)) for name in CLASSES},
    }


def members(cls: type) -> dict[str, str]:
    """Return name -> "property", "settable property", or a method's signatures without self."""
    found = {}
    for name in dir(cls):
        value = getattr(cls, name)
        if isinstance(value, property):
            found[name] = "property" if value.fset is None else "settable property"
        elif callable(value) and not isinstance(value, type) and (name == "__init__" or not name.startswith("_")):
            found[name] = signatures(value.__doc__ or "", name)
    # the hundred ways to add a layer by hand: networks come from the parser
    return {name: kind for name, kind in found.items() if not name.startswith("add_") or cls.__name__ != UNUSED_ADDS}


def signatures(doc: str, name: str) -> str:
    """Return `(flags: int = 0) -> INetworkDefinition` from a pybind11 docstring; overloads with | between them."""
    found = re.findall(rf"^(?:\d+\. )?{name}\(self: [\w.:]+(?:, )?(.*)$", doc, re.MULTILINE)
    text = " | ".join(f"({arguments}" for arguments in found)
    for old, new in SPELLINGS.items():
        text = text.replace(old, new)
    return text


def main() -> None:
    """Write the surface of every wheel."""
    surfaces = {}
    for version, requirement in WHEELS.items():
        with tempfile.TemporaryDirectory() as folder:
            surfaces[version] = read_surface(download(requirement, Path(folder)), version.split(".")[0])
    SURFACE.parent.mkdir(exist_ok=True)
    SURFACE.write_text(dump(surfaces))


def dump(surfaces: dict[str, Any]) -> str:
    """Return JSON with one class or enum per line."""
    versions = []
    for version, surface in surfaces.items():
        lines = [f'  "version": {json.dumps(surface["version"])}', f'  "names": {json.dumps(surface["names"])}']
        lines.append(f'  "severity": {json.dumps(surface["severity"])}')
        for group in ("enums", "classes"):
            entries = [f"   {json.dumps(name)}: {json.dumps(value)}" for name, value in surface[group].items()]
            lines.append(f'  "{group}": {{\n' + ",\n".join(entries) + "\n  }")
        versions.append(f' "{version}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(versions) + "\n}\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        json.dump(list_bindings(), sys.stdout)
    else:
        main()
