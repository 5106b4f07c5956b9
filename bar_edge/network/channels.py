"""Channel rules: how the channels of a tensor pass through every operator.

A `Passage` says along which axis a tensor carries channels, how many the dense network has there, and
from which channels of which inputs each of them comes. An operator without a rule is opaque: it gets its
inputs at full width (absent channels are zeros) and what it makes is always there.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, fx, nn

from bar_edge.network.mixed import Expand, MixedAdd
from bar_edge.network.network import Network

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """Channels of an input that feed channels of the output: source[inputs[i]] -> output[outputs[i]]."""

    source: fx.Node
    inputs: Tensor
    outputs: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """How one tensor gets its channels.

    kind: source (always there), read (a convolution or linear layer: reads all of its input, makes new
    channels), map (each channel comes from one channel of an input), add (channels of several inputs are
    summed), opaque (no rule). axis, width: where the channels lie and how many the dense network has.
    keeps_zero: a channel of zeros stays zero.
    """

    kind: Literal["source", "read", "map", "add", "opaque"]
    axis: int
    width: int
    links: tuple[Link, ...] = ()
    keeps_zero: bool = True


Passages = dict[fx.Node, Passage]
Rule = Callable[[Network, fx.Node, Passages], Passage | None]


def passages(network: Network) -> Passages:
    """Return the passage of every tensor of the graph, in graph order."""
    calls = Counter(str(node.target) for node in network.nodes if node.op == "call_module")
    found: Passages = {}
    for node in network.nodes:
        shape = network.shapes.get(node.name)
        if node.op in ("output", "get_attr") or shape is None or len(shape) < 2:
            continue
        if node.op == "placeholder":
            found[node] = Passage("source", 1, shape[1])
            continue
        module = network.module_of(node)
        rule = RULES.get(type(module) if module is not None else node.target)
        known = all(source in found for source in node.all_input_nodes)
        passage = rule(network, node, found) if rule and known and calls[str(node.target)] <= 1 else None
        found[node] = passage or Passage("opaque", 1, shape[1])
    return found


def is_depthwise(module: nn.Module | None) -> bool:
    """Tell whether a module is a convolution with one filter per input channel."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and (
        1 < module.groups == module.in_channels == module.out_channels
    )


# --------------------------------------------------------------------------------------------- rules


def _identity(node: fx.Node, source: fx.Node, found: Passages, axis: int, keeps_zero: bool) -> Passage:
    every = torch.arange(found[source].width)
    return Passage("map", axis, found[source].width, (Link(source, every, every),), keeps_zero)


def _same_axis(keeps_zero: bool) -> Rule:
    """Rule of an operator on one tensor that works on each channel alone and keeps the channel axis."""

    def rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(node.all_input_nodes) != 1:
            return None
        axis, width = found[source].axis, found[source].width
        shape = network.shapes[node.name]
        if len(shape) != len(network.shapes[source.name]) or shape[axis] != width:
            return None
        return _identity(node, source, found, axis, keeps_zero)

    return rule


