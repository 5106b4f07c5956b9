"""Fisher pruning: channels whose loss would be missed least for what they cost, priced anew as others go.

Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning". A channel's signal is
Delta = (1 / 2N) sum_n g_n^2 with g_n = - sum over pixels of a dl_n/da: the slope of image n's loss along a factor on
the channel. Which goes next is decided by Delta over what it saves, their greedy choice by cost, here of any kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bar_edge.methods.bar.closing import Closer
from bar_edge.methods.method import Context, Scored
from bar_edge.network import Network


def score(dense: Network, context: Context) -> Scored:
    """Return the dense network as it is, scores by the order in which channels go, and those that stay in budget."""
    signals = channel_signals(dense, context)
    closer = Closer(context.layout, context.budget.metric)
    opened, scores = torch.ones(len(signals), dtype=torch.bool), 1 + signals / signals.max().clamp(min=1e-30)
    closed = list(closer.close(opened, signals, context.limit))
    for i, (gates, _) in enumerate(closed):
        opened[gates], scores[gates] = False, i / len(closed)
    return Scored(network=dense, scores=scores, opened=opened)


def channel_signals(dense: Network, context: Context) -> Tensor:
    """Return Delta of every gate, (gates,), over the training images that the context gives."""
    total, images = torch.zeros(context.layout.size, dtype=torch.float64), 0
    device = next(dense.parameters()).device
    dense.eval()
    for batch, targets in context.batches(device):
        with _slopes(dense, list(context.layout.offsets)) as slopes:
            context.loss(dense(batch.requires_grad_()), targets).backward()
        dense.zero_grad()
        # the loss is a mean over the batch: one image's gradient is that many times larger
        total += torch.cat([signal(len(batch) * slopes[name]) * len(batch) for name in context.layout.offsets])
        images += len(batch)
    return total / max(images, 1)


def signal(slopes: Tensor) -> Tensor:
    """Return Delta (channels,) of slopes g (images, channels), each of one image's own loss."""
    return slopes.double().square().mean(0).cpu() / 2


@contextlib.contextmanager
def _slopes(network: Network, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Collect for each layer g (images, channels), summed over pixels and over all calls of the layer."""
    found: dict[str, Tensor] = {}

    def watch(name: str, linear: bool, output: Tensor) -> None:
        value = output.detach().clone()

        def add(gradient: Tensor) -> None:
            slopes = -(value * gradient)
            over = range(1, slopes.ndim - 1) if linear else range(2, slopes.ndim)
            slopes = slopes.sum(tuple(over)) if len(over) else slopes
            found[name] = found[name] + slopes if name in found else slopes

        output.register_hook(add)

    handles = []
    for name in names:
        module = network.body.get_submodule(name)
        linear = isinstance(module, nn.Linear)
        handles.append(
            module.register_forward_hook(lambda _, __, output, name=name, linear=linear: watch(name, linear, output))
        )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
