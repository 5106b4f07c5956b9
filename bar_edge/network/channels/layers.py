"""Rules of modules: layers, norms, pools, and what surgery makes."""

from __future__ import annotations

import torch
from torch import fx, nn

from bar_edge.network.channels.elementwise import first_axis, same_axis
from bar_edge.network.channels.passage import (
    CONVOLUTIONS,
    TRANSPOSED,
    Link,
    Passage,
    Passages,
    identity,
    is_depthwise,
    is_whole,
    only_source,
    whole,
)
from bar_edge.network.leaves import Expand, MixedAdd, PartialNorm
from bar_edge.network.network import Network


def conv_rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of a convolution: it makes new channels, a depthwise one follows its input."""
    source, module = only_source(node, found), network.module_of(node)
    assert isinstance(module, CONVOLUTIONS + TRANSPOSED)
    if source is None or (found[source].axis != 1 and not is_whole(found[source])):
        return None
    if is_depthwise(module) and not is_whole(found[source]):
        made = torch.arange(module.out_channels)
        link = Link(source, made // (module.out_channels // module.in_channels), made)
        return Passage("map", 1, module.out_channels, (link,), module.bias is None)
    return Passage("read", 1, module.out_channels, groups=module.groups)


def linear_rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of a linear layer: along the channels it makes new ones, along another axis it mixes positions."""
    source, module = only_source(node, found), network.module_of(node)
    assert isinstance(module, nn.Linear)
    if source is None:
        return None
    last = len(network.shapes[source.name]) - 1
    if found[source].axis == last or is_whole(found[source]):
        return Passage("read", last, module.out_features)
    return identity(source, found, found[source].axis, module.bias is None)  # mixes positions, not channels


def instance_norm(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of a norm of each channel of each image."""
    module = network.module_of(node)
    assert isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
    return first_axis(not module.affine and not module.track_running_stats)(network, node, found)


def channel_norm(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of a norm over channels: GroupNorm along the second axis, LayerNorm along the last."""
    source, module = only_source(node, found), network.module_of(node)
    if source is None or is_whole(found[source]):
        return None if source is None else whole(network, node)
    rank = len(network.shapes[source.name])
    axis = rank - 1 if isinstance(module, nn.LayerNorm) else 1
    one_axis = not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1
    if isinstance(module, PartialNorm):
        axis = module.axis % rank
    return identity(source, found, axis, False, "norm") if found[source].axis == axis and one_axis else None


def prelu_rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of a slope for all channels or for each."""
    module = network.module_of(node)
    assert isinstance(module, nn.PReLU)
    return (same_axis if module.num_parameters == 1 else first_axis)(True)(network, node, found)


def operands(node: fx.Node) -> list[fx.Node]:
    """Return the two tensors that a MixedAdd adds, which may be one."""
    return [n for n in node.args[:2] if isinstance(n, fx.Node)]


def mixed_add_rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of a sum of different channels of a stream."""
    module = network.module_of(node)
    assert isinstance(module, MixedAdd)
    places = [torch.tensor(p, dtype=torch.int64) for p in (module.positions_a, module.positions_b)]
    links = [
        Link(s, torch.arange(len(p)), p)
        for s, p in zip(operands(node), places, strict=True)
        if not is_whole(found[s]) or found[s].width == len(p)
    ]
    return Passage("add", 1, module.width, tuple(links)) if len(links) == 2 else None


def expand_rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of channels put back to their places."""
    module, source = network.module_of(node), only_source(node, found)
    assert isinstance(module, Expand)
    if source is None or found[source].axis != module.axis or found[source].width != len(module.positions):
        return None
    places = torch.tensor(module.positions, dtype=torch.int64)
    return Passage("pick", module.axis, module.width, (Link(source, torch.arange(len(places)), places),))
