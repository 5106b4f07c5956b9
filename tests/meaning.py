"""What a plan means, executed on the user's own module: the reference that masked and sliced networks must equal.

Every element of every tensor either exists or is absent; absent elements are 0. `Tracked` is a tensor that
knows which of its elements exist and carries that through torch's functions. Nothing here knows bar_edge's
channel rules: no graph, no analysis ahead, one function call after the other.

Where the channels of a tensor lie is read off its `labels`, which move as its elements do: the axis of the
channels is the first one along which labels differ. A tensor with one label only (a single channel, an input,
the result of an operator without a rule: it exists as a whole) fits every operator.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Kept = Mapping[str, Iterable[int]]
#: existence that broadcasts to an operator's result, and the axis of its channels counted from the end (or None)
Channels = tuple[Tensor, int | None]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def masked_answer(module: nn.Module, kept: Kept, *inputs: Tensor) -> Any:
    """Return the eval-mode answer of the user's module in which every absent channel is 0 wherever it is read.

    kept: name of a convolution or linear layer -> output channels that stay; inputs: (N, ...) each.
    """
    return masked_run(module, kept, *inputs)[0]


@torch.no_grad()
def masked_run(module: nn.Module, kept: Kept, *inputs: Tensor) -> tuple[Any, dict[str, int]]:
    """Return the masked answer and how many output channels of every layer exist in any of its calls."""
    layers = {name: m for name, m in module.named_modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))}
    run = Run({id(layers[name].weight): tuple(ids) for name, ids in kept.items()}, {})
    module.eval()
    answer = module(*(track(x, torch.ones(()), None, run) for x in inputs))
    widths = {name: int(run.existing[id(m.weight)].sum()) for name, m in layers.items() if id(m.weight) in run.existing}
    return pytree.tree_map(plain, answer), widths


@dataclasses.dataclass(frozen=True)
class Run:
    """One execution: kept channels by the identity of a layer's weight, and which channels existed in a call."""

    kept: dict[int, tuple[int, ...]]
    existing: dict[int, Tensor]

    def made(self, weight: Tensor, fed: Tensor) -> Tensor:
        """Return which output channels of a layer exist (0 or 1), given which of them have a live input."""
        mask = fed.clone()
        if id(weight) in self.kept:
            mask[[o for o in range(len(fed)) if o not in self.kept[id(weight)]]] = 0
        self.existing[id(weight)] = torch.maximum(mask, self.existing.get(id(weight), mask))
        return mask


class Tracked(Tensor):
    """A tensor whose elements exist (1) or are absent (0), with the labels of their channels, each of its shape."""

    exists: Tensor
    labels: Tensor
    run: Run

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs or {})


def plain(value: Any) -> Any:
    """Return the values of a tracked tensor; anything else as it is."""
    return value.as_subclass(Tensor) if isinstance(value, Tracked) else value


def track(value: Tensor, exists: Tensor, axis: int | None, run: Run) -> Tracked:
    """Return the tensor with absent elements set to 0, its channels along `axis` from the end (None: one label)."""
    value = value.masked_fill(exists.expand(value.shape) == 0, 0)
    labels = torch.zeros(()) if axis is None else torch.arange(value.shape[axis]).view(-1, *[1] * (-axis - 1))
    return _carry(value, _beside(value, exists), _beside(value, labels), run)


def _beside(value: Tensor, numbers: Tensor) -> Tensor:
    """Return numbers broadcast to the shape of a value, in memory of the same order, so that views fit both."""
    return torch.empty_like(value, dtype=torch.float64).copy_(numbers)


def _carry(value: Tensor, exists: Tensor, labels: Tensor, run: Run) -> Tracked:
    result = value.as_subclass(Tracked)
    result.exists, result.labels, result.run = exists, labels, run
    return result


def channel_axes(x: Tracked) -> list[int]:
    """Return the first axis along which labels differ, counted from the end, and others whose labels are all apart.

    There are several where channels are cut into groups. One channel that several were moved into (a pixel shuffle of
    four channels) counts as one label.
    """
    axes = [axis for axis in range(x.labels.ndim) if (x.labels != x.labels.narrow(axis, 0, 1)).any()]
    one = len(axes) > 1 and x.shape[1] == 1
    apart = [axis for i, axis in enumerate(axes) if i == 0 or _apart(x.labels.movedim(axis, 0))]
    return [] if one else [axis - x.labels.ndim for axis in apart]


