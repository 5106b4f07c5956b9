"""How an engine is built."""

from __future__ import annotations

import dataclasses

from bar_edge.errors import InputError

HARDWARE = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is built."""

    #: smallest, best and largest batch of the engine; what it is fastest at is the middle one
    batch: tuple[int, int, int] = (1, 1, 1)
    #: most scratch memory that a layer may use; 0 sets no limit (TensorRT: all memory of the GPU)
    workspace_mib: int = 0
    #: 0 to 5: how long TensorRT searches
    optimization_level: int = 3
    #: fp32 convolutions may round their inputs to 10 bits of mantissa (faster, error about 1e-3)
    tf32: bool = False
    #: folder of timing caches, one file per TensorRT version and GPU; empty keeps none
    timing_caches: str = ""
    #: the engine loads in newer TensorRT versions too, and may be slower
    version_compatible: bool = False
    #: none: this GPU only; ampere+; same-compute-capability (from 10.9)
    hardware: str = "none"
    #: the DLA core to build for, what it cannot run goes to the GPU; -1 builds for the GPU
    dla_core: int = -1

    def __post_init__(self) -> None:
        low, best, high = self.batch
        if not 1 <= low <= best <= high:
            raise _bad_option("a batch range 1 <= smallest <= best <= largest", f"{self.batch}")
        if self.hardware not in HARDWARE:
            raise _bad_option(f"hardware compatibility: {', '.join(HARDWARE)}", self.hardware)
        if not 0 <= self.optimization_level <= 5 or self.workspace_mib < 0:
            got = f"level {self.optimization_level}, workspace {self.workspace_mib} MiB"
            raise _bad_option("an optimisation level from 0 to 5 and a workspace of 0 or more MiB", got)
        if self.dla_core >= 0 and low != high:
            raise _bad_option("one batch size for DLA, which has no dynamic shapes", f"{self.batch}")


def _bad_option(required: str, got: str) -> InputError:
    return InputError(required, got=got, consequence="no engine was built")
