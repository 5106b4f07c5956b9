"""A folder that builds, checks and measures a TensorRT engine on the device, from a machine without TensorRT."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

from bar_edge.bench.packed import packed, packed_runner
from bar_edge.errors import InputError
from bar_edge.files import file_hash, write_json
from bar_edge.targets.artifact import parity_entry, replacing
from bar_edge.targets.onnx.precision import to_half
from bar_edge.targets.tensorrt.check import require_accepted
from bar_edge.targets.tensorrt.device_build import BUILDER, RUNNER
from bar_edge.targets.tensorrt.operators import VERSIONS
from bar_edge.targets.tensorrt.options import EngineOptions
from bar_edge.targets.verify import MANIFEST, MODEL, SAMPLES, read_manifest, sample_error

#: bf16 files need opset 22, which 10.3 does not read
READERS = {"fp32": VERSIONS, "fp16": VERSIONS, "bf16": ("10.16", "11"), "int8": VERSIONS}
SCRIPT, README = "build.sh", "README.md"


def write_bundle(
    artifact: Path,
    folder: Path,
    *,
    precision: str = "fp16",
    options: EngineOptions | None = None,
) -> dict[str, Any]:
    """Make a bundle from an artifact and return its manifest, whose `parity` says whether the file still computes it.

    artifact: a folder of `write_artifact` in fp32 (in int8 for int8), with as many samples as the device shall
    compare. precision: fp32, fp16, bf16 or int8; the model file is converted. The folder is replaced whole, and only if
    the model file computes the expected outputs. Raises InputError if TensorRT would reject it.
    """
    options = options or EngineOptions()
    source = read_manifest(artifact)
    needed = "int8" if precision == "int8" else "fp32"
    if precision not in READERS or source["precision"] != needed:
        raise InputError(
            f"an artifact in {needed} for a bundle in one of {', '.join(READERS)}",
            got=f"{source['precision']}, for {precision}",
            consequence="nothing was written",
        )
    with replacing(folder) as temporary:
        if precision in ("fp16", "bf16"):
            to_half(artifact / MODEL, temporary / MODEL, "fp16" if precision == "fp16" else "bf16")
        else:
            shutil.copyfile(artifact / MODEL, temporary / MODEL)
        slow = require_accepted(temporary / MODEL, READERS[precision])
        shutil.copyfile(artifact / SAMPLES, temporary / SAMPLES)
        (temporary / BUILDER).write_bytes(packed())
        (temporary / SCRIPT).write_text(build_script(source["inputs"], options), encoding="utf-8")
        (temporary / SCRIPT).chmod(0o755)
        (temporary / RUNNER).write_bytes(packed_runner())
        error, number = sample_error(temporary, source, precision)
        files = [MODEL, SAMPLES, BUILDER, SCRIPT, RUNNER]
        manifest = {
            **source,
            "target": "trt-bundle",
            "precision": precision,
            "files": {name: {"sha256": file_hash(temporary / name)} for name in files},
            "engine_options": {**dataclasses.asdict(options), "batch": list(options.batch)},
            "tensorrt": {"accepted_by": list(READERS[precision]), "slow": [str(finding) for finding in slow]},
            "parity": parity_entry(error, precision, number),
        }
        write_json(temporary / MANIFEST, manifest)
        (temporary / README).write_text(_readme(manifest), encoding="utf-8")
        if not manifest["parity"]["within"]:
            shutil.rmtree(temporary)
    return manifest


def build_script(inputs: list[dict[str, Any]], options: EngineOptions) -> str:
    """Return the shell script that builds with TensorRT's Python where it is, else with trtexec of 10.x or 11.x."""
    unsafe = [value["name"] for value in inputs if not re.fullmatch(r"[A-Za-z_][\w.]*", value["name"])]
    if unsafe:
        raise InputError("input names of letters, digits, _ and .", got=", ".join(unsafe))

    def shapes(batch: int) -> str:
        return ",".join(f"{v['name']}:{'x'.join(map(str, (batch, *v['shape'][1:])))}" for v in inputs)

    low, best, high = options.batch
    arguments = ["--onnx=model.onnx", "--skipInference", "--profilingVerbosity=detailed"]
    if any(not isinstance(value["shape"][0], int) for value in inputs):
        arguments += [f"--minShapes={shapes(low)}", f"--optShapes={shapes(best)}", f"--maxShapes={shapes(high)}"]
    arguments += [f"--builderOptimizationLevel={options.optimization_level}", "--timingCacheFile=trtexec.cache"]
    arguments += [f"--memPoolSize=workspace:{options.workspace_mib}"] if options.workspace_mib else []
    arguments += [] if options.tf32 else ["--noTF32"]
    arguments += ["--versionCompatible"] if options.version_compatible else []
    spelled = {"ampere+": "ampere+", "same-compute-capability": "sameComputeCapability"}
    if options.hardware in spelled:
        arguments.append(f"--hardwareCompatibilityLevel={spelled[options.hardware]}")
    if options.dla_core >= 0:
        arguments += [f"--useDLACore={options.dla_core}", "--allowGPUFallback"]
    return _SCRIPT.replace("@ARGUMENTS@", " \\\n    ".join(arguments))


