"""All convolutions of a residual stage in one kernel: one program per image, no launch between two layers.

For networks so narrow that launches and memory, not arithmetic, take their time (kernels/README.md says where that
ends). An image's stream, and what its blocks hold between their convolutions, stay in one multiprocessor's caches.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bar_edge_kernels.convolution import DEFAULTS, Blocks
from bar_edge_kernels.operator import MixedConvolution
from bar_edge_kernels.tile import convolved, store

#: numbers that describe a step: widths, offsets, kernel size, and what is read, written and done
FIELDS = 16


@triton.jit
def stage_kernel(
    stream,
    scratch,
    weights,
    vectors,
    indices,
    steps,
    n_steps,
    images,
    height,
    width,
    stream_channels,
    scratch_channels,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Run `n_steps` convolutions of stride 1 on one image after another, between the stream and two scratch tensors.

    stream: (N, H, W, stream_channels), in place; scratch: (2, N, H, W, scratch_channels); weights: (k, k, n_in, n_out)
    of all steps behind each other; vectors: their biases and affine maps in float32; indices: their channels; steps:
    (n_steps, 16) int32, see `_described`.
    """
    pixels = height * width
    for image in range(tl.program_id(0), images, tl.num_programs(0)):
        for step in range(n_steps):
            row = steps + step * 16
            n_in = tl.load(row)
            n_out = tl.load(row + 1)
            kernel = tl.load(row + 2)
            source = tl.load(row + 3)
            target = tl.load(row + 4)
            other = scratch + (target - 1) * images * pixels * scratch_channels
            read = scratch + (source - 1) * images * pixels * scratch_channels
            x_channels = tl.where(source == 0, stream_channels, scratch_channels)
            out_channels = tl.where(target == 0, stream_channels, scratch_channels)
            for start in range(0, pixels, BLOCK_PIXELS):
                pixel = start + tl.arange(0, BLOCK_PIXELS)
                inside = pixel < pixels
                for first in range(0, n_out, BLOCK_OUT):
                    channel = first + tl.arange(0, BLOCK_OUT)
                    total = convolved(
                        tl.where(source == 0, stream, read),
                        weights + tl.load(row + 5),
                        vectors + tl.load(row + 6),
                        indices + tl.load(row + 7),
                        image * pixels + pixel,
                        inside,
                        channel,
                        height,
                        width,
                        height,
                        width,
                        x_channels,
                        n_in,
                        n_out,
                        0,
                        kernel,
                        1,
                        kernel // 2,
                        tl.load(row + 8),
                        tl.load(row + 9),
                        False,
                        BLOCK_PIXELS,
                        BLOCK_IN,
                        BLOCK_OUT,
                    )
                    store(
                        tl.where(target == 0, stream, other),
                        vectors + tl.load(row + 10),
                        indices + tl.load(row + 11),
                        total,
                        image * pixels + pixel,
                        inside,
                        channel,
                        out_channels,
                        n_out,
                        0,
                        tl.load(row + 12),
                        tl.load(row + 13),
                        tl.load(row + 14),
                        False,
                    )
            tl.debug_barrier()  # what this step wrote is read by other threads in the next


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One convolution of a stage: what it does, and between which tensors (0: the stream, 1 and 2: scratch)."""

    convolution: MixedConvolution
    source: int
    target: int


class Stage:
    """The convolutions of a stage, packed for the kernel.

    steps: in the order in which they run; of stride 1, none may read the tensor that it writes. Raises ValueError
    for one that does.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        for step in steps:
            c = step.convolution
            if step.source == step.target:
                raise ValueError("a step reads the tensor that it writes: other programs would see half of it")
            if c.how.stride != 1 or c.how.padding != c.weight.shape[0] // 2:
                raise ValueError("a step of a stage keeps height and width: stride 1, padding k // 2")
        if not steps:
            raise ValueError("a stage has at least one step")
        inner = [s.convolution.index_out for s in steps if s.target] + [
            s.convolution.index_in for s in steps if s.source
        ]
        self.scratch_channels = max([1, *(int(index.max()) + 1 for index in inner if len(index))])
        device = steps[0].convolution.weight.device
        weights, vectors, indices = list[Tensor](), list[Tensor](), list[Tensor]()
        rows = [_described(step, weights, vectors, indices) for step in steps]
        self.steps = torch.tensor(rows, dtype=torch.int32, device=device)
        self.weights = torch.cat(weights)
        self.vectors = torch.cat(vectors) if vectors else torch.zeros(1, device=device)
        self.indices = torch.cat(indices)

    def __call__(self, stream: Tensor, *, blocks: Blocks | None = None, programs: int | None = None) -> None:
        """Run the stage in place on (N, C, H, W) that lies as NHWC; programs: one per image by default."""
        number, channels, height, width = stream.shape
        b = blocks or DEFAULTS[0]
        scratch = stream.new_empty(2, number, height, width, self.scratch_channels)
        stage_kernel[(programs or number,)](
            stream,
            scratch,
            self.weights,
            self.vectors,
            self.indices,
            self.steps,
            len(self.steps),
            number,
            height,
            width,
            channels,
            self.scratch_channels,
            BLOCK_PIXELS=b.pixels,
            BLOCK_IN=b.channels_in,
            BLOCK_OUT=b.channels_out,
            num_warps=b.warps,
            num_stages=b.stages,
            enable_fp_fusion=True,
        )


def _described(step: Step, weights: list[Tensor], vectors: list[Tensor], indices: list[Tensor]) -> list[int]:
    """Append a step's tensors to those of the stage; return its row of `steps`."""
    c = step.convolution

    def behind(parts: list[Tensor], values: Tensor | None) -> int:
        start = sum(len(part) for part in parts)
        if values is not None:
            parts.append(values.flatten())
        return start

    places = [behind(weights, c.weight), behind(vectors, c.affine), behind(indices, c.index_in)]
    does = [int(c.affine is not None), int(c.how.relu_in)]
    written = [behind(vectors, c.bias), behind(indices, c.index_out)]
    ends = [int(c.bias is not None), int(c.how.relu_out), int(c.how.accumulate)]
    kernel, _, n_in, n_out = c.weight.shape
    row = [n_in, n_out, kernel, step.source, step.target, *places, *does, *written, *ends]
    return row + [0] * (FIELDS - len(row))
