"""What the runner says while it works, and what it lacks."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import platform
import re
import signal
import sys
from typing import Any

from .records import Problem

#: stderr's last line of this kind tells what the process was at, should a native library die of it
DOING = "doing: "


def package(name: str, install: str = "") -> Any:
    """Import a package that the device must have."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        python = f"Python {platform.python_version()} on {platform.machine()}"
        known = _is_installed(name)
        required = f"{name}, built for {python}" if known else f"the package {name} for {python}"
        raise Problem("EnvironmentLacks", required, str(error)[:300], f"pip install {install or name}") from error


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def refused(name: str, runtime: str, error: Exception) -> Problem:
    """Return what is answered of a file that a runtime does not load."""
    return Problem("InputError", f"an ONNX file that {runtime} loads", f"{name}: {library_says(error)}")


def library_says(error: Exception) -> str:
    """Return what a native library says, without the lines of its sources: the operator's name comes behind them."""
    text = re.sub(r"Exception from \S+:\d+:|Check '[^']*' failed at \S+|FrontEnd API failed with \w+:", "", str(error))
    text = " ".join(text.split())
    return text if len(text) <= 400 else f"{text[:150]} ... {text[-240:]}"


def end_with_parent() -> None:
    """Let Linux end this process when the one that waits for it is killed: nobody else ends what hangs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def doing(what: str, *files: dict[str, Any]) -> None:
    """Note for whoever waits what a native library may die of, or hang in."""
    os.write(2, f"\n{DOING}{what} {', '.join(file['name'] for file in files)}\n".encode("utf-8", "replace"))
