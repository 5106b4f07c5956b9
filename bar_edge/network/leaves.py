"""The leaves that a sliced network has and the user's network has not."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MixedAdd(nn.Module):
    """Add two tensors that hold different channels of one residual stream (Lemaire et al., section 4.2).

    a: (N, n_a, ...), b: (N, n_b, ...) -> (N, width, ...). Channel i of an operand is added to
    channel positions[i] of the output; a channel that neither operand holds is zero (only in forms filled up
    for a runtime). In first-write order positions_a is 0..n_a-1: the stream keeps its place, new channels are appended.
    """

    _index_a: Tensor
    _index_b: Tensor

    def __init__(self, width: int, positions_a: tuple[int, ...], positions_b: tuple[int, ...]) -> None:
        super().__init__()
        self.width, self.positions_a, self.positions_b = width, positions_a, positions_b
        self.register_buffer("_index_a", torch.tensor(positions_a, dtype=torch.int64), persistent=False)
        self.register_buffer("_index_b", torch.tensor(positions_b, dtype=torch.int64), persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the sum; neither operand is changed."""
        if a.dtype != b.dtype:  # as a + b would, under autocast
            a, b = a.to(torch.promote_types(a.dtype, b.dtype)), b.to(torch.promote_types(a.dtype, b.dtype))
        everything = tuple(range(self.width))
        if self.positions_a == everything:
            return a + b if self.positions_b == everything else a.index_add(1, self._index_b, b)
        shape = (a.shape[0], self.width, *a.shape[2:])
        return a.new_zeros(shape).index_add(1, self._index_a, a).index_add(1, self._index_b, b)

    def extra_repr(self) -> str:
        """Describe the widths."""
        return f"{len(self.positions_a)} + {len(self.positions_b)} -> {self.width}"


class Expand(nn.Module):
    """Put the channels of x back to their places in a wider tensor of zeros.

    x: (..., n, ...) along `axis` -> (..., width, ...): what an operator without a channel rule, or the
    user of a network's output, expects.
    """

    _index: Tensor

    def __init__(self, axis: int, width: int, positions: tuple[int, ...]) -> None:
        super().__init__()
        self.axis, self.width, self.positions = axis, width, positions
        self.register_buffer("_index", torch.tensor(positions, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the wide tensor."""
        shape = list(x.shape)
        shape[self.axis] = self.width
        return x.new_zeros(shape).index_copy(self.axis, self._index, x)

    def extra_repr(self) -> str:
        """Describe the widths."""
        return f"{len(self.positions)} -> {self.width} along {self.axis}"


class PartialNorm(nn.Module):
    """GroupNorm or LayerNorm of a tensor some of whose channels are absent: zeros that count in the statistics.

    x: (N, n, ...) for axis 1, (..., n) for axis -1 and one group -> the same shape. Channel i belongs to
    group `membership[i]`; the dense network has `group_width` channels in every group. Half precision is
    normalised in float32, as torch does.
    """

    _member: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, axis: int, group_width: int, membership: tuple[int, ...], eps: float, affine: bool, bias: bool = True
    ) -> None:
        super().__init__()
        assert axis == 1 or (axis == -1 and not any(membership))
        self.axis, self.group_width, self.membership, self.eps, self.affine = axis, group_width, membership, eps, affine
        groups = sorted(set(membership))
        member = torch.zeros(len(membership), len(groups))
        member[torch.arange(len(membership)), [groups.index(group) for group in membership]] = 1
        self.register_buffer("_member", member, persistent=False)
        self.register_parameter("weight", nn.Parameter(torch.ones(len(membership))) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(len(membership))) if affine and bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised channels that are there."""
        wide = x if x.dtype == torch.float64 else x.float()
        y = (self._grouped if self.axis == 1 else self._last)(wide)
        shape = [1, -1, *[1] * (x.ndim - 2)] if self.axis == 1 else [-1]
        if self.weight is not None:
            y = y * self.weight.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        return y.to(x.dtype)

    def _grouped(self, x: Tensor) -> Tensor:
        """Sums over a group go through the (n, groups) matrix of membership; no matmul: autocast would halve it."""
        shape, x = x.shape, x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
        member, size = self._member.to(x.dtype), self.group_width * x.shape[2]
        mean = (x.sum(2).unsqueeze(2) * member).sum(1) / size
        centred = x - (mean.unsqueeze(1) * member).sum(2, keepdim=True)
        absent = self.group_width - member.sum(0)
        squares = (centred.square().sum(2).unsqueeze(2) * member).sum(1)
        scale = ((squares + absent * x.shape[2] * mean.square()) / size + self.eps).rsqrt()
        return (centred * (scale.unsqueeze(1) * member).sum(2, keepdim=True)).view(shape)

    def _last(self, x: Tensor) -> Tensor:
        mean = x.sum(-1, keepdim=True) / self.group_width
        centred, absent = x - mean, self.group_width - len(self.membership)
        variance = (centred.square().sum(-1, keepdim=True) + absent * mean.square()) / self.group_width
        return centred * (variance + self.eps).rsqrt()

    def extra_repr(self) -> str:
        """Describe the widths."""
        return f"{len(self.membership)} channels, groups of {self.group_width}, axis {self.axis}"