def _apart(rows: Tensor) -> bool:
    """Tell whether no label is in two rows."""
    labels = torch.cat([torch.unique(row) for row in rows])
    return len(torch.unique(labels)) == len(labels)


def channel_axis(x: Tracked) -> int | None:
    """Return the first axis along which labels differ, None if all are the same."""
    return next(iter(channel_axes(x)), None)


def lasting_axis(call: Call, gone: set[int]) -> int | None:
    """Return the first axis of channels that an operator over some axes (from the start) leaves alone."""
    return next((axis for axis in channel_axes(call.x) if axis + call.x.ndim not in gone), None)


def settled(x: Tracked) -> Tensor:
    """Return the existence of whole channels: a channel exists if any of its elements does. x's shape."""
    return settled_along(x, channel_axis(x))


def settled_along(x: Tracked, axis: int | None) -> Tensor:
    """Return the same for channels along an axis; None: all elements are one channel."""
    ndim = x.exists.ndim
    others = [a for a in range(ndim) if axis is None or a != axis + ndim]
    return x.exists.amax(others, keepdim=True).expand(x.exists.shape) if others else x.exists


# ------------------------------------------------------------------------------------------- one call


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a function of torch: its name without underscores, its arguments and its result, untracked."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor

    @property
    def x(self) -> Tracked:
        """The first tensor that is tracked."""
        return self.tracked[0]

    @property
    def tracked(self) -> list[Tracked]:
        return [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tracked)]

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """Return an argument by position or by one of its names."""
        named = [self.kwargs[name] for name in names if name in self.kwargs]
        return named[0] if named else self.args[position] if len(self.args) > position else default


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    full_name = func.__name__ if func.__name__ not in ("__get__", "__set__") else func.__self__.__name__  # type: ignore[attr-defined]  # a property's
    name = full_name.strip("_")
    tracked = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tracked)]

    def of(part: Callable[[Any], Any]) -> Any:
        new_args, new_kwargs = pytree.tree_map(lambda v: part(v) if isinstance(v, Tracked) else v, (args, kwargs))
        return func(*new_args, **new_kwargs)

    if name in MOVEMENTS:
        moved = [of(part) for part in (plain, lambda t: t.exists, lambda t: t.labels)]
        if isinstance(moved[0], tuple | list):
            return type(moved[0])(_carry(v, e, labels, tracked[0].run) for v, e, labels in zip(*moved, strict=True))
        value, exists, labels = moved
        return _carry(value, exists, labels, tracked[0].run)
    if name in COPIES:
        value = of(plain)
        return _carry(value, _beside(value, args[0].exists), _beside(value, args[0].labels), args[0].run)
    result = of(plain)
    if name in MAKERS:
        return result  # of the tensor it takes only the type
    assert full_name not in ("__setitem__", "__set__"), f"{name}: writing into a part of a tensor has no meaning here"
    if not any(isinstance(t, Tensor) for t in pytree.tree_leaves(result)):
        return result  # a shape, a size, a type
    pair = name in RULES and not isinstance(result, Tensor)  # values and their indices, of one shape
    if not isinstance(result, Tensor) and not pair:
        return pytree.tree_map_only(Tensor, lambda t: track(t, torch.ones(()), None, tracked[0].run), result)
    call = Call(name, args, kwargs, result[0] if pair else result)
    exists, axis = RULES.get(name, _opaque)(call)
    if pair:
        return type(result)([track(t, exists, axis, tracked[0].run) for t in result])
    made = track(result, exists, axis, tracked[0].run)
    if kwargs.get("inplace") or (full_name.endswith("_") and not full_name.startswith("__")):
        return _write(args[0], made)
    return made


def _write(x: Tracked, made: Tracked) -> Tracked:
    """Let an operator in place change x, and what shares memory with x."""
    x.as_subclass(Tensor).copy_(made.as_subclass(Tensor))
    x.exists.copy_(made.exists)
    x.labels = made.labels
    return x


# --------------------------------------------------------------------------------------------- rules

Rule = Callable[[Call], Channels]


def _opaque(call: Call) -> Channels:
    return torch.ones(()), None


def _channelwise(call: Call) -> Channels:
    """The channels of x, at the same place from the start; other sizes may differ or be gone (`_reduction`)."""
    return _follow(call, channel_axis(call.x), channel_axis(call.x))


def _follow(call: Call, before: int | None, axis: int | None) -> Channels:
    """The channels of x, which lie along one of its axes, along an axis of the result."""
    x = settled_along(call.x, before)
    if before is None or axis is None:
        return x.flatten()[0], None
    along = x.movedim(before, 0).flatten(1)[:, 0]
    return along.view(-1, *[1] * (-axis - 1)), axis


