"""How mixed additions run: from MixedAdd leaves to operators that a runtime has."""

from __future__ import annotations

import copy
import dataclasses

from torch import fx, nn

from bar_edge.lowering.forms.added import Added
from bar_edge.lowering.forms.blocks import Blocks
from bar_edge.lowering.forms.deferred import Deferred
from bar_edge.lowering.forms.paper import Paper
from bar_edge.lowering.packing import pack, packable
from bar_edge.lowering.placement import Placement, residual_streams, rounded_placements, stream_placements
from bar_edge.lowering.widen import widen
from bar_edge.lowering.writer import Writer
from bar_edge.network import Network
from bar_edge.network.channels import called_again
from bar_edge.network.graph_json import attach
from bar_edge.records.lowering import PLAIN, Form, Lowering, Packing, Rounding
from bar_edge.surgery.stream_order import Stream


def lower(network: Network, lowering: Lowering) -> Network:
    """Return an equal network without MixedAdd and Expand leaves, for inference in a runtime.

    Raises InputError for a lowering of another number of streams.
    """
    if lowering == Lowering.paper:
        return _literal(copy.deepcopy(network).eval())
    network = folded(network)
    streams = residual_streams(network)
    forms = list(lowering.each(len(streams)))
    sizes = _sizes(network, streams)
    packings = _packings(sizes, forms)
    while True:
        sized = zip(forms, sizes or [()], strict=True)  # without streams one form, of no size
        forms = [dataclasses.replace(form, packing=packings.get(size, PLAIN)) for form, size in sized]
        places: dict[fx.Node, Placement] = {}
        for stream, form in zip(streams, forms, strict=False):
            places |= stream_placements(network, stream, form)
        places |= rounded_placements(network, places, _roundings(network, streams, forms))
        lowered = _lowered(widen(network, places), forms)
        packed = {lowered.shapes[node.name][2:] for node in packable(lowered, packings)}
        if packed == packings.keys():
            return pack(lowered, packings)
        # widths of what cannot be packed are rounded as ever
        packings = {size: packing for size, packing in packings.items() if size in packed}


def stream_sizes(network: Network) -> list[tuple[int, ...]]:
    """Return the size of image of every residual stream, each of which may have a form of its own."""
    network = folded(network)
    return _sizes(network, residual_streams(network))


def folded(network: Network) -> Network:
    """Return a copy for inference in which every BatchNorm behind a convolution of its own is part of it."""
    network = copy.deepcopy(network).eval()
    body, again = network.body, called_again(network)
    for node in network.nodes:
        norm, source = network.module_of(node), node.all_input_nodes[0] if node.all_input_nodes else None
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or source is None or norm.running_mean is None:
            continue
        convolution = network.module_of(source)
        alone = len(source.users) == 1 and not {str(node.target), str(source.target)} & again
        if alone and isinstance(convolution, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            attach(body, str(source.target), nn.utils.fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(source)
            body.graph.erase_node(node)
    body.delete_all_unused_submodules()
    body.recompile()
    return Network(body, network.input_shapes, network.out_spec).eval()


def _roundings(network: Network, streams: list[Stream], forms: list[Form]) -> dict[fx.Node, Rounding]:
    """Return for every tensor the rounding of the stream that is added to next."""
    last = {max(stream.channels, key=network.nodes.index): i for i, stream in enumerate(streams)}
    roundings, current = {}, 0
    for node in network.nodes:
        roundings[node] = forms[min(current, len(forms) - 1)].filled
        current = max(current, last.get(node, -1) + 1)
    return roundings


def _sizes(network: Network, streams: list[Stream]) -> list[tuple[int, ...]]:
    return [network.shapes[next(iter(stream.channels)).name][2:] for stream in streams]


def _packings(sizes: list[tuple[int, ...]], forms: list[Form]) -> dict[tuple[int, ...], Packing]:
    """Return how the tensors of a size of image are packed: as the first stream of that size that is."""
    packings: dict[tuple[int, ...], Packing] = {}
    for size, form in zip(sizes, forms, strict=False):
        if len(size) == 2 and form.packing != PLAIN:
            packings.setdefault(size, form.packing)
    return packings


def _lowered(network: Network, forms: list[Form]) -> Network:
    """Copy a graph, its sums in the forms of its streams, the tensors of which are in place."""
    writer = Writer(network)
    streams = list(zip(residual_streams(network), forms, strict=False))
    form = {node: form for stream, form in streams for node in stream.channels}
    blocks = Blocks(writer, [stream for stream, form in streams if form.kind == "blocks"])
    return writer.run(blocks, Deferred(writer, form), Added(writer, form))


def _literal(network: Network) -> Network:
    writer = Writer(network)
    return writer.run(Paper(writer))
