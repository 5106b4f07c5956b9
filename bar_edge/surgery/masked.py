"""The meaning of a plan, executed: the dense network in which every absent channel is zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bar_edge.network import Network
from bar_edge.network.channels import is_whole
from bar_edge.network.liveness import held_channels
from bar_edge.network.network import unflatten
from bar_edge.records import ChannelPlan
from bar_edge.surgery.check import check_plan


def masked_outputs(network: Network, plan: ChannelPlan, *inputs: Tensor) -> Any:
    """Return what the dense network answers with every absent channel set to 0 after every operation.

    This is what slicing must equal. Eval mode; no gradient; raises InputError for another network's plan.
    """
    found = network.channels
    check_plan(network, plan)
    held = held_channels(network, plan.kept)

    class Masking(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n not in held or is_whole(found[n]) or found[n].kind == "spread" or not isinstance(value, Tensor):
                return value
            shape = [1] * value.ndim
            shape[found[n].axis] = -1
            return value.masked_fill(~held[n].to(value.device).view(shape), 0)  # 0 * infinity would not be 0

    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            return unflatten(Masking(network.body).run(*inputs), network.out_spec)
    finally:
        network.train(training)


def relative_difference(a: Any, b: Any) -> float:
    """Return max |a - b| / max |a| over all tensors of two equal structures of outputs."""
    firsts, seconds = ([t.detach() for t in torch.utils._pytree.tree_leaves(x)] for x in (a, b))
    scale = max(float(x.abs().max()) for x in firsts)
    difference = max(float((x - y).abs().max()) for x, y in zip(firsts, seconds, strict=True))
    return difference / scale if scale else difference