def _on_axis_1(call: Call) -> Channels:
    """Operators that take axis 1 for the channels: pools, norms, interpolation."""
    axis = channel_axis(call.x)
    return _channelwise(call) if axis in (None, 1 - call.x.ndim) else _opaque(call)


def _convolution(call: Call) -> Channels:
    x, weight, groups = call.x, call.argument(1, "weight"), call.argument(6, "groups", default=1)
    axis, outputs = 1 - call.result.ndim, call.result.shape[1]
    if channel_axis(x) not in (None, axis) or isinstance(weight, Tracked):
        return _opaque(call)
    alive = settled(x).movedim(1, 0).flatten(1)[:, 0]
    fed = alive.view(groups, -1).amax(1).repeat_interleave(outputs // groups)
    return x.run.made(weight, fed).view(-1, *[1] * (-axis - 1)), axis


def _linear(call: Call) -> Channels:
    """Along the channels it makes new ones; along another axis it mixes positions of each channel alone."""
    x, weight = call.x, call.argument(1, "weight")
    if isinstance(weight, Tracked):
        return _opaque(call)
    if channel_axis(x) not in (None, -1):
        return _channelwise(call)
    return x.run.made(weight, settled(x).max().expand(call.result.shape[-1])), -1


def _binary(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Channels]:
    """Two operands, broadcast: numbers and parameters leave the channels of the other one as they are."""

    def rule(call: Call, given: list[Tracked] | None = None) -> Channels:
        tracked = call.tracked if given is None else given
        given_axes = [set(axes) for axes in map(channel_axes, tracked) if axes]
        common = set.intersection(*given_axes) if given_axes else set()
        if given_axes and not common:
            return _opaque(call)
        axis = min(common, default=None)
        settle = [settled_along(t, axis if channel_axes(t) else None) for t in tracked]
        return functools.reduce(combine, settle), axis

    return rule


def _choice(call: Call) -> Channels:
    """where, masked_fill: exists where one of its tensors does; a condition without channels decides nothing."""
    condition = call.argument(0, "condition") if call.name == "where" else call.argument(1, "mask")
    chosen = [t for t in call.tracked if t is not condition]
    decides = isinstance(condition, Tracked) and (channel_axis(condition) is not None or not chosen)
    return _binary(torch.maximum)(call, [*chosen, condition] if decides else chosen) if call.tracked else _opaque(call)


def _halves(call: Call) -> Channels:
    """glu: along the channels, exists where both halves do."""
    dim, axis = call.argument(1, "dim", default=-1), channel_axis(call.x)
    if axis is None or dim % call.x.ndim != axis + call.x.ndim:
        return _channelwise(call)
    first, second = settled(call.x).chunk(2, axis)
    return torch.minimum(first, second), axis


def _one_tensor(call: Call) -> Channels:
    """A power, bounds that are numbers; of another tensor there is no rule."""
    return _channelwise(call) if len(call.tracked) == 1 and call.args[0] is call.x else _opaque(call)


def _reduction(call: Call) -> Channels:
    """Mean, sum, largest over space; over channels, over the batch or over everything there is no rule."""
    dims, ndim = call.argument(1, "dim", "axis"), call.x.ndim
    gone = {d % ndim for d in ([dims] if isinstance(dims, int) else dims or range(ndim))}
    axis = lasting_axis(call, gone)
    if 0 in gone or (axis is None and channel_axis(call.x) is not None):
        return _opaque(call)
    if axis is None or call.result.ndim == ndim:
        return _follow(call, axis, axis)
    return _follow(call, axis, axis + sum(d > axis + ndim for d in gone))


def _largest(call: Call) -> Channels:
    """Along an axis as a reduction; of two tensors it exists where either does."""
    two = isinstance(call.argument(1, "dim", "other"), Tensor)
    return _binary(torch.maximum)(call) if two else _reduction(call)


def _along(call: Call) -> Channels:
    """Softmax or sums along one axis of space; along channels or batch there is no rule."""
    dim, ndim = call.argument(1, "dim"), call.x.ndim
    axis = lasting_axis(call, {dim % ndim})
    lost = axis is None and channel_axis(call.x) is not None
    return _opaque(call) if lost or dim % ndim == 0 else _follow(call, axis, axis)


def _prelu(call: Call) -> Channels:
    return _channelwise(call) if call.argument(1, "weight").numel() == 1 else _on_axis_1(call)


def _layer_norm(call: Call) -> Channels:
    """Over channels that lie last; over channels and space together there is no rule."""
    return _channelwise(call) if len(call.argument(1, "normalized_shape")) == 1 else _opaque(call)


def _pad(call: Call) -> Channels:
    """Along space; padded channels have no rule."""
    amounts, axis = call.argument(1, "pad"), channel_axis(call.x)
    touched = {-1 - i // 2 for i, amount in enumerate(amounts) if amount}
    if axis is None:
        return _channelwise(call) if 1 - call.x.ndim not in touched else _opaque(call)
    return _channelwise(call) if axis not in touched else _opaque(call)


def _cat(call: Call) -> Channels:
    parts, dim = _parts(call)
    axes = {axis for axis in (channel_axis(p) for p in parts if isinstance(p, Tracked)) if axis is not None}
    if len(axes) > 1:
        return _opaque(call)
    joined = torch.cat([settled(p) if isinstance(p, Tracked) else torch.ones(p.shape) for p in parts], dim)
    axis = axes.pop() if axes else 1 - joined.ndim
    if dim - joined.ndim == axis:
        return joined, axis
    others = [a for a in range(joined.ndim) if a != axis + joined.ndim]
    return joined.amax(others, keepdim=True), axis


def _stack(call: Call) -> Channels:
    """A new axis: a channel exists if it does in any part."""
    parts, dim = _parts(call)
    axes = {channel_axis(p) for p in parts if isinstance(p, Tracked)} - {None}
    if len(axes) > 1:
        return _opaque(call)
    exists = torch.stack([settled(p) if isinstance(p, Tracked) else torch.ones(p.shape) for p in parts], dim)
    axis = axes.pop() if axes else None
    if axis is not None and dim > axis + call.result.ndim - 1:
        axis -= 1
    return exists.amax(dim, keepdim=True), axis


def _parts(call: Call) -> tuple[list[Tensor], int]:
    dim = call.argument(1, "dim", "axis", default=0)
    return list(call.argument(0, "tensors")), dim % call.result.ndim


#: which functions a rule is for; all others are opaque
_FUNCTIONS: dict[Rule, str] = {
    _channelwise: """relu relu6 leaky_relu elu selu celu silu gelu mish tanh hardtanh hardswish sigmoid hardsigmoid
        softplus threshold softsign logsigmoid tanhshrink softshrink hardshrink abs neg exp expm1 log1p sqrt
        square sin cos erf rsub rsqrt reciprocal log log2 log10 rdiv rtruediv
        zeros_like ones_like full_like dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout
        feature_alpha_dropout""",
    _layer_norm: "layer_norm",
    _choice: "where masked_fill",
    _halves: "glu",
    _one_tensor: "pow ipow clamp clamp_min clamp_max clip",
    _on_axis_1: """batch_norm instance_norm group_norm interpolate upsample max_pool1d max_pool2d max_pool3d avg_pool1d
        avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
        adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices
        max_pool3d_with_indices""",
    _convolution: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    _linear: "linear",
    _binary(torch.maximum): """add radd iadd sub isub subtract maximum minimum fmax fmin gt lt ge le eq ne greater less
        greater_equal less_equal""",
    _binary(torch.minimum): "mul rmul imul multiply div truediv itruediv true_divide",
    _reduction: "mean sum amax amin var std",
    _largest: "max min",
    _along: "softmax log_softmax cumsum",
    _prelu: "prelu",
    _pad: "pad",
    _cat: "cat concat concatenate",
    _stack: "stack",
}
RULES = {name: rule for rule, names in _FUNCTIONS.items() for name in names.split()}
#: functions that only move elements: applied to existence and labels just as to values
_MOVEMENTS = """view reshape flatten unflatten permute transpose swapaxes swapdims movedim moveaxis T mT t chunk split
    split_with_sizes tensor_split unsafe_chunk unsafe_split unbind select narrow index_select getitem squeeze unsqueeze
    expand expand_as view_as reshape_as repeat tile repeat_interleave flip roll pixel_shuffle pixel_unshuffle
    channel_shuffle"""
#: functions that move nothing
_COPIES = "clone contiguous detach data to type type_as float double half bfloat16 cpu cuda"
#: functions that make a tensor of numbers
MAKERS = set(["new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"])
MOVEMENTS, COPIES = set(_MOVEMENTS.split()), set(_COPIES.split())
