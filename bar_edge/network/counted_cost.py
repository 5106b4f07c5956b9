"""What a network costs: activation volume, FLOPs and parameters (Lemaire et al. 2019, eq. 4 and section 5.2).

V = sum over all convolution outputs of channels * area. FLOPs = 2 * k^2 * area * n_in * n_out, two per
multiply-add, convolutions only; a linear layer at many positions (N, ..., features) is a 1x1 convolution.
One whose weights are computed is counted as it stands. Parameters are counted everywhere. What torch counts besides
(linear layers on vectors, products of tensors, attention) is named by `uncounted_flops`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from bar_edge.network.channels import (
    READERS,
    TRANSPOSED,
    called_again,
    cut_parameters,
    is_parameter,
    is_whole,
    parameter_axis,
)
from bar_edge.network.liveness import Held, held_channels
from bar_edge.network.network import Network
from bar_edge.network.prunable import module_parameters, prunable
from bar_edge.records import COSTS, ChannelPlan, Cost, Counts

#: the costs that stand in Counts
COUNTED = tuple(field.name for field in dataclasses.fields(Counts))

aten = torch.ops.aten


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


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """One call of an operation with parameters: cost = a rate times alive channels in and out.

    volume = area * n_out; flops = flop_rate * pairs and params = weights * pairs + vectors * n_out +
    constant, where pairs is the sum over `groups` of n_in * n_out, or n_out for operations on single
    channels (`alone`). in_width: channels of an input that is there as a whole, else None. whole: volume and
    FLOPs of what cannot be pruned, besides.
    """

    node: fx.Node
    source: fx.Node
    alone: bool
    area: int
    flop_rate: int
    weights: int
    vectors: int
    constant: int
    groups: int = 1
    in_width: int | None = None
    whole: tuple[int, int] = (0, 0)


COMPUTED_REASON = "its weights are computed"
#: what convolves with weights that the graph computes
COMPUTED = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
    aten.linear.default,
}


def units(network: Network) -> list[Unit]:
    """Return every call of an operation with parameters, in graph order."""
    found = network.channels
    result, parameters = [], set[fx.Node]()
    for node in network.nodes:
        if node not in found:
            continue
        module = network.module_of(node)
        if module is None:
            result += _parameter_units(network, node, parameters)
            if node.target in COMPUTED and any(whole := _computed(network, node)):
                result.append(Unit(node, node.all_input_nodes[0], True, 0, 0, 0, 0, 0, whole=whole))
            continue
        source, passage, numel = node.all_input_nodes[0], found[node], sum(p.numel() for p in module.parameters())
        if isinstance(module, READERS):
            result.append(_reader_unit(network, node, module, numel))
        elif numel and passage.kind in ("map", "norm") and numel % passage.width == 0 and not _shared_number(module):
            result.append(Unit(node, source, True, 0, 0, 0, numel // passage.width, 0))
        elif numel:
            result.append(Unit(node, source, True, 0, 0, 0, 0, numel))
    return result


def computed_layers(network: Network) -> list[fx.Node]:
    """Return the convolutions, and linear layers at many positions, whose weights are computed or not their own."""
    asked = (n for n in network.channels if n.op == "call_function" and n.target in COMPUTED)
    return [node for node in asked if any(_computed(network, node))]


def _computed(network: Network, node: fx.Node) -> tuple[int, int]:
    """Return volume and FLOPs of a convolution with computed weights for one image; of a layer on vectors none.

    `shapes` are those of two images, which may lie along any axis.
    """
    x, weight = (network.shapes[n.name] for n in node.args[:2] if isinstance(n, fx.Node))
    shape = network.shapes[node.name]
    if node.target is aten.linear.default:
        positions = torch.Size(shape[:-1]).numel() * (len(shape) > 2)
        return positions * shape[-1] // 2, positions * torch.Size(weight).numel()
    transposed = node.args[6] if node.target is aten.convolution.default else "transpose" in str(node.target)
    map_shape = x if transposed else shape
    return torch.Size(shape).numel() // 2, shape[0] * torch.Size(map_shape[2:]).numel() * torch.Size(weight).numel()


def _shared_number(module: nn.Module) -> bool:
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _reader_unit(network: Network, node: fx.Node, module: nn.Module, numel: int) -> Unit:
    """Return the rates of a convolution or linear layer; one without a rule is counted as it stands."""
    found = network.channels
    source, passage, weight = node.all_input_nodes[0], found[node], module.weight
    assert isinstance(weight, torch.Tensor)
    shape, linear = network.shapes[node.name], isinstance(module, nn.Linear)
    area = torch.Size(shape[1:]).numel() // shape[passage.axis] if len(shape) > 2 else 0
    # where the filter is applied: a transposed convolution at every position of its input
    applied = torch.Size(network.shapes[source.name][2:]).numel() if isinstance(module, TRANSPOSED) else area
    taps, bias = weight[0, 0].numel(), int(getattr(module, "bias", None) is not None)
    if passage.kind == "read":
        inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        assert isinstance(inputs, int)
        whole = inputs if is_whole(found[source]) else None
        return Unit(node, source, False, area, 2 * taps * applied, taps, bias, 0, passage.groups, whole)
    if passage.kind == "map" and not linear:  # depthwise
        return Unit(node, source, True, area, 2 * taps * applied, taps, bias, 0)
    if passage.kind == "map":  # mixes positions: every channel by the same matrix
        return Unit(node, source, True, area, 2 * area * weight.shape[1], 0, 0, numel)
    return Unit(node, source, True, area, 2 * applied * weight.numel() // shape[passage.axis], 0, 0, numel)


def _parameter_units(network: Network, node: fx.Node, counted: set[fx.Node]) -> list[Unit]:
    """Return the parameters with one number per channel that an operator reads by itself, or what comes of them."""
    found = network.channels
    result: list[Unit] = []
    if found[node].kind != "map":
        return result
    for constant in node.all_input_nodes:
        axis = parameter_axis(network, constant, node, found[node].axis) if constant in network.constants else None
        cut = cut_parameters(network, constant, axis) if axis is not None else None
        for root in cut or []:
            if root not in counted and is_parameter(network, root):
                counted.add(root)
                source = next(n for n in node.all_input_nodes if n is not constant)
                numel = torch.Size(network.shapes[root.name]).numel()
                result.append(Unit(node, source, True, 0, 0, 0, numel // found[node].width, 0))
    return result


def count(network: Network, plan: ChannelPlan | None = None) -> Counts:
    """Return the costs of the network, or of what slicing it by the plan leaves (liveness closed)."""
    return CostCounter(network).count(plan.kept if plan is not None else {})


class CostCounter:
    """Counts the costs of one network for many choices of channels."""

    def __init__(self, network: Network) -> None:
        self.network, self.found = network, network.channels
        self.units, self.loose = units(network), _loose(network)
        self.again = called_again(network)

    def count(self, kept: Mapping[str, Sequence[int]]) -> Counts:
        """Return the costs for kept channels by layer name (absent name: all), liveness closed."""
        held = held_channels(self.network, kept)
        return Counts(**{name: int(self._total(held, COSTS[name])) for name in COUNTED})

    def total(self, kept: Mapping[str, Sequence[int]], cost: Cost) -> float:
        """Return one cost alone, in its own unit."""
        return self._total(held_channels(self.network, kept), cost)

    def _total(self, held: Held, cost: Cost) -> float:
        total: float = 0
        again = dict[str, float]()  # a module that is called twice has its parameters once
        for unit in self.units:
            own, name = unit_cost(unit, held, cost), str(unit.node.target)
            if cost.of_parameters and name in self.again:
                again[name] = max(again.get(name, 0), own)
            else:
                total += own
        loose = sum(n for n, node in self.loose if _runs(node, held)) if cost.of_parameters else 0
        return total + sum(again.values()) + loose


def count_executed(network: Network) -> Counts:
    """Return the costs of everything that runs, also of zeros that fill up groups or widths."""
    volume = flops = 0
    for node in network.nodes:
        module = network.module_of(node)
        if node.op == "call_function" and node.target in COMPUTED:
            own = _computed(network, node)
            volume, flops = volume + own[0], flops + own[1]
        if isinstance(module, READERS):
            shape, weight = network.shapes[node.name], module.weight
            assert isinstance(weight, torch.Tensor)
            map_shape = network.shapes[node.all_input_nodes[0].name] if isinstance(module, TRANSPOSED) else shape
            positions = torch.Size(map_shape[1:-1] if isinstance(module, nn.Linear) else map_shape[2:]).numel()
            counted = len(shape) > 2
            volume += torch.Size(shape[1:]).numel() * counted
            flops += 2 * positions * weight.numel() * counted
    return Counts(volume=volume, flops=flops, params=sum(p.numel() for p in network.parameters()))


def loose_params(network: Network) -> int:
    """Return the number of parameters that the graph reads by themselves and that are not of single channels."""
    return sum(number for number, _ in _loose(network))


def _loose(network: Network) -> list[tuple[int, fx.Node]]:
    """Return these parameters: how many numbers each has, and the node that reads it."""
    found = network.channels
    named = dict(network.body.named_parameters())
    owned = {id(p) for node in network.nodes if node.op == "call_module" for p in module_parameters(network, node)}
    read = {str(node.target): node for node in network.nodes if node.op == "get_attr" and node.users}
    counted = set[fx.Node]()
    for node in found:
        _parameter_units(network, node, counted)
    single = {str(node.target) for node in counted}
    names = read.keys() & named.keys() - single
    return [(named[name].numel(), read[name]) for name in names if id(named[name]) not in owned]


def _runs(node: fx.Node, held: Held) -> bool:
    """Tell whether anything that is left reads a parameter."""
    return any(
        user.op == "output" or (bool(held[user].any()) if user in held else _runs(user, held)) for user in node.users
    )


def unit_cost(unit: Unit, held: Held, cost: Cost) -> float:
    """Return what a unit costs with the channels that are held."""
    rates, n_out = cost.rates(unit), int(held[unit.node].sum())
    pairs = 0 if not rates.per_pair else n_out if unit.alone else _pairs(unit, held)
    return rates.per_output * n_out + rates.per_pair * pairs + (rates.constant if n_out else 0)


def _pairs(unit: Unit, held: Held) -> int:
    outputs = held[unit.node].view(unit.groups, -1).sum(1)
    if unit.in_width is not None:
        return int(outputs.sum()) * (unit.in_width // unit.groups)
    return int((held[unit.source].view(unit.groups, -1).sum(1) * outputs).sum())


def _kind(network: Network, node: fx.Node) -> str:
    return type(network.module_of(node) or network.body).__name__


def layers(network: Network, plan: ChannelPlan | None = None) -> list[LayerCount]:
    """Return every operation with parameters as it is counted, in graph order."""
    held = held_channels(network, plan.kept if plan is not None else {})
    reasons = prunable(network)
    result = []
    for unit in units(network):
        name = str(unit.node.target) if not any(unit.whole) else unit.node.name
        reason = reasons.get(name, "")
        result.append(
            LayerCount(
                name=name,
                kind=str(unit.node.target) if any(unit.whole) else _kind(network, unit.node),
                in_channels=unit.in_width or (int(held[unit.source].sum()) if unit.source in held else 0),
                out_channels=int(held[unit.node].sum()),
                area=unit.area,
                **{metric: int(unit_cost(unit, held, COSTS[metric])) for metric in COUNTED},
                gated=name in reasons and not reason,
                reason=reason or (COMPUTED_REASON if any(unit.whole) else ""),
            )
        )
    return result
