"""A stand-in for trtexec: takes the documented options and no others, writes an engine file.

Options: `trtexec --help` of 10.5 (10.3's own list could not be had; the migration guides name no difference between
them in what is used here); 11 lacks what NVIDIA's guide "Migrating trtexec Usage from TensorRT 10.x to 11.x" removes.
FAKE_TRTEXEC: a version such as 100300; FAKE_FAIL: the error that it ends with.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ANY, FLAG = r".+", None
SHAPES = r"\w+:\d+(x\d+)*(,\w+:\d+(x\d+)*)*"
OPTIONS_10 = {
    "onnx": ANY,
    "minShapes": SHAPES,
    "optShapes": SHAPES,
    "maxShapes": SHAPES,
    "memPoolSize": r"(workspace|dlaSRAM|dlaLocalDRAM|dlaGlobalDRAM|tacticSharedMem):[\d.]+[BKMG]?",
    "profilingVerbosity": "layer_names_only|detailed|none",
    "versionCompatible": FLAG,
    "noTF32": FLAG,
    "fp16": FLAG,
    "bf16": FLAG,
    "int8": FLAG,
    "best": FLAG,
    "stronglyTyped": FLAG,
    "allowGPUFallback": FLAG,
    "saveEngine": ANY,
    "loadEngine": ANY,
    "timingCacheFile": ANY,
    "builderOptimizationLevel": "[0-5]",
    "hardwareCompatibilityLevel": r"none|ampere\+",
    "skipInference": FLAG,
    "useDLACore": r"\d",
    "verbose": FLAG,
    "help": FLAG,
}
REMOVED_IN_11 = {"fp16", "bf16", "int8", "best"}
OPTIONS = {
    "10": OPTIONS_10,
    "11": {name: kind for name, kind in OPTIONS_10.items() if name not in REMOVED_IN_11}
    | {"hardwareCompatibilityLevel": r"none|ampere\+|sameComputeCapability"},
}


def main(arguments: list[str]) -> int:
    """Check every argument and act on the few that matter."""
    version = os.environ.get("FAKE_TRTEXEC", "100300")
    banner = f"TensorRT.trtexec [TensorRT v{version}] [b1] # trtexec {' '.join(arguments)}"
    print(f"&&&& RUNNING {banner}")
    options, given = OPTIONS.get(version[:2], {}), {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        known = name in options and argument.startswith("--")
        if (
            not known
            or bool(equals) == (options[name] is FLAG)
            or (equals and not re.fullmatch(options[name] or "", value))
        ):
            print(f"[E] Unknown option: {argument}\n&&&& FAILED {banner}")
            return 1
        given[name] = value
    if "help" in given:
        return 0
    problem = os.environ.get("FAKE_FAIL", "") or _contradiction(given, version)
    if problem:
        print(f"[01/01/2026-00:00:00] [E] [TRT] {problem}\n&&&& FAILED {banner}")
        return 1
    Path(given["saveEngine"]).write_bytes(b"engine of " + Path(given["onnx"]).read_bytes()[:8])
    Path(given["timingCacheFile"]).write_bytes(b"cache")
    Path("arguments.txt").write_text("\n".join(arguments))
    print(f"&&&& PASSED {banner}")
    return 0


def _contradiction(given: dict[str, str], version: str) -> str:
    if version.startswith("10") and "stronglyTyped" not in given:
        return "10.x builds a weakly typed network without --stronglyTyped"
    if len({"minShapes", "optShapes", "maxShapes"} & set(given)) in (1, 2):
        return "All three of min, opt and max shapes must be supplied"
    if not {"onnx", "saveEngine", "skipInference"} <= set(given):
        return "no ONNX file, no engine file, or a measurement nobody asked for"
    if "allowGPUFallback" in given and "useDLACore" not in given:
        return "GPU fallback without DLA"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