# ------------------------------------------------------------------------------------------ inside


_SCRIPT = """#!/bin/sh
# Builds model.engine from model.onnx for the GPU of this machine: with TensorRT's Python bindings where they are
# (and compares the outputs), else with trtexec. PYTHON and TRTEXEC name other programs; TRTEXEC forces trtexec.
set -eu
cd "$(dirname "$0")"

needs='import sys, numpy, tensorrt; sys.exit(sys.version_info < (3, 10))'
if [ -z "${TRTEXEC:-}" ] && "${PYTHON:-python3}" -c "$needs" >/dev/null 2>&1; then
    exec "${PYTHON:-python3}" build.pyz
fi

trtexec=${TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}
if ! [ -x "$trtexec" ]; then
    echo "required: TensorRT's Python bindings (Python 3.10, numpy), or trtexec" >&2
    echo "got: neither" >&2
    echo "remedy: apt install python3-libnvinfer python3-numpy (JetPack), or TRTEXEC=/path/to/trtexec" >&2
    exit 3
fi
# its banner says v100300 for 10.3.0
version=$("$trtexec" --help 2>&1 | sed -n 's/.*\\[TensorRT v\\([0-9.]*\\)\\].*/\\1/p' | head -n 1)
case $version in
10.* | 10????) typed=--stronglyTyped ;; # precision is what model.onnx says, no other
11.* | 11????) typed= ;;                # always so
*)
    echo "required: trtexec of TensorRT 10 or 11" >&2
    echo "got: version '$version'" >&2
    exit 3
    ;;
esac
rm -f model.engine model.engine.json
if ! "$trtexec" ${typed:+"$typed"} --saveEngine=model.engine.part \\
    @ARGUMENTS@ \\
    >build.log 2>&1; then
    rm -f model.engine.part
    grep -F '[E]' build.log >&2 || tail -n 20 build.log >&2
    echo "no engine was built; the whole log is in build.log" >&2
    exit 2
fi
mv model.engine.part model.engine
echo "model.engine built by trtexec $version. Its outputs were NOT compared: that needs TensorRT's Python bindings." >&2
"""


def _readme(manifest: dict[str, Any]) -> str:
    shapes = ", ".join(f"{v['name']} {v['dtype']} {v['shape']}" for v in manifest["inputs"])
    parity = manifest["parity"]
    return f"""# A network for TensorRT, to be built on the device
model.onnx is in {manifest["precision"]} (the tensors say so: a strongly typed network); inputs: {shapes}.
`sh build.sh` builds model.engine for the GPU that it runs on, with TensorRT 10 or 11: JetPack 6 and 7, desktop GPUs.
With TensorRT's Python (Python 3.10, numpy) run.pyz then compares the outputs on all samples and measures;
an engine that differs by more than {parity["tolerance"]:g} of the largest output is removed, and the exit status is 1.
With trtexec alone the engine is built and not compared. Exit status 2: TensorRT refused; 3: something is missing.
samples.safetensors holds inputs and expected outputs (float32); manifest.json the hashes, names, shapes, options.
run.pyz is bar-edge's measuring protocol: a JSON request on stdin, a JSON answer on stdout.
An engine belongs to one TensorRT version and one GPU: on another device run build.sh there.
Engines are executable code: load none but those you built from the model.onnx whose hash manifest.json names.
"""
