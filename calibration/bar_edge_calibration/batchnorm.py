"""BatchNorm statistics, measured anew after a network was changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate_batchnorm(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set every BatchNorm's running statistics to the mean of the batches' statistics, all batches alike.

    batches: inputs on the network's device, of equal size for exact means. Everything else stays as it is:
    weights, momentum, modes; dropout is off meanwhile. A network without running statistics is not run.
    Raises ValueError if there are no batches.
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    modes = [(module, module.training) for module in network.modules()]
    momenta = [norm.momentum for norm in norms]
    images = iter(batches)
    first = next(images, None)
    if first is None:
        raise ValueError("re-estimating BatchNorm needs at least one batch")
    try:
        network.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # a cumulative average instead of a moving one
        network(first)
        for batch in images:
            network(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
