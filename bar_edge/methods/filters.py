"""The filters of a layer as rows, whatever kind of layer it is."""

from __future__ import annotations

from torch import Tensor, nn

from bar_edge.network.channels import TRANSPOSED


def filters(module: nn.Module) -> Tensor:
    """Return the weights (output channels, weights of one) of a convolution or linear layer, without gradient."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, TRANSPOSED):  # (in, out per group, ...)
        weight = weight.view(module.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return weight.detach().flatten(1)
