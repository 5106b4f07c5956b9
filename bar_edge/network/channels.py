"""Channel rules: how the channels of a tensor pass through every operator.

A `Passage` says along which axis a tensor carries channels, how many the dense network has there, and
from which channels of which inputs each of them comes. An operator without a rule is opaque: it gets its
inputs at full width (absent channels are zeros) and what it makes is always there.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from bar_edge.network.leaves import Expand, MixedAdd, PartialNorm
from bar_edge.network.movement import BROADCASTS, COPIES, MOVEMENTS, many_to_one, moved, numbered, one_to_one
from bar_edge.network.network import Network

aten = torch.ops.aten
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: modules that make new channels out of those they read
READERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)


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
        read     a convolution or linear layer: reads all of its input (of its group), makes new channels
        map      each channel comes from channels of one input, or of one of several (a concatenation)
        pick     a map that does nothing but choose and reorder channels
        norm     a map that takes statistics over the channels of its input
        add      a channel exists if it does in one of the inputs
        mul      a channel exists if it does in all of the inputs (products and quotients)
        spread   moved elements without an axis for their channels; links: where they come from
        opaque   no rule: inputs at full width, the result always there
    axis, width: where the channels lie and how many the dense network has. keeps_zero: a channel of zeros
    stays zero. groups: of a read, equal runs of inputs that feed equal runs of outputs.
    """

    kind: Literal["source", "read", "map", "pick", "norm", "add", "mul", "spread", "opaque"]
    axis: int
    width: int
    links: tuple[Link, ...] = ()
    keeps_zero: bool = True
    groups: int = 1


Passages = dict[fx.Node, Passage]
Rule = Callable[[Network, fx.Node, Passages], Passage | None]


def passages(network: Network) -> Passages:
    """Return the passage of every tensor of the graph, in graph order.

    A module that is called both on tensors that are there as a whole and on others has no rule.
    """
    again, refused = called_again(network), set[str]()
    while True:
        found = _passages(network, refused)
        calls = [(str(n.target), is_whole(p)) for n, p in found.items() if n.op == "call_module" and n.target in again]
        mixed = {name for name, whole in calls if whole and (name, False) in calls} - refused
        if not mixed:
            return found
        refused |= mixed


def _passages(network: Network, refused: set[str]) -> Passages:
    found: Passages = {}
    for node in network.nodes:
        shape = network.shapes.get(node.name)
        if node.op == "output" or is_constant(node) or shape is None or len(shape) < 2:
            continue
        if node.op == "placeholder":
            found[node] = Passage("source", 1, shape[1])
            continue
        module = network.module_of(node)
        rule = RULES.get(type(module) if module is not None else node.target)
        known = all(source in found or is_constant(source) for source in _tensors(network, node))
        known = known and not (node.op == "call_module" and str(node.target) in refused)
        found[node] = (rule(network, node, found) if rule and known else None) or Passage("opaque", 1, shape[1])
    return found


def is_constant(node: fx.Node) -> bool:
    """Tell whether a node is a parameter or buffer that the graph reads by itself, maybe in another shape."""
    if node.op == "get_attr":
        return True
    first = node.args[0] if node.args else None
    return (
        node.target in MOVEMENTS - BROADCASTS
        and node.all_input_nodes == [first]
        and is_constant(node.all_input_nodes[0])
    )


def is_depthwise(module: nn.Module | None) -> bool:
    """Tell whether a module is a convolution that filters every input channel alone."""
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels


def called_again(network: Network) -> set[str]:
    """Return the names of modules that are called more than once."""
    calls = Counter(str(node.target) for node in network.nodes if node.op == "call_module")
    return {name for name, number in calls.items() if number > 1}


def operands(node: fx.Node) -> list[fx.Node]:
    """Return the two tensors that a MixedAdd adds, which may be one."""
    return [n for n in node.args[:2] if isinstance(n, fx.Node)]


