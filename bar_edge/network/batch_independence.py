"""Is the answer for an image the same whatever other images are in its batch?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bar_edge.network.network import Network
from bar_edge.records.tolerance import TRACE_TOLERANCE


def mixing_node(network: Network) -> fx.Node | None:
    """Return the first operator by which an image's answer depends on another image of its batch, None if none does.

    Operators with a channel rule leave the batch alone. Where there are others, or the first axis is not the
    batch, the network runs in eval mode on one image between others: its answer must not change with them.
    A network on the meta device has no values to run.
    """
    if any(parameter.is_meta for parameter in network.parameters()):
        return None
    ruled = (p.kind not in ("opaque", "made") and network.shapes[n.name][0] == 2 for n, p in network.channels.items())
    if all(ruled):
        return None
    one, other = _answers(network, seed=1), _answers(network, seed=3)
    changed = [node for node in one if _differ(one[node], other[node])]
    return changed[0] if any(node.op == "output" for node in changed) else None


def _answers(network: Network, seed: int) -> dict[fx.Node, list[Tensor]]:
    """Return what every operator makes of the second of three images, the others drawn by the seed."""
    answers: dict[fx.Node, list[Tensor]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op not in ("placeholder", "get_attr"):
                tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
                answers[n] = [t.detach()[1] for t in tensors if t.shape[:1] == (3,)]
            return value

    generators = [torch.Generator().manual_seed(s) for s in (seed, 0, seed + 1)]
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    images = [torch.stack([torch.randn(s, generator=g) for g in generators]).to(like) for s in network.input_shapes]
    with torch.random.fork_rng(), torch.no_grad():  # noise that is on in eval mode too: the same twice
        torch.manual_seed(0)
        Recorder(network.body).run(*images)
    return answers


def _differ(one: list[Tensor], other: list[Tensor]) -> bool:
    """Tell whether two lists of tensors differ by more than rounding."""
    return not all(
        torch.allclose(a, b, rtol=0, atol=TRACE_TOLERANCE * float(a.abs().max()), equal_nan=True)
        for a, b in zip(one, other, strict=True)
        if a.numel() and a.is_floating_point()
    )
