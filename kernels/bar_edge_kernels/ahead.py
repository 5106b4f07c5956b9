"""Kernels compiled ahead of time, without a GPU: PTX, and what each asks of a multiprocessor.

python -m bar_edge_kernels.ahead          a table for every architecture, type and default cut
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bar_edge_kernels.convolution import DEFAULTS, Blocks, mixed_convolution_kernel
from bar_edge_kernels.stage import stage_kernel
from bar_edge_kernels.tile import ELEMENTS

#: compute capability -> a GPU that has it
ARCHITECTURES = {80: "A100", 86: "RTX 30", 87: "Orin", 89: "RTX 40", 90: "H100"}
_POINTERS = {"out": None, "x": None, "weight": None, "bias": "fp32", "affine": "fp32", "index_in": "i32"}
_STAGE_POINTERS = {"stream": None, "scratch": None, "weights": None, "vectors": "fp32", "indices": "i32"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """One kernel for one architecture: registers of a thread, bytes that spill, bytes of shared memory of a block."""

    kernel: str
    architecture: int
    element: str
    blocks: Blocks
    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str


def compile_convolution(
    architecture: int, element: str, blocks: Blocks, *, kernel: int = 3, stride: int = 1, runs: bool = False
) -> Compiled:
    """Compile the kernel of one convolution with bias, affine map and both ReLUs; runs: the path of contiguous runs."""
    flags = {"HAS_BIAS": True, "HAS_AFFINE": True, "RELU_IN": True, "RELU_OUT": True, "ACCUMULATE": True}
    constants = flags | {"KERNEL": kernel, "STRIDE": stride, "PADDING": kernel // 2, "RUN_IN": runs, "RUN_OUT": runs}
    pointers = _POINTERS | {"index_out": "i32"}
    return _compile("convolution", mixed_convolution_kernel, pointers, constants, architecture, element, blocks)


def compile_stage(architecture: int, element: str, blocks: Blocks) -> Compiled:
    """Compile the kernel of a whole stage."""
    pointers = _STAGE_POINTERS | {"steps": "i32"}
    return _compile("stage", stage_kernel, pointers, {}, architecture, element, blocks)


def _compile(
    name: str,
    function: Any,
    pointers: dict[str, str | None],
    constants: dict[str, Any],
    architecture: int,
    element: str,
    blocks: Blocks,
) -> Compiled:
    sizes = {"BLOCK_PIXELS": blocks.pixels, "BLOCK_IN": blocks.channels_in, "BLOCK_OUT": blocks.channels_out}
    fixed = constants | sizes
    signature = {
        argument: "constexpr" if argument in fixed else _type(argument, pointers, element)
        for argument in function.arg_names
    }
    places = {argument: i for i, argument in enumerate(function.arg_names)}
    # torch's allocations lie at multiples of 16 bytes
    aligned = {(places[argument],): [["tt.divisibility", 16]] for argument in pointers}
    source = ASTSource(function, signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spills = _resources(compiled.asm["ptx"], architecture)
    return Compiled(
        kernel=name,
        architecture=architecture,
        element=element,
        blocks=blocks,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
    )


def _type(argument: str, pointers: dict[str, str | None], element: str) -> str:
    """Return Triton's type of an argument: a pointer to elements or to what `pointers` says, else a number."""
    return f"*{pointers[argument] or element}" if argument in pointers else "i32"


def _resources(ptx: str, architecture: int) -> tuple[int, int]:
    """Return registers and spilled bytes of a kernel, as ptxas (which Triton ships) says."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        name = f"sm_{architecture}" + ("a" if architecture == 90 else "")
        command = [str(tool), "-v", f"--gpu-name={name}", str(source), "-o", str(target)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    if used is None or spilled is None:
        raise RuntimeError(f"ptxas tells no registers: {said}")
    return int(used[1]), int(spilled[1])


def every_default() -> list[Compiled]:
    """Compile every kernel for every architecture, type and default cut."""
    found = []
    for architecture in ARCHITECTURES:
        for element in ELEMENTS:
            for blocks in DEFAULTS:
                found.append(compile_convolution(architecture, element, blocks))
            found.append(compile_stage(architecture, element, DEFAULTS[0]))
    return found


def main() -> int:
    """Print the table, or with --json the records without their PTX; exit status 1 if anything spills."""
    found = every_default()
    if "--json" in sys.argv:
        rows = [dataclasses.asdict(one) for one in found]
        print(json.dumps([{key: value for key, value in row.items() if key != "ptx"} for row in rows], indent=1))
    else:
        print("| kernel | architecture | type | pixels x in x out | registers | spilled bytes | shared bytes |")
        print("| --- | --- | --- | --- | ---: | ---: | ---: |")
        for one in found:
            b = one.blocks
            cut, device = f"{b.pixels} x {b.channels_in} x {b.channels_out}", ARCHITECTURES[one.architecture]
            print(
                f"| {one.kernel} | sm_{one.architecture} ({device}) | {one.element} | {cut} | {one.registers} "
                f"| {one.spill_bytes} | {one.shared_bytes:,} |"
            )
    return int(any(one.spill_bytes for one in found))


if __name__ == "__main__":
    sys.exit(main())