def _pool(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return _same_axis(True)(network, node, found) if found[source].axis == 1 else None


def _norm(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return _same_axis(False)(network, node, found) if found[source].axis == 1 else None


def _conv(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    source, module = node.args[0], network.module_of(node)
    assert isinstance(source, fx.Node) and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if found[source].axis != 1:
        return None
    if is_depthwise(module):
        return _identity(node, source, found, 1, module.bias is None)
    return Passage("read", 1, module.out_channels) if module.groups == 1 else None


def _linear(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    source, module = node.args[0], network.module_of(node)
    assert isinstance(source, fx.Node) and isinstance(module, nn.Linear)
    last = len(network.shapes[source.name]) - 1
    return Passage("read", last, module.out_features) if found[source].axis == last else None


def _mean(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    source, dims = node.args[0], node.args[1] if len(node.args) > 1 else None
    if not isinstance(source, fx.Node) or not isinstance(dims, list | tuple) or not dims:
        return None
    rank, axis = len(network.shapes[source.name]), found[source].axis
    gone = {int(d) % rank for d in dims}
    if axis in gone or 0 in gone:
        return None
    keepdim = len(network.shapes[node.name]) == rank
    return _identity(node, source, found, axis if keepdim else axis - sum(d < axis for d in gone), True)


def _flatten(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    source = node.args[0]
    start = node.args[1] if len(node.args) > 1 else 0
    end = node.args[2] if len(node.args) > 2 else -1
    assert isinstance(source, fx.Node)
    shape = network.shapes[source.name]
    if found[source].axis != 1 or start != 1 or end not in (-1, len(shape) - 1):
        return None
    area = torch.Size(shape[2:]).numel()
    width = found[source].width * area
    link = Link(source, torch.arange(width) // area, torch.arange(width))
    return Passage("map", 1, width, (link,))


def _cat(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    assert isinstance(parts, list | tuple)
    axis = int(dim) % len(network.shapes[node.name])  # type: ignore[arg-type]
    links, offset = [], 0
    for part in parts:
        assert isinstance(part, fx.Node)
        if found[part].axis != axis:
            return None
        every = torch.arange(found[part].width)
        links.append(Link(part, every, every + offset))
        offset += found[part].width
    return Passage("map", axis, offset, tuple(links))


def _add(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    a, b = node.args[:2]
    if not isinstance(b, fx.Node):
        return _same_axis(bool(b == 0))(network, node, found)
    if not isinstance(a, fx.Node) or node.kwargs or network.shapes[a.name] != network.shapes[b.name]:
        return None
    if found[a].axis != 1 or found[b].axis != 1:
        return None
    every = torch.arange(found[a].width)
    return Passage("add", 1, found[a].width, (Link(a, every, every), Link(b, every, every)))


def _mixed_add(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    module = network.module_of(node)
    assert isinstance(module, MixedAdd)
    places = [torch.tensor(p, dtype=torch.int64) for p in (module.positions_a, module.positions_b)]
    links = [Link(s, torch.arange(len(p)), p) for s, p in zip(node.all_input_nodes, places, strict=True)]
    return Passage("add", 1, module.width, tuple(links))


def _times_number(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    return None if isinstance(node.args[1], fx.Node) else _same_axis(True)(network, node, found)


def _hardtanh(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    low, high = (*node.args[1:], -1, 1)[:2] if len(node.args) < 3 else node.args[1:3]
    holds_zero = (low is None or low <= 0) and (high is None or high >= 0)  # type: ignore[operator]
    return _same_axis(bool(holds_zero))(network, node, found)


RULES: dict[object, Rule] = {
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm1d: _norm,
    nn.BatchNorm2d: _norm,
    nn.BatchNorm3d: _norm,
    nn.Dropout: _same_axis(True),
    nn.Dropout1d: _same_axis(True),
    nn.Dropout2d: _same_axis(True),
    nn.Dropout3d: _same_axis(True),
    MixedAdd: _mixed_add,
    aten.relu.default: _same_axis(True),
    aten.relu6.default: _same_axis(True),
    aten.leaky_relu.default: _same_axis(True),
    aten.elu.default: _same_axis(True),
    aten.silu.default: _same_axis(True),
    aten.gelu.default: _same_axis(True),
    aten.mish.default: _same_axis(True),
    aten.tanh.default: _same_axis(True),
    aten.hardswish.default: _same_axis(True),
    aten.hardtanh.default: _hardtanh,
    aten.sigmoid.default: _same_axis(False),
    aten.hardsigmoid.default: _same_axis(False),
    aten.softplus.default: _same_axis(False),
    aten.clone.default: _same_axis(True),
    aten.contiguous.default: _same_axis(True),
    aten.max_pool1d.default: _pool,
    aten.max_pool2d.default: _pool,
    aten.avg_pool2d.default: _pool,
    aten.adaptive_avg_pool2d.default: _pool,
    aten.mean.dim: _mean,
    aten.flatten.using_ints: _flatten,
    aten.cat.default: _cat,
    aten.add.Tensor: _add,
    aten.mul.Tensor: _times_number,
}

#: leaves that surgery makes; they are not the user's operators
LEAVES = (MixedAdd, Expand)
