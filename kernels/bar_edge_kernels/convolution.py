"""Gather, convolve, scatter-add in one pass: a Triton kernel for one convolution of a mixed-connectivity block."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import dataclasses
import itertools

import triton
import triton.language as tl
from torch import Tensor

from bar_edge_kernels.operator import How
from bar_edge_kernels.tile import convolved, store


@triton.jit
def mixed_convolution_kernel(
    out,
    x,
    weight,
    bias,
    affine,
    index_in,
    index_out,
    pixels,
    height,
    width,
    out_height,
    out_width,
    x_channels,
    out_channels,
    n_in,
    n_out,
    first_in,
    first_out,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    RELU_IN: tl.constexpr,
    RELU_OUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    RUN_IN: tl.constexpr,
    RUN_OUT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Add a convolution of some channels of x to some channels of out, in place; see `MixedConvolution`."""
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = pixel < pixels
    total = convolved(
        x,
        weight,
        affine,
        index_in,
        pixel,
        inside,
        channel,
        height,
        width,
        out_height,
        out_width,
        x_channels,
        n_in,
        n_out,
        first_in,
        KERNEL,
        STRIDE,
        PADDING,
        HAS_AFFINE,
        RELU_IN,
        RUN_IN,
        BLOCK_PIXELS,
        BLOCK_IN,
        BLOCK_OUT,
    )
    store(
        out,
        bias,
        index_out,
        total,
        pixel,
        inside,
        channel,
        out_channels,
        n_out,
        first_out,
        HAS_BIAS,
        RELU_OUT,
        ACCUMULATE,
        RUN_OUT,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Blocks:
    """How a convolution is cut: pixels and output channels of a program, input channels of a step, warps, stages."""

    pixels: int
    channels_in: int
    channels_out: int
    warps: int = 4
    stages: int = 3


#: the cuts for narrow, middle and wide layers; none spills registers (`python -m bar_edge_kernels.ahead`)
DEFAULTS = (Blocks(32, 16, 16, 4, 1), Blocks(32, 16, 32, 8, 2), Blocks(64, 32, 64, 8, 3))


def default_blocks(n_out: int) -> Blocks:
    """Return how a convolution is cut where nothing was measured: the smallest cut that covers its output channels."""
    return next((blocks for blocks in DEFAULTS if blocks.channels_out >= n_out), DEFAULTS[-1])


def candidate_blocks(n_in: int, n_out: int) -> list[Blocks]:
    """Return the cuts worth a try, the default first, at most 13."""
    wide = [b for b in (16, 32, 64) if b <= max(16, _power(n_out))][-2:]
    deep = min(32, _power(n_in))
    others = [Blocks(p, deep, o, warps, 2) for p, o, warps in itertools.product((32, 64, 128), wide, (4, 8))]
    return list(dict.fromkeys([default_blocks(n_out), *others]))


def launch(
    out: Tensor, x: Tensor, weight: Tensor, index_in: Tensor, index_out: Tensor, how: How, blocks: Blocks | None = None
) -> None:
    """Run the kernel on tensors of shape (N, C, H, W) that lie as NHWC; `out` is written in place.

    weight: (k, k, n_in, n_out); index_in: (n_in,), index_out: (n_out,) int32.
    """
    number, out_channels, out_height, out_width = out.shape
    _, x_channels, height, width = x.shape
    kernel, _, n_in, n_out = weight.shape
    if not n_out or not number:
        return
    pixels = number * out_height * out_width
    b = blocks or default_blocks(n_out)
    mixed_convolution_kernel[triton.cdiv(pixels, b.pixels), triton.cdiv(n_out, b.channels_out)](
        out,
        x,
        weight,
        weight if how.bias is None else how.bias,
        weight if how.affine is None else how.affine,
        index_in,
        index_out,
        pixels,
        height,
        width,
        out_height,
        out_width,
        x_channels,
        out_channels,
        n_in,
        n_out,
        max(how.first_in, 0),
        max(how.first_out, 0),
        KERNEL=kernel,
        STRIDE=how.stride,
        PADDING=how.padding,
        HAS_BIAS=how.bias is not None,
        HAS_AFFINE=how.affine is not None,
        RELU_IN=how.relu_in,
        RELU_OUT=how.relu_out,
        ACCUMULATE=how.accumulate,
        RUN_IN=how.first_in >= 0,
        RUN_OUT=how.first_out >= 0,
        BLOCK_PIXELS=b.pixels,
        BLOCK_IN=b.channels_in,
        BLOCK_OUT=b.channels_out,
        num_warps=b.warps,
        num_stages=b.stages,
        enable_fp_fusion=True,
    )


def _power(n: int) -> int:
    """Return the least power of two that is at least n, and 16: what a tensor core's product takes."""
    return max(16, 1 << (n - 1).bit_length())
