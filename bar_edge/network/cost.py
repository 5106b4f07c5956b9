"""What a network costs: activation volume, FLOPs and parameters (Lemaire et al. 2019, eq. 4 and section 5.2).

V = sum over all convolution outputs of channels * area. FLOPs = 2 * k^2 * area * n_in * n_out, two per
multiply-add, convolutions only. Parameters are counted everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from bar_edge.network.channels import Passages, passages
from bar_edge.network.liveness import Held, held_channels
from bar_edge.network.network import Network
from bar_edge.records import ChannelPlan, Counts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerCount:
    """One operation with parameters, as it is counted; reason says why it cannot be pruned ("" if it can)."""

    name: str
    kind: str
    in_channels: int
    out_channels: int
    #: output positions of a convolution, 0 for other operations
    area: int
    volume: int
    flops: int
    params: int
    gated: bool
    reason: str


#: modules that make new channels out of all those they read
READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """One call of an operation with parameters: cost = a rate times alive channels in and out.

    volume = area * n_out; flops = flop_rate * n_in * n_out and params = weights * n_in * n_out +
    vectors * n_out + constant, where n_in is 1 for operations on single channels (`alone`).
    """

    node: fx.Node
    source: fx.Node
    alone: bool
    area: int
    flop_rate: int
    weights: int
    vectors: int
    constant: int


def units(network: Network, found: Passages) -> list[Unit]:
    """Return every call of an operation with parameters, in graph order."""
    result = []
    for node in network.nodes:
        module = network.module_of(node)
        if module is None or node not in found:
            continue
        source, numel = node.all_input_nodes[0], sum(p.numel() for p in module.parameters())
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            shape, kernel = network.shapes[node.name], module.weight[0, 0].numel()
            area = torch.Size(shape[2:]).numel()
            alone = found[node].kind == "map"
            per_pair = kernel * module.weight.shape[1] if alone else kernel
            bias = int(module.bias is not None)
            if found[node].kind == "opaque":  # grouped: counted at full width by its own rate
                rate = 2 * kernel * area * module.weight.shape[1]
                result.append(Unit(node, source, True, area, rate, 0, 0, numel))
            else:
                result.append(Unit(node, source, alone, area, 2 * per_pair * area, per_pair, bias, 0))
        elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            area, inputs = (torch.Size(network.shapes[n.name][2:]).numel() for n in (node, source))
            taps = module.weight[0, 0].numel() * module.in_channels // module.groups
            result.append(Unit(node, source, True, area, 2 * taps * inputs, 0, 0, numel))
        elif isinstance(module, nn.Linear) and found[node].kind == "read":
            result.append(Unit(node, source, False, 0, 0, 1, int(module.bias is not None), 0))
        elif numel and found[node].kind == "map" and numel % found[node].width == 0:
            result.append(Unit(node, source, True, 0, 0, 0, numel // found[node].width, 0))
        elif numel:
            result.append(Unit(node, source, True, 0, 0, 0, 0, numel))
    return result


def count(network: Network, plan: ChannelPlan | None = None) -> Counts:
    """Return the costs of the network, or of what slicing it by the plan leaves (liveness closed)."""
    return count_kept(network, plan.kept if plan is not None else {})


def count_kept(network: Network, kept: Mapping[str, Sequence[int]], found: Passages | None = None) -> Counts:
    """Return the costs for kept channels by convolution name; `found` saves the analysis."""
    found = passages(network) if found is None else found
    held = held_channels(network, kept, found)
    volume = flops = params = 0
    counted: set[str] = set()
    for unit in units(network, found):
        v, f, p = _costs(unit, held)
        volume, flops = volume + v, flops + f
        if p and str(unit.node.target) not in counted:  # a module that is called twice has its parameters once
            counted.add(str(unit.node.target))
            params += p
    return Counts(volume=volume, flops=flops, params=params + loose_params(network))


def loose_params(network: Network) -> int:
    """Return the number of parameters that the graph reads by themselves, outside of modules."""
    named = dict(network.body.named_parameters())
    owned = {id(p) for node in network.nodes if node.op == "call_module" for p in _module_parameters(network, node)}
    read = {str(node.target) for node in network.nodes if node.op == "get_attr" and node.users}
    return sum(named[name].numel() for name in read & named.keys() if id(named[name]) not in owned)


def _module_parameters(network: Network, node: fx.Node) -> list[nn.Parameter]:
    module = network.module_of(node)
    return list(module.parameters()) if module is not None else []


def _costs(unit: Unit, held: Held) -> tuple[int, int, int]:
    n_out = int(held[unit.node].sum())
    n_in = 1 if unit.alone else int(held[unit.source].sum()) if unit.source in held else 0
    pairs = n_in * n_out
    constant = unit.constant if n_out else 0
    return unit.area * n_out, unit.flop_rate * pairs, unit.weights * pairs + unit.vectors * n_out + constant


def prunable(network: Network, found: Passages | None = None) -> dict[str, str]:
    """Return every convolution with the reason why its outputs cannot be pruned, "" if they can."""
    found = passages(network) if found is None else found
    fixed: set[fx.Node] = set()
    pending = [node for output in network.nodes if output.op == "output" for node in output.all_input_nodes]
    while pending:
        node = pending.pop()
        if node not in fixed:
            fixed.add(node)
            reader = isinstance(network.module_of(node), READERS)
            passed = [link.source for link in found[node].links] if node in found else []
            pending += [] if reader else passed or ([] if node.op == "placeholder" else node.all_input_nodes)
    reasons = {}
    for node, passage in found.items():
        module = network.module_of(node)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if passage.kind == "map":
                reasons[str(node.target)] = "depthwise: follows its input"
            elif passage.kind == "opaque":
                reasons[str(node.target)] = (
                    "called twice" if _calls(network, node) > 1 else "no rule for its groups or input"
                )
            else:
                reasons[str(node.target)] = "its channels are the network's output" if node in fixed else ""
    return reasons


def _calls(network: Network, node: fx.Node) -> int:
    return sum(other.op == "call_module" and other.target == node.target for other in network.nodes)


def layers(network: Network, plan: ChannelPlan | None = None) -> list[LayerCount]:
    """Return every operation with parameters as it is counted, in graph order."""
    found = passages(network)
    held = held_channels(network, plan.kept if plan is not None else {}, found)
    reasons = prunable(network, found)
    result = []
    for unit in units(network, found):
        volume, flops, params = _costs(unit, held)
        name = str(unit.node.target)
        reason = reasons.get(name, "not a convolution")
        result.append(
            LayerCount(
                name=name,
                kind=type(network.module_of(unit.node)).__name__,
                in_channels=int(held[unit.source].sum()) if unit.source in held else 0,
                out_channels=int(held[unit.node].sum()),
                area=unit.area,
                volume=volume,
                flops=flops,
                params=params,
                gated=not reason,
                reason=reason,
            )
        )
    return result