def attribute(network: Network, node: fx.Node) -> Tensor:
    """Return the parameter or buffer that a constant node reads, as a view if it is moved."""
    if node.op != "get_attr":
        return moved(node, attribute(network, node.all_input_nodes[0]), network.sizes, {})
    value = operator.attrgetter(str(node.target))(network.body)
    assert isinstance(value, Tensor)
    return value


def element_numbers(network: Network, node: fx.Node, numbers: Tensor) -> Tensor:
    """Return what a movement makes of the numbers of its input's elements."""
    constants = {n.name: attribute(network, n).cpu() for n in node.all_input_nodes if is_constant(n)}
    return moved(node, numbers, network.sizes, constants)


def numbers_from(network: Network, base: fx.Node, node: fx.Node) -> Tensor:
    """Return what the movements between two nodes make of the numbers of the first one's elements."""
    if node is base:
        return numbered(network.shapes[base.name])
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return element_numbers(network, node, numbers_from(network, base, source))


def _tensors(network: Network, node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source.name not in network.sizes]


# --------------------------------------------------------------------------------------------- rules

WHOLE = Passage("source", 1, 0)


def is_whole(passage: Passage) -> bool:
    """Tell whether a tensor is always there with all its channels."""
    return passage.kind in ("source", "opaque")


def _whole(network: Network, node: fx.Node) -> Passage:
    return dataclasses.replace(WHOLE, width=network.shapes[node.name][1])


def _identity(
    node: fx.Node,
    source: fx.Node,
    found: Passages,
    axis: int,
    keeps_zero: bool,
    kind: Literal["map", "norm"] = "map",
) -> Passage:
    every = torch.arange(found[source].width)
    return Passage(kind, axis, found[source].width, (Link(source, every, every),), keeps_zero)


def _source(node: fx.Node, found: Passages) -> fx.Node | None:
    """Return the one tensor that an operator works on, None if there are more or it has no axis of channels."""
    source = node.args[0]
    alone = isinstance(source, fx.Node) and source in found and node.all_input_nodes == [source]
    return source if alone and isinstance(source, fx.Node) and found[source].kind != "spread" else None


def _same_axis(keeps_zero: bool) -> Rule:
    """Rule of an operator on one tensor that works on each channel alone and keeps the channel axis."""

    def rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
        source = _source(node, found)
        if source is None or is_whole(found[source]):
            return None if source is None else _whole(network, node)
        axis, width = found[source].axis, found[source].width
        shape = network.shapes[node.name]
        if len(shape) != len(network.shapes[source.name]) or shape[axis] != width:
            return None
        return _identity(node, source, found, axis, keeps_zero)

    return rule


def _first_axis(keeps_zero: bool) -> Rule:
    """Rule of an operator that works on each index of axis 1 alone: pooling, per-channel modules."""

    def rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
        source = _source(node, found)
        if source is None or (found[source].axis != 1 and not is_whole(found[source])):
            return None
        return _same_axis(keeps_zero)(network, node, found)

    return rule


