"""How one tensor gets its channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, fx, nn

from bar_edge.network.network import Network

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: modules that make new channels out of those they read
READERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)


Kind = Literal["source", "made", "read", "map", "pick", "norm", "add", "any", "mul", "spread", "opaque"]


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """Channels of an input that feed channels of the output: source[inputs[i]] -> output[outputs[i]]."""

    source: fx.Node
    inputs: Tensor
    outputs: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """How one tensor gets its channels.

    kind:
        source   always there as a whole, whatever the axis (an input of the network, what comes of it alone)
        made     the same, of nothing but weights, numbers and the size of the batch
        read     a convolution or linear layer: reads all of its input (of its group), makes new channels
        map      each channel comes from channels of one input, or of one of several (a concatenation)
        pick     a map that does nothing but choose and reorder channels
        norm     a map that takes statistics over the channels of its input
        add      a channel exists if it does in one of the inputs
        any      the same of what is no sum: the larger of two tensors, a choice between them
        mul      a channel exists if it does in all of the inputs (products and quotients)
        spread   moved elements without an axis for their channels; links: where they come from
        opaque   no rule: inputs at full width, the result always there
    axis, width: where the channels lie and how many the dense network has. keeps_zero: a channel of zeros
    stays zero. groups: of a read, equal runs of inputs that feed equal runs of outputs.
    """

    kind: Kind
    axis: int
    width: int
    links: tuple[Link, ...] = ()
    keeps_zero: bool = True
    groups: int = 1


Passages = dict[fx.Node, Passage]
Rule = Callable[[Network, fx.Node, Passages], Passage | None]


def is_whole(passage: Passage) -> bool:
    """Tell whether a tensor is always there with all its channels."""
    return passage.kind in ("source", "made", "opaque")


def whole(network: Network, node: fx.Node) -> Passage:
    """Return the passage of a tensor that is always there."""
    return Passage("source", 1, network.shapes[node.name][1])


def identity(
    source: fx.Node,
    found: Passages,
    axis: int,
    keeps_zero: bool,
    kind: Literal["map", "norm"] = "map",
) -> Passage:
    """Return the passage of a tensor with the channels of another one, at an axis of its own."""
    every = torch.arange(found[source].width)
    return Passage(kind, axis, found[source].width, (Link(source, every, every),), keeps_zero)


def only_source(node: fx.Node, found: Passages) -> fx.Node | None:
    """Return the one tensor that an operator works on, None if there are more or it has no axis of channels."""
    source = node.args[0]
    alone = isinstance(source, fx.Node) and source in found and node.all_input_nodes == [source]
    return source if alone and isinstance(source, fx.Node) and found[source].kind != "spread" else None


def operators(names: str) -> list[object]:
    """Return the ATen operators of these names (the default overload unless one is named) that this torch has."""
    split = [name.partition(".")[::2] for name in names.split()]
    packets = [(getattr(torch.ops.aten, name, None), overload or "default") for name, overload in split]
    return [getattr(packet, overload) for packet, overload in packets if hasattr(packet, overload)]


def is_depthwise(module: nn.Module | None) -> bool:
    """Tell whether a module is a convolution that filters every input channel alone."""
    return isinstance(module, CONVOLUTIONS + TRANSPOSED) and 1 < module.groups == module.in_channels
