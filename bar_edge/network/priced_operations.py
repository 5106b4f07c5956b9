"""Which operations of a network a latency table prices, and by which widths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from bar_edge.errors import InputError
from bar_edge.network.channels import READERS, TRANSPOSED
from bar_edge.network.liveness import held_channels
from bar_edge.network.network import Network
from bar_edge.records.latency_table import Kind, LatencyTable

#: operations whose price is scaled as that of a layer
LAYERS = ("conv", "transposed", "linear", "depthwise", "clip")
_VIEWS = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "permute", "transpose", "dropout", "clone", "expand"}


#: a tensor, and the sum that it goes into
Pair = tuple[fx.Node, fx.Node]


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """One operation, priced by the widths of some tensors.

    It is there if one of the pairs in `mixed` differs in its numbers of channels (if there are any), and none of
    those in `whole` does; and, with `full`, if that tensor's width needs no rounding.
    """

    kind: Kind
    tensors: tuple[fx.Node, ...]
    mixed: tuple[Pair, ...] = ()
    whole: tuple[Pair, ...] = ()
    full: fx.Node | None = None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All tensors whose widths matter."""
        pairs = (node for pair in (*self.mixed, *self.whole) for node in pair)
        return (*self.tensors, *pairs, *((self.full,) if self.full else ()))


def operations(network: Network) -> list[Operation]:
    """Return what a runtime executes, in graph order.

    A BatchNorm behind a convolution is part of it, an activation part of the layer or norm before it;
    what works on vectors (N, channels) is left to the constant, linear layers excepted.
    """
    found = network.channels
    result = []
    mixed_by: dict[fx.Node, tuple[Pair, ...]] = {}  # which pairs make a stream leave the layout of convolutions
    made_by: dict[fx.Node, str] = {}  # what kind of operation makes a tensor, fused ones passed through
    for node, passage in found.items():
        module, sources = network.module_of(node), [n for n in node.all_input_nodes if n in found]
        if not sources or passage.kind in ("source", "made"):
            continue
        source = sources[0]
        shape = tuple(network.shapes[source.name][2:])
        before = made_by.get(source, "")
        alone = len(source.users) == 1
        if isinstance(module, READERS):
            kind = _layer(module, passage.kind == "map", shape)
            tensors = (node,) if kind.op == "depthwise" else (source, node)
            if before == "layer" and shape:
                result.append(Operation(Kind(op="handover", shape=shape), (source,)))
            result.append(Operation(kind, tensors))
            made_by[node] = "layer"
        elif str(node.target).split(".")[-2:-1] and str(node.target).split(".")[1] in _VIEWS:
            made_by[node] = before
        elif passage.kind == "add":
            addend = ([n for n in sources if made_by.get(n) == "layer"] or sources)[-1]
            others = [(n, node) for n in sources if n is not addend]
            earlier = tuple(pair for n in sources for pair in mixed_by.get(n, ()))
            mixed_by[node] = (*earlier, (addend, node), *others)
            if shape:
                result += _addition(shape, (addend, node), others, earlier)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            folded = isinstance(network.module_of(source), READERS) and alone
            if shape and not folded:
                result.append(Operation(Kind(op="norm", shape=shape), (node,)))
            made_by[node] = "layer" if folded else "norm"
        elif before and alone and network.shapes[node.name] == network.shapes[source.name]:
            if before == "layer" and shape and node.target is not torch.ops.aten.relu.default:
                result.append(Operation(Kind(op="clip", shape=shape), (source,)))
            made_by[node] = before
        elif shape:
            behind = mixed_by.get(source, ()) if network.shapes[node.name] == network.shapes[source.name] else ()
            result.append(Operation(Kind(op="each", shape=shape), (source,), behind if alone else ()))
            mixed_by[node] = behind
    return result


def _addition(shape: tuple[int, ...], own: Pair, others: list[Pair], earlier: tuple[Pair, ...]) -> list[Operation]:
    """Return what an addition may take; nothing where a convolution adds what has always had the same channels."""
    add, whole, pad = (Kind(op=op, shape=shape) for op in ("add", "sum", "pad"))
    found = [Operation(add, own, (own,)), Operation(pad, own[:1], (own,), full=own[0])]  # no filter of zeros to spare
    found += [Operation(pad, other[1:], (other,)) for other in others]  # channels that are new to the stream
    return found + ([Operation(whole, own[1:], earlier, (own,))] if earlier else [])


def _layer(module: nn.Module, depthwise: bool, shape: tuple[int, ...]) -> Kind:
    if isinstance(module, nn.Linear):
        return Kind(op="linear")
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED))
    return Kind(
        op="depthwise" if depthwise else "transposed" if isinstance(module, TRANSPOSED) else "conv",
        kernel=tuple(module.kernel_size),
        stride=max(module.stride),
        dilation=max(module.dilation),
        groups=1 if depthwise else module.groups,
        shape=shape,
    )


def largest_widths(network: Network) -> dict[Kind, tuple[int, ...]]:
    """Return every kind of operation with the largest widths that a table must hold."""
    found, largest = network.channels, dict[Kind, tuple[int, ...]]()
    for operation in operations(network):
        widths = tuple(found[node].width for node in operation.tensors)
        largest[operation.kind] = tuple(map(max, widths, largest.get(operation.kind, widths)))
    return largest


