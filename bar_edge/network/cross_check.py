"""Are all convolutions counted? Torch's own counter says what each operator takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bar_edge.errors import InputError
from bar_edge.network.channels import RULES
from bar_edge.network.counted_cost import computed_layers, positions_of
from bar_edge.network.network import KEEP_SHAPE, Network
from bar_edge.network.trace import source_line


def uncounted_flops(network: Network) -> dict[fx.Node, int]:
    """Return what takes FLOPs that count for nothing, and how many for one image: products, attention, vectors.

    Raises InputError if there is a convolution among it: a budget that leaves it out would be none.
    """
    asked = [n for n in network.nodes if n.op == "call_function" and n.name in network.shapes]
    asked = [n for n in asked if n.target not in RULES and n not in computed_layers(network)]
    _refuse([node for node in asked if "conv" in str(node.target)])
    measured = _by_torch(network, asked) if asked else {}
    _refuse([node for node, (convolutions, _) in measured.items() if convolutions])
    found = _linear_on_vectors(network) | {node: everything for node, (_, everything) in measured.items()}
    return {node: flops for node, flops in found.items() if flops}


def _refuse(hidden: list[fx.Node]) -> None:
    if hidden:
        raise InputError(
            "a network whose convolutions can all be counted",
            got=", ".join(f"{node.target} at {source_line(node)}" for node in hidden[:3]),
            consequence="volume and FLOPs would leave them out, and a budget would not hold",
            remedy="write them with a module or function of torch.nn",
        )


def _linear_on_vectors(network: Network) -> dict[fx.Node, int]:
    """Return the linear layers that have one position, and so no activation map."""
    layers = [(node, network.module_of(node)) for node in network.nodes if node.name in network.shapes]
    return {
        node: 2 * module.weight.numel()
        for node, module in layers
        if isinstance(module, nn.Linear) and not positions_of(network.shapes[node.name], module.out_features)
    }


def _by_torch(network: Network, asked: list[fx.Node]) -> dict[fx.Node, tuple[int, int]]:
    """Return torch's counts of some functions, FLOPs of convolutions and of everything, for one image.

    They run on tensors without values.
    """
    found: dict[fx.Node, tuple[int, int]] = {}

    class Counter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if isinstance(network.module_of(n), KEEP_SHAPE):
                return torch.empty_like(self.fetch_args_kwargs_from_env(n)[0][0])
            if n not in asked:
                return super().run_node(n)
            with FlopCounterMode(display=False) as counter:
                value = super().run_node(n)
            by_operator = counter.get_flop_counts().get("Global", {})
            convolutions = sum(number for name, number in by_operator.items() if "conv" in str(name))
            found[n] = convolutions // 2, counter.get_total_flops() // 2
            return value

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        like = next(network.parameters(), torch.empty(0))
        inputs = [torch.empty(2, *shape, device=like.device, dtype=like.dtype) for shape in network.input_shapes]
        Counter(network.body).run(*inputs)
    return found
