"""The plain-torch definition of a mixed-connectivity convolution (Lemaire et al. 2019, supplement, section 2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gather(stream: Tensor, index: Tensor) -> Tensor:
    """Return the channels that a block reads; stream: (N, C, ...), index: (n,) int64 -> (N, n, ...)."""
    return stream.index_select(1, index)


def scatter_add(stream: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """Return the stream with delta added to the channels that a block writes, the others untouched.

    stream: (N, C, ...), index: (n,) int64 without repetitions, delta: (N, n, ...) -> (N, C, ...).
    """
    return stream.index_add(1, index, delta)


def gather_conv_scatter_add(
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index_in: Tensor,
    index_out: Tensor,
    *,
    padding: int = 0,
) -> Tensor:
    """Return stream + scatter(conv(gather(stream))) for a convolution of stride 1.

    stream: (N, C, H, W), weight: (n_out, n_in, k, k), bias: (n_out,), index_in: (n_in,),
    index_out: (n_out,) -> (N, C, H, W). padding must keep H and W (k // 2 for odd k).
    """
    return mixed_convolution(stream, stream, weight, bias, index_in, index_out, padding=padding)


def mixed_convolution(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index_in: Tensor,
    index_out: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    affine: Tensor | None = None,
    relu_in: bool = False,
    relu_out: bool = False,
    accumulate: bool = True,
) -> Tensor:
    """Return `out` with a convolution of some of x's channels added to some of its own.

    The channels read pass an affine map and a ReLU first where these are asked for: BatchNorm and activation of a
    pre-activation block. `relu_out` acts on the channels written, after the sum, as in a post-activation block.

    Args:
        out: (N, C_out, H', W').
        x: (N, C_in, H, W).
        weight: (n_out, n_in, k, k).
        bias: (n_out,).
        index_in: (n_in,) int64, which channels of x are read.
        index_out: (n_out,) int64 without repetitions, which channels of `out` are written.
        stride: of the convolution.
        padding: zeros around what the affine map and the ReLU have made.
        affine: (2, n_in), scale and shift of the channels read.
        relu_in: whether the channels read pass a ReLU.
        relu_out: whether the channels written pass a ReLU.
        accumulate: whether the channels written keep what they held, or are overwritten.
    """
    read = gather(x, index_in)
    if affine is not None:
        scale, shift = affine.to(read.dtype)
        read = read * scale[:, None, None] + shift[:, None, None]
    if relu_in:
        read = read.relu()
    if weight.shape[0] and weight.shape[1]:
        delta = F.conv2d(read, weight, bias, stride=stride, padding=padding)
    else:  # torch does not convolve from or to no channels
        delta = out.new_zeros(len(out), len(index_out), *out.shape[2:])
        delta = delta if bias is None else delta + bias[:, None, None]
    base = out if accumulate else out.index_fill(1, index_out, 0)
    total = scatter_add(base, index_out, delta)
    return total.index_copy(1, index_out.long(), gather(total, index_out).relu()) if relu_out else total
