"""What one program of every kernel does: a tile of pixels by output channels, as one implicit matrix product.

Nothing is gathered or scattered: channels are indexed while they are loaded and stored. Needs Triton.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

#: Triton's names for the types that the kernels compute in
ELEMENTS = ("fp32", "fp16", "bf16")


@triton.jit
def convolved(
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
    kernel,
    stride,
    padding,
    has_affine,
    relu_in,
    RUN_IN: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Return the convolution at some pixels and output channels, (BLOCK_PIXELS, BLOCK_OUT) in float32.

    x: (N, H, W, x_channels); weight: (k, k, n_in, n_out); affine: (2, n_in) float32; pixel: which of the N H' W';
    RUN_IN: whether the channels read are first_in, first_in + 1, ...; else index_in says which they are.
    """
    image = pixel // (out_height * out_width)
    row = pixel // out_width % out_height
    column = pixel % out_width
    total = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), dtype=tl.float32)
    for tap in range(kernel * kernel):
        y = row * stride + tap // kernel - padding
        z = column * stride + tap % kernel - padding
        there = inside & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        base = ((image * height + y) * width + z) * x_channels
        for start in range(0, n_in, BLOCK_IN):
            own = start + tl.arange(0, BLOCK_IN)
            known = own < n_in
            place = first_in + own
            if not RUN_IN:
                place = tl.load(index_in + own, mask=known, other=0)
            held = there[:, None] & known[None, :]
            value = tl.load(x + base[:, None] + place[None, :], mask=held, other=0.0)
            if has_affine:
                scale = tl.load(affine + own, mask=known, other=0.0)
                shift = tl.load(affine + n_in + own, mask=known, other=0.0)
                moved = value.to(tl.float32) * scale[None, :] + shift[None, :]
                value = tl.where(held, moved, 0.0).to(value.dtype)  # zeros are padded behind the affine map
            if relu_in:
                value = tl.maximum(value.to(tl.float32), 0.0).to(value.dtype)
            rows = (tap * n_in + own)[:, None] * n_out + channel[None, :]
            filters = tl.load(weight + rows, mask=known[:, None] & (channel < n_out)[None, :], other=0.0)
            total = tl.dot(value, filters, total, input_precision="ieee")
    return total


@triton.jit
def store(
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
    has_bias,
    relu_out,
    accumulate,
    RUN_OUT: tl.constexpr,
):
    """Add a tile to the channels of `out` that it belongs to; out: (N, H', W', out_channels), bias: float32."""
    known = channel < n_out
    place = first_out + channel
    if not RUN_OUT:
        place = tl.load(index_out + channel, mask=known, other=0)
    if has_bias:
        total += tl.load(bias + channel, mask=known, other=0.0)[None, :]
    where = out + pixel[:, None] * out_channels + place[None, :]
    mask = inside[:, None] & known[None, :]
    if accumulate:
        total += tl.load(where, mask=mask, other=0.0).to(tl.float32)
    if relu_out:
        total = tl.maximum(total, 0.0)
    tl.store(where, total.to(out.dtype.element_ty), mask=mask)
