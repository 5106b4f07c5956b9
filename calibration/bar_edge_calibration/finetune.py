"""A short training under the rounding of eight bits, towards what the float network answers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from bar_edge_calibration.place import LARGEST_WEIGHT, grid

LEARNING_RATE = 1e-5
#: batches that tell the ranges of what layers read
RANGE_BATCHES = 4
_Network = TypeVar("_Network", bound=nn.Module)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def finetune(network: _Network, batches: Iterable[Tensor], *, weight_bits: int) -> _Network:
    """Return a copy whose weights learned to answer as `network` does while they and what they read are rounded.

    network: for inference, BatchNorm folded; batches: inputs, one step of Adam each. weight_bits: of the recipe that
    the network is for. Weights are rounded per channel to symmetric integers, what layers read per tensor to uint8 over
    the range of the first batches, gradients pass straight through (Jacob et al., Quantization and Training of Neural
    Networks, 2018). The loss is the squared difference of the outputs, relative: labels are not needed. The same
    batches give the same weights.
    """
    images = iter(batches)
    first = list(itertools.islice(images, RANGE_BATCHES))
    student = copy.deepcopy(network).eval()
    layers = [module for module in student.modules() if isinstance(module, _LAYERS)]
    rounding = {layer: _RoundedInput() for layer in layers}
    hooks = [layer.register_forward_pre_hook(rounding[layer]) for layer in layers]
    with torch.no_grad():
        for batch in first:
            student(batch)
    for layer in layers:
        rounding[layer].observing = False
        parametrize.register_parametrization(layer, "weight", _RoundedWeight(LARGEST_WEIGHT[weight_bits]))
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE)
    for batch in itertools.chain(first, images):
        with torch.no_grad():
            aims = tree_leaves(network.eval()(batch))
        answers = tree_leaves(student(batch))
        pairs = zip(answers, aims, strict=True)
        loss = torch.stack([(a - b).square().mean() / b.square().mean().clamp(min=1e-12) for a, b in pairs]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    for hook in hooks:
        hook.remove()
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    return student


class _RoundedInput:
    """A forward pre-hook that first observes a layer's input, then rounds it."""

    def __init__(self) -> None:
        self.low, self.high, self.observing = 0.0, 0.0, True

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x, *others = inputs
        if self.observing:
            self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
            return None
        scale, zero = grid(self.low, self.high, "uint8")
        return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), 0, 255), *others


class _RoundedWeight(nn.Module):
    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight as integers per output channel stand for it."""
        scale = (weight.detach().abs().flatten(1).amax(1) / self.largest).clamp(min=1e-12)
        return torch.fake_quantize_per_channel_affine(
            weight, scale, torch.zeros_like(scale), 0, -self.largest, self.largest
        )
