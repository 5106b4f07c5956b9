"""Our modules in one file for a device that has no bar-edge: the runner, and what builds a TensorRT engine."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

MODULES = (
    "errors.py",
    "files.py",
    "targets/tensorrt/cuda.py",
    "targets/tensorrt/bindings.py",
    "targets/tensorrt/options.py",
    "targets/tensorrt/engine.py",
    "targets/tensorrt/build.py",
    "targets/tensorrt/device_build.py",
)
_PACKAGES = ("", "targets/", "targets/tensorrt/")
_MAIN = "import sys\n\nfrom bar_edge.targets.tensorrt.device_build import main\n\nsys.exit(main())\n"


_RUNNER = Path(__file__).resolve().with_name("runner")


def packed() -> bytes:
    """Return build.pyz: our own modules as they are, to be run by Python 3.10 or imported from."""
    package = Path(__file__).resolve().parents[1]
    modules = {
        **{f"bar_edge/{folder}__init__.py": "" for folder in _PACKAGES},
        **{f"bar_edge/{name}": (package / name).read_text(encoding="utf-8") for name in MODULES},
    }
    return _archive(modules, _MAIN)


def packed_runner() -> bytes:
    """Return the runner as an archive that Python 3.8 runs: what measures, here and on a device."""
    modules = {f"runner/{path.name}": path.read_text(encoding="utf-8") for path in sorted(_RUNNER.glob("*.py"))}
    return _archive(modules, "from runner.main import main\n\nmain()\n")


def _archive(modules: dict[str, str], main: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in {**modules, "__main__.py": main}.items():
            # a fixed date: the same modules give the same bytes
            archive.writestr(zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)
    return stream.getvalue()