def _conv(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    source, module = _source(node, found), network.module_of(node)
    assert isinstance(module, CONVOLUTIONS + TRANSPOSED)
    if source is None or (found[source].axis != 1 and not is_whole(found[source])):
        return None
    if is_depthwise(module) and not is_whole(found[source]):
        made = torch.arange(module.out_channels)
        link = Link(source, made // (module.out_channels // module.in_channels), made)
        return Passage("map", 1, module.out_channels, (link,), module.bias is None)
    return Passage("read", 1, module.out_channels, groups=module.groups)


def _linear(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    source, module = _source(node, found), network.module_of(node)
    assert isinstance(module, nn.Linear)
    if source is None:
        return None
    last = len(network.shapes[source.name]) - 1
    if found[source].axis == last or is_whole(found[source]):
        return Passage("read", last, module.out_features)
    return _identity(node, source, found, found[source].axis, module.bias is None)  # mixes positions, not channels


def _instance_norm(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    module = network.module_of(node)
    assert isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
    return _first_axis(not module.affine and not module.track_running_stats)(network, node, found)


def _channel_norm(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    source, module = _source(node, found), network.module_of(node)
    if source is None or is_whole(found[source]):
        return None if source is None else _whole(network, node)
    rank = len(network.shapes[source.name])
    axis = rank - 1 if isinstance(module, nn.LayerNorm) else 1
    one_axis = not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1
    if isinstance(module, PartialNorm):
        axis = module.axis % rank
    return _identity(node, source, found, axis, False, "norm") if found[source].axis == axis and one_axis else None


def _prelu(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    module = network.module_of(node)
    assert isinstance(module, nn.PReLU)
    return (_same_axis if module.num_parameters == 1 else _first_axis)(True)(network, node, found)


def _reduce(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of a mean, sum or maximum over axes without channels."""
    source, dims = _source(node, found), node.args[1] if len(node.args) > 1 else None
    dims = (dims,) if isinstance(dims, int) else dims
    if source is None or not isinstance(dims, list | tuple) or not dims:
        return None
    rank, axis = len(network.shapes[source.name]), found[source].axis
    gone = {int(d) % rank for d in dims}
    if is_whole(found[source]):
        return _whole(network, node)
    if axis in gone or 0 in gone:
        return None
    keepdim = len(network.shapes[node.name]) == rank
    return _identity(node, source, found, axis if keepdim else axis - sum(d < axis for d in gone), True)


def _first_of_two(rule: Rule) -> Rule:
    """Rule of an operator that returns values and indices, of which only the values are read."""

    def first(network: Network, node: fx.Node, found: Passages) -> Passage | None:
        values = all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
        return rule(network, node, found) if values else None

    return first


def _over_positions(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of an operator along one axis without channels (softmax, cumsum): of each channel alone, f(0) != 0."""
    source, dim = _source(node, found), node.args[1]
    if source is None or not isinstance(dim, int):
        return None
    if dim % len(network.shapes[source.name]) in (0, found[source].axis) and not is_whole(found[source]):
        return None
    return _same_axis(False)(network, node, found)


def _pad(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    source, widths = _source(node, found), node.args[1]
    mode = node.args[2] if node.target is aten.pad.default and len(node.args) > 2 else "constant"
    value = node.args[-1] if len(node.args) == (4 if node.target is aten.pad.default else 3) else 0
    if source is None or not isinstance(widths, list | tuple):
        return None
    after = 2 * (len(network.shapes[source.name]) - 1 - found[source].axis)
    if any(widths[after : after + 2]):  # channels are moved
        return _whole(network, node) if is_whole(found[source]) else None
    return _same_axis(mode != "constant" or not value)(network, node, found)


def _cat(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    assert isinstance(parts, list | tuple)
    axis = int(dim) % len(network.shapes[node.name])  # type: ignore[arg-type]
    sources = [part for part in parts if isinstance(part, fx.Node) and part in found]
    if len(sources) < len(parts) or any(found[part].kind == "spread" for part in sources):
        return None
    if all(is_whole(found[part]) for part in sources):
        return _whole(network, node)
    if any(found[part].axis != axis for part in sources):
        return _join(network, node, found, sources, axis)
    links, offset = [], 0
    for part in sources:
        every = torch.arange(found[part].width)
        links.append(Link(part, every, every + offset))
        offset += found[part].width
    return Passage("map", axis, offset, tuple(links))


def _join(network: Network, node: fx.Node, found: Passages, parts: list[fx.Node], axis: int) -> Passage | None:
    """Join tensors along another axis than that of their channels: a channel exists if it does in one of them."""
    own = {(found[part].axis, found[part].width) for part in parts if not is_whole(found[part])}
    if len(own) != 1 or axis == 0 or (channels := own.pop())[0] == axis:
        return None
    if any(is_whole(found[part]) for part in parts):
        return _whole(network, node)
    every = torch.arange(channels[1])
    return Passage("add", *channels, tuple(Link(part, every, every) for part in parts))


def _elementwise(kind: Literal["add", "mul"]) -> Rule:
    """Rule of a sum, difference or product of two tensors, one of them maybe a parameter, broadcast or a number."""

    def rule(network: Network, node: fx.Node, found: Passages) -> Passage | None:
        a, b = node.args[:2]
        tensors = [x for x in (a, b) if isinstance(x, fx.Node) and x in found]
        constants = [x for x in (a, b) if isinstance(x, fx.Node) and is_constant(x)]
        if any(found[x].kind == "spread" for x in tensors):
            return None
        if len(tensors) == 2:
            return _two_tensors(network, node, found, kind, *tensors)
        if len(tensors) == 1 and constants and kind == "add" and is_whole(found[tensors[0]]):
            return _whole(network, node)
        if len(tensors) == 1 and constants:
            return _with_parameter(network, node, found, kind, tensors[0], constants[0])
        if len(tensors) == 1 and tensors[0] is a and isinstance(b, int | float):
            return _same_axis(kind == "mul" or b == 0)(network, node, found)
        return None

    return rule


def _two_tensors(
    network: Network, node: fx.Node, found: Passages, kind: Literal["add", "mul"], a: fx.Node, b: fx.Node
) -> Passage | None:
    rank, wide = len(network.shapes[node.name]), [x for x in (a, b) if not is_whole(found[x])]
    if not wide or (kind == "add" and len(wide) == 1):
        return _whole(network, node)
    axes = {found[x].axis + rank - len(network.shapes[x.name]) for x in wide}
    axis = axes.pop()
    width = network.shapes[node.name][axis]
    if axes or axis < 1 or (kind == "add" and any(found[x].width != width for x in wide)):
        return None
    if all(found[x].width != width for x in wide):  # a whole tensor is wider
        return None
    every = torch.arange(width)
    links = [Link(x, every if found[x].width == width else torch.zeros_like(every), every) for x in wide]
    return Passage(kind, axis, width, tuple(links))


def _with_parameter(
    network: Network, node: fx.Node, found: Passages, kind: Literal["add", "mul"], x: fx.Node, parameter: fx.Node
) -> Passage | None:
    if network.shapes[node.name] != network.shapes[x.name]:
        return None
    if is_whole(found[x]):
        return _whole(network, node)
    return _identity(node, x, found, found[x].axis, kind == "mul")


def parameter_axis(network: Network, parameter: Tensor, node: fx.Node, axis: int) -> int | None:
    """Return along which axis a parameter broadcast to a node's shape holds its channels, None if along none."""
    own = axis - (len(network.shapes[node.name]) - parameter.ndim)
    return own if own >= 0 and parameter.shape[own] > 1 else None


def has_pole(node: fx.Node) -> bool:
    """Tell whether an operator's value or slope at 0 is infinite: absent channels must not reach it as zeros."""
    if node.target is aten.pow.Tensor_Scalar:
        return float(node.args[1]) < 1  # type: ignore[arg-type]
    if node.target is aten.div.Tensor:
        return isinstance(node.args[1], fx.Node) and not is_constant(node.args[1])
    return node.target in POLES


def _mixed_add(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    module = network.module_of(node)
    assert isinstance(module, MixedAdd)
    places = [torch.tensor(p, dtype=torch.int64) for p in (module.positions_a, module.positions_b)]
    links = [
        Link(s, torch.arange(len(p)), p)
        for s, p in zip(operands(node), places, strict=True)
        if not is_whole(found[s]) or found[s].width == len(p)
    ]
    return Passage("add", 1, module.width, tuple(links)) if len(links) == 2 else None


def _expand(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    module, source = network.module_of(node), _source(node, found)
    assert isinstance(module, Expand)
    if source is None or found[source].axis != module.axis or found[source].width != len(module.positions):
        return None
    places = torch.tensor(module.positions, dtype=torch.int64)
    return Passage("pick", module.axis, module.width, (Link(source, torch.arange(len(places)), places),))


def _hardtanh(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    bounds: list[Any] = [-1, 1] if node.target is aten.hardtanh.default else [None, None]
    bounds[: len(node.args) - 1] = node.args[1:]
    low, high = bounds
    holds_zero = (low is None or low <= 0) and (high is None or high >= 0)
    return _same_axis(bool(holds_zero))(network, node, found)


def _movement(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    """Rule of all operators that only move elements: follow the elements' numbers.

    Where the channels are cut up (a shuffle by view and transpose) they are followed through the operators
    that move them on, until they lie along one axis again.
    """
    source = node.args[0]
    if not isinstance(source, fx.Node) or source not in found or not _known(network, node, source):
        return None
    if is_whole(found[source]):
        return _whole(network, node)
    spread = found[source].kind == "spread"
    base = found[source].links[0].source if spread else source
    shape, axis = network.shapes[base.name], found[base].axis
    numbers = numbers_from(network, base, node)
    axes = sorted(range(1, numbers.ndim), key=lambda i: (i != axis, i != 1, i != numbers.ndim - 1))
    singles = [(i, old) for i in axes if (old := one_to_one(numbers, shape, axis, i)) is not None]
    moves_on = bool(node.users) and all(user.target in MOVEMENTS | COPIES for user in node.users)
    if shape[axis] == 1 and singles and not spread:
        singles, moves_on = _where_one_lies(network, node, shape, axis, singles)
    for new_axis, old in sorted(singles, key=lambda single: len(torch.unique(single[1])) == 1):
        same = new_axis == axis and numbers.ndim == len(shape)
        same = same and torch.equal(numbered(shape).index_select(axis, old), numbers)
        if same or not spread:
            link = Link(base, old, torch.arange(len(old)))
            return Passage("pick" if same else "map", new_axis, len(old), (link,))
    if moves_on:
        every = torch.arange(found[base].width)
        return Passage("spread", 1, found[base].width, (Link(base, every, every),))
    pairs = [(i, sets) for i in axes if (sets := many_to_one(numbers, shape, axis, i)) is not None]
    if not pairs or spread:
        return None
    new_axis, sets = pairs[0]
    return Passage("map", new_axis, numbers.shape[new_axis], (Link(base, *sets),))


def _where_one_lies(
    network: Network, node: fx.Node, shape: tuple[int, ...], axis: int, singles: list[tuple[int, Tensor]]
) -> tuple[list[tuple[int, Tensor]], bool]:
    """Return the axis of a single channel, which its numbers do not tell: as it would be if there were two.

    Where that cannot be asked (sizes as numbers), any axis of length 1, and whether to decide later.
    """
    doubled = (*shape[:axis], 2, *shape[axis + 1 :])
    try:
        numbers = element_numbers(network, node, numbered(doubled))
        told_of = numbers.ndim == len(network.shapes[node.name])
    except RuntimeError:
        told_of = False
    if not told_of:
        later = bool(node.users) and all(user.target in MOVEMENTS | COPIES for user in node.users)
        ones = [(i, old) for i, old in singles if len(old) == 1]
        return (ones, False) if ones else ([], True) if later else (singles, False)
    found = [(i, one_to_one(numbers, doubled, axis, i)) for i, _ in singles]
    told = [i for i, old in found if old is not None and len(torch.unique(old)) == 2]
    return [(i, old) for i, old in singles if i in told] or singles, False


def _copied(network: Network, node: fx.Node, found: Passages) -> Passage | None:
    source = node.args[0]
    spread = isinstance(source, fx.Node) and source in found and found[source].kind == "spread"
    return (_movement if spread else _same_axis(True))(network, node, found)


def _known(network: Network, node: fx.Node, source: fx.Node) -> bool:
    return all(n is source or is_constant(n) or n.name in network.sizes for n in node.all_input_nodes)


PER_CHANNEL = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d]
PER_ELEMENT_ZERO = (
    "relu relu6 leaky_relu elu selu celu silu gelu mish tanh hardswish softsign abs neg square sqrt sin asin "
    "atan sinh asinh erf expm1 log1p sign round floor ceil trunc hardshrink softshrink tanhshrink rrelu "
    "_to_copy to.dtype type_as prelu"
)
PER_ELEMENT = "sigmoid hardsigmoid softplus exp cos cosh log_sigmoid rsub.Scalar rsqrt reciprocal log log2 log10"
POOLS = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d.fixed upsample_nearest1d.vec "
    "upsample_nearest2d.vec upsample_nearest3d.vec _upsample_nearest_exact1d.vec "
    "_upsample_nearest_exact2d.vec upsample_linear1d.vec upsample_bilinear2d.vec upsample_trilinear3d.vec "
    "upsample_bicubic2d.vec upsample_nearest1d upsample_nearest2d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d _upsample_bilinear2d_aa.vec reflection_pad1d reflection_pad2d reflection_pad3d "
    "replication_pad1d replication_pad2d replication_pad3d"
)
REDUCTIONS = "mean.dim sum.dim_IntList amax amin var.dim var.correction std.dim std.correction"
PAIRED_POOLS = (
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
    "max_pool3d_with_indices"
)


def _operators(names: str) -> list[object]:
    """Return the ATen operators of these names (the default overload unless one is named) that this torch has."""
    split = [name.partition(".")[::2] for name in names.split()]
    packets = [(getattr(aten, name, None), overload or "default") for name, overload in split]
    return [getattr(packet, overload) for packet, overload in packets if hasattr(packet, overload)]


#: functions of each element alone
ELEMENTWISE = {*_operators(f"{PER_ELEMENT_ZERO} {PER_ELEMENT} hardtanh clamp"), *COPIES}
POLES = set(_operators("sqrt rsqrt reciprocal log log2 log10"))
RULES: dict[object, Rule] = {
    **dict.fromkeys([*CONVOLUTIONS, *TRANSPOSED], _conv),
    nn.Linear: _linear,
    **dict.fromkeys([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d], _first_axis(False)),
    **dict.fromkeys([nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d], _instance_norm),
    **dict.fromkeys([nn.GroupNorm, nn.LayerNorm, PartialNorm], _channel_norm),
    **dict.fromkeys(PER_CHANNEL, _same_axis(True)),
    nn.PReLU: _prelu,
    MixedAdd: _mixed_add,
    Expand: _expand,
    **dict.fromkeys(_operators(PER_ELEMENT_ZERO), _same_axis(True)),
    **dict.fromkeys(_operators(PER_ELEMENT), _same_axis(False)),
    **dict.fromkeys(_operators(POOLS), _first_axis(True)),
    **dict.fromkeys(_operators(REDUCTIONS), _reduce),
    **dict.fromkeys(_operators("softmax.int _softmax cumsum log_softmax.int"), _over_positions),
    aten.pow.Tensor_Scalar: lambda network, node, found: _same_axis(float(node.args[1]) > 0)(network, node, found),  # type: ignore[arg-type]
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: _pad,
    **dict.fromkeys(_operators("hardtanh clamp"), _hardtanh),
    **dict.fromkeys(MOVEMENTS, _movement),
    **dict.fromkeys(COPIES, _copied),
    aten.cat.default: _cat,
    **dict.fromkeys([aten.add.Tensor, aten.sub.Tensor], _elementwise("add")),
    **dict.fromkeys([aten.mul.Tensor, aten.div.Tensor], _elementwise("mul")),
    **dict.fromkeys(_operators(PAIRED_POOLS), _first_of_two(_first_axis(True))),
    **dict.fromkeys(_operators("max.dim min.dim"), _first_of_two(_reduce)),
    operator.getitem: _same_axis(True),
}

#: leaves that surgery makes; they are not the user's operators
LEAVES = (MixedAdd, Expand, PartialNorm)
