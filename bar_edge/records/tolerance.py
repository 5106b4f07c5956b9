"""How far two computations of the same may lie apart and still be equal.

All of them stand here but LEAST_TOLERANCE of `bar_edge/bench/runner/inputs.py`, which travels to devices.
"""

#: a module and its trace, and an image alone and among others: max|a-b| / max|a|, in float32
TRACE_TOLERANCE = 1e-3
#: masked against sliced on real images: max|a-b| / max|a|, in float64
PARITY_LIMIT = 1e-9
#: precision -> the largest max|a-b| / max|a| that counts as equal: between torch in float32 and the file, or for int8
#: between what the file means, computed in float, and the same file in a runtime (measured:
#: files that do not overflow differ by up to 0.024, docs/int8.md)
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2, "int8": 4e-2}
#: percentage points that are no drop: the last bits of shares of images
DROP_TOLERANCE = 1e-7