class PricedOperations(nn.Module):
    """Adds up the prices of operations whose widths stand in a vector.

    place: where in the vector a tensor's width stands. Raises InputError for what the table does not hold.
    """

    def __init__(self, table: LatencyTable, priced: Sequence[Operation], place: Callable[[fx.Node], int]) -> None:
        super().__init__()
        self.table = table
        groups: dict[tuple[Kind, bool], list[Operation]] = {}
        for operation in priced:
            groups.setdefault((operation.kind, bool(operation.mixed)), []).append(operation)
        missing = [str(kind) for kind, _ in groups if str(kind) not in table.prices]
        if missing:
            raise InputError(
                "a latency table of this network's operations",
                got=f"one of {table.model or 'another network'} without {', '.join(missing[:3])}",
                consequence="nothing was started",
                remedy="`bar-edge profile` with this --model",
            )
        self.groups: list[tuple[bool, int, bool]] = []
        for i, ((kind, conditional), members) in enumerate(groups.items()):
            prices = table.prices[str(kind)]
            sizes = [len(axis) for axis in prices.widths]
            places = [[place(node) for node in operation.tensors] for operation in members]
            self.register_buffer(f"places_{i}", torch.tensor(places), persistent=False)
            self.register_buffer(f"ms_{i}", torch.tensor(prices.ms, dtype=torch.float64).view(sizes), persistent=False)
            for j, axis in enumerate(prices.widths):
                self.register_buffer(f"knots_{i}_{j}", torch.tensor(axis, dtype=torch.float64), persistent=False)
            if conditional:
                self._conditions(i, members, place)
            self.groups.append((kind.op in LAYERS, len(sizes), conditional))

    def _conditions(self, i: int, members: list[Operation], place: Callable[[fx.Node], int]) -> None:
        """Store the places of pairs, (operations, pairs, 2), and of tensors that must be full, -1 for none."""
        for name in ("mixed", "whole"):
            pairs = [[[place(node) for node in pair] for pair in getattr(operation, name)] for operation in members]
            most = max(map(len, pairs))
            alike = [own + [[0, 0]] * (most - len(own)) for own in pairs]  # a pair of one tensor never differs
            self.register_buffer(
                f"{name}_{i}", torch.tensor(alike, dtype=torch.int64).view(len(members), most, 2), persistent=False
            )
        full = [place(operation.full) if operation.full else -1 for operation in members]
        self.register_buffer(f"full_{i}", torch.tensor(full), persistent=False)

    def forward(self, widths: Tensor, *, stepped: bool) -> Tensor:
        """Return the latency in ms (...).

        widths: (..., n) float64 numbers of channels. stepped: as the hardware takes them, rounded up; otherwise
        interpolated between its steps, which is differentiable.
        """
        layers, rest = self.parts(widths, stepped=stepped)
        return self.table.layer_scale * layers + self.table.rest_scale * rest + self.table.constant_ms

    def parts(self, widths: Tensor, *, stepped: bool) -> tuple[Tensor, Tensor]:
        """Return the summed prices of layers and of all else in ms, before they are scaled."""
        given, filled = widths, _up(widths, self.table.rounding)
        if stepped:
            widths = torch.where(filled <= self.table.step, filled, _up(filled, self.table.step))
        layers = rest = widths.new_zeros(widths.shape[:-1])
        for i, (is_layer, axes, conditional) in enumerate(self.groups):
            own = widths[..., getattr(self, f"places_{i}")]
            values: Tensor = getattr(self, f"ms_{i}")
            first, t = _locate(getattr(self, f"knots_{i}_0"), own[..., 0])
            if axes == 1:
                found = torch.lerp(values[first], values[first + 1], t)
            else:
                second, u = _locate(getattr(self, f"knots_{i}_1"), own[..., 1])
                low = torch.lerp(values[first, second], values[first, second + 1], u)
                high = torch.lerp(values[first + 1, second], values[first + 1, second + 1], u)
                found = torch.lerp(low, high, t)
            if conditional:
                found = found * self._there(i, given, filled, stepped)
            layers, rest = (layers + found.sum(-1), rest) if is_layer else (layers, rest + found.sum(-1))
        return layers, rest

    def _there(self, i: int, widths: Tensor, filled: Tensor, stepped: bool) -> Tensor:
        """Return which operations of a group are there; of expected widths, which hardly ever agree, mixed ones."""
        full: Tensor = getattr(self, f"full_{i}")
        mixed, whole = (filled[..., getattr(self, f"{name}_{i}")] for name in ("mixed", "whole"))
        if not stepped:
            return (full < 0) & (whole.shape[-2] == 0)
        differ = (mixed[..., 0] != mixed[..., 1]).any(-1) & (whole[..., 0] == whole[..., 1]).all(-1)
        return differ & ((full < 0) | (filled == widths)[..., full])


class LatencyCounter:
    """Prices one network for many choices of channels."""

    def __init__(self, network: Network, table: LatencyTable) -> None:
        self.network, self.found, self.table = network, network.channels, table
        self.operations = operations(network)
        self.nodes = list(dict.fromkeys(node for operation in self.operations for node in operation.nodes))
        place = {node: i for i, node in enumerate(self.nodes)}
        self.priced = PricedOperations(table, self.operations, place.__getitem__)

    def widths(self, kept: Mapping[str, Sequence[int]]) -> Tensor:
        """Return the numbers of channels that are there, (tensors,), liveness closed."""
        held = held_channels(self.network, kept)
        return torch.tensor([int(held[node].sum()) for node in self.nodes], dtype=torch.float64)

    def ms(self, kept: Mapping[str, Sequence[int]]) -> float:
        """Return the latency for kept channels by layer name (absent name: all) in ms, liveness closed."""
        return float(self.priced(self.widths(kept), stepped=True))


def _up(widths: Tensor, multiple: int) -> Tensor:
    return torch.ceil(widths / multiple) * multiple


def _locate(knots: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Return between which knots widths lie, and where between them; beyond the last one they count as that."""
    first = (torch.searchsorted(knots, widths.detach().contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
    return first, ((widths - knots[first]) / (knots[first + 1] - knots[first])).clamp(max=1)
