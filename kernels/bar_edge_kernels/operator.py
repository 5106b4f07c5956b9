"""A convolution of a mixed-connectivity block as one operator of torch: `bar_edge::mixed_convolution_`, in place.

On a GPU it is one Triton kernel, on a CPU the plain-torch definition. For inference only: it has no gradient.
"""

from __future__ import annotations

import dataclasses
import importlib
import os

import torch
from torch import Tensor

from bar_edge_kernels.reference import mixed_convolution


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class How:
    """What is done beside the products.

    Attributes:
        bias: (n_out,) float32.
        affine: (2, n_in) float32, scale and shift of the channels read.
        first_in: the first channel read where they are a run, else -1.
        first_out: the first channel written where they are a run, else -1.
        stride: of the convolution.
        padding: zeros behind the affine map and the ReLU.
        relu_in: whether the channels read pass a ReLU.
        relu_out: whether the channels written pass a ReLU, after the sum.
        accumulate: whether the channels written keep what they held.
    """

    bias: Tensor | None = None
    affine: Tensor | None = None
    first_in: int = -1
    first_out: int = -1
    stride: int = 1
    padding: int = 0
    relu_in: bool = False
    relu_out: bool = False
    accumulate: bool = True


@torch.library.custom_op("bar_edge::mixed_convolution_", mutates_args=("out",))
def mixed_convolution_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    index_in: Tensor,
    index_out: Tensor,
    bias: Tensor | None,
    affine: Tensor | None,
    first_in: int,
    first_out: int,
    stride: int,
    padding: int,
    relu_in: bool,
    relu_out: bool,
    accumulate: bool,
) -> None:
    """Add a convolution of some of x's channels to some of out's; see `MixedConvolution`."""
    how = How(
        bias=bias,
        affine=affine,
        first_in=first_in,
        first_out=first_out,
        stride=stride,
        padding=padding,
        relu_in=relu_in,
        relu_out=relu_out,
        accumulate=accumulate,
    )
    if x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        importlib.import_module("bar_edge_kernels.convolution").launch(out, x, weight, index_in, index_out, how)
        return
    out.copy_(
        mixed_convolution(
            out,
            x,
            weight.permute(3, 2, 0, 1),
            None if bias is None else bias.to(x.dtype),
            index_in,
            index_out,
            stride=stride,
            padding=padding,
            affine=affine,
            relu_in=relu_in,
            relu_out=relu_out,
            accumulate=accumulate,
        )
    )


@mixed_convolution_.register_fake
def _(*arguments: object) -> None:
    """Compute nothing: `out` keeps its shape."""


class MixedConvolution(torch.nn.Module):
    """A convolution of a mixed-connectivity block, made ready for the kernel.

    Args:
        weight: (n_out, n_in, k, k).
        index_in: (n_in,) of integers, which channels of its input are read.
        index_out: (n_out,) of integers without repetitions, which channels of the stream are written.
        how: bias, affine map, activations, stride and padding; its first_in and first_out are found here.

    Raises:
        ValueError: for index sets that do not fit the weight or write a channel twice, and when it is called where a
            gradient would be needed, or with an input that shares memory with what it writes.
    """

    weight: Tensor
    bias: Tensor | None
    affine: Tensor | None
    index_in: Tensor
    index_out: Tensor

    def __init__(self, weight: Tensor, index_in: Tensor, index_out: Tensor, how: How) -> None:
        super().__init__()
        if weight.shape[:2] != (len(index_out), len(index_in)):
            raise ValueError(f"{len(index_out)} x {len(index_in)} channels for a weight of {tuple(weight.shape[:2])}")
        if len(set(index_out.tolist())) < len(index_out):
            raise ValueError("a channel is written twice")
        for name, value in {
            "weight": weight.detach().permute(2, 3, 1, 0).contiguous(),
            "bias": None if how.bias is None else how.bias.detach().float(),
            "affine": None if how.affine is None else how.affine.detach().float(),
            "index_in": index_in.to(torch.int32),
            "index_out": index_out.to(torch.int32),
        }.items():
            self.register_buffer(name, value)
        self.how = dataclasses.replace(how, first_in=_first(index_in), first_out=_first(index_out))

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Write into `out`, (N, C_out, H', W'), from x, (N, C_in, H, W), both laid out as NHWC; return `out`."""
        if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
            raise ValueError("inference only: this operator has no gradient; call it under torch.inference_mode()")
        if x.is_cuda and x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
            raise ValueError("the input shares memory with what is written: programs would read half of each")
        h = self.how
        mixed_convolution_(
            out,
            x,
            self.weight,
            self.index_in,
            self.index_out,
            self.bias,
            self.affine,
            h.first_in,
            h.first_out,
            h.stride,
            h.padding,
            h.relu_in,
            h.relu_out,
            h.accumulate,
        )
        return out


def _first(index: Tensor) -> int:
    """Return the first of a run of channels; -1 for channels that are no run."""
    places = index.tolist()
    first = places[0] if places else 0
    return first if places == list(range(first, first + len(places))) else -1
