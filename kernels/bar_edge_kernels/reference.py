"""The plain-torch definition of a mixed-connectivity block (Lemaire et al. 2019, supplement, section 2)."""

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
    delta = F.conv2d(gather(stream, index_in), weight, bias, padding=padding)
    return scatter_add(stream, index_out, delta)
