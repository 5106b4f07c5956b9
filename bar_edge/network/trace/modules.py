"""Operations with parameters become nn modules: how each is built from an exported call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from bar_edge.network.trace.refusals import arguments, calling_module

aten = torch.ops.aten


class Builder(Protocol):
    """What is known of the weights of the network that is being built."""

    def is_weight(self, value: object) -> bool:
        """Tell whether an argument is a parameter, a buffer or computed of such alone."""

    def tensor(self, node: fx.Node) -> Tensor:
        """Return our copy of a weight, one per original tensor; parameters stay parameters."""

    def parameter(self, node: fx.Node) -> nn.Parameter:
        """Return that copy as a parameter, a frozen one of what is none in the original."""

    def owner(self, call: fx.Node, weight: fx.Node, leaf: str = "weight") -> tuple[str, nn.Module | None]:
        """Return the dotted module name that a weight of a call belongs to, and that module in the original."""


Made = tuple[str, nn.Module] | None


def no_module(builder: Builder, node: fx.Node) -> Made:
    """Return None: an operator without weights."""
    return None


def _fill(builder: Builder, module: nn.Module, weights: dict[str, Any]) -> nn.Module:
    for name, node in weights.items():
        if node is not None:
            learns = name in module._parameters
            setattr(module, name, builder.parameter(node) if learns else builder.tensor(node))
    return module


def _conv(builder: Builder, node: fx.Node) -> Made:
    a = arguments(node)
    if not all(v is None or builder.is_weight(v) for v in (a["weight"], a["bias"])):
        return None
    weight = builder.tensor(a["weight"])
    kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
    dims = weight.ndim - 2

    def spread(value: Any) -> Any:
        return value if isinstance(value, str) else tuple(value) * (dims if len(value) == 1 else 1)

    module = kind(
        weight.shape[1] * a["groups"],
        weight.shape[0],
        tuple(weight.shape[2:]),  # type: ignore[arg-type]
        spread(a["stride"]),
        spread(a["padding"]),
        spread(a["dilation"]),
        a["groups"],
        a["bias"] is not None,
        device="meta",  # the user's tensors take its place: nothing is drawn
    )
    return builder.owner(node, a["weight"])[0], _fill(builder, module, {"weight": a["weight"], "bias": a["bias"]})


def _batch_norm(builder: Builder, node: fx.Node) -> Made:
    a = arguments(node)
    tensors = {name: a[name] for name in ("weight", "bias", "running_mean", "running_var")}
    if tensors["running_mean"] is None or not all(v is None or builder.is_weight(v) for v in tensors.values()):
        return None
    if is_frozen_norm(builder, node):
        return None
    name, original = builder.owner(node, tensors["running_mean"], "running_mean")
    momentum = original.momentum if isinstance(original, nn.modules.batchnorm._BatchNorm) else a["momentum"]
    width = builder.tensor(tensors["running_mean"]).shape[0]
    kind = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(node.meta["val"].ndim, nn.BatchNorm1d)
    module = kind(width, a["eps"], momentum, affine=tensors["weight"] is not None)
    if isinstance(original, nn.modules.batchnorm._BatchNorm) and original.num_batches_tracked is not None:
        module.num_batches_tracked = original.num_batches_tracked.detach().clone()
    return name, _fill(builder, module, tensors)


def is_frozen_norm(builder: Builder, node: fx.Node) -> bool:
    """Tell whether a batch_norm is called on buffers alone, by no BatchNorm: its statistics stay in training too."""
    a = arguments(node)
    tensors = [a[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if not all(builder.is_weight(tensor) for tensor in tensors):
        return False
    original = builder.owner(node, a["running_mean"], "running_mean")[1]
    by_hand = not isinstance(original, nn.modules.batchnorm._BatchNorm)
    return by_hand and not any(isinstance(builder.tensor(tensor), nn.Parameter) for tensor in tensors)


def _linear(builder: Builder, node: fx.Node) -> Made:
    a = arguments(node)
    if not all(v is None or builder.is_weight(v) for v in (a["weight"], a["bias"])):
        return None
    out_features, in_features = builder.tensor(a["weight"]).shape
    module = nn.Linear(in_features, out_features, bias=a["bias"] is not None, device="meta")
    return builder.owner(node, a["weight"])[0], _fill(builder, module, {"weight": a["weight"], "bias": a["bias"]})


def _matmul(builder: Builder, node: fx.Node) -> Made:
    """A product with a matrix of weights is a linear layer; a matrix that something else reads too stays as it is."""
    x, matrix = node.args[:2]
    if not builder.is_weight(matrix) or len(matrix.users) > 1 or matrix.meta["val"].ndim != 2:  # type: ignore[union-attr]
        return None
    if x.meta["val"].ndim < 2:  # type: ignore[union-attr]
        return None
    weight = builder.parameter(matrix)  # type: ignore[arg-type]
    module = nn.Linear(weight.shape[0], weight.shape[1], bias=False, device="meta")
    module.weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    return builder.owner(node, matrix)[0], module  # type: ignore[arg-type]


def _prelu(builder: Builder, node: fx.Node) -> Made:
    a = arguments(node)
    if not builder.is_weight(a["weight"]):
        return None
    module = nn.PReLU(builder.tensor(a["weight"]).numel())
    return builder.owner(node, a["weight"])[0], _fill(builder, module, {"weight": a["weight"]})


def _group_norm(builder: Builder, node: fx.Node) -> Made:
    a = arguments(node)
    width = node.meta["val"].shape[1]
    return _norm(builder, node, nn.GroupNorm(a["num_groups"], width, a["eps"], affine=a["weight"] is not None))


def _layer_norm(builder: Builder, node: fx.Node) -> Made:
    a = arguments(node)
    shape, affine, bias = tuple(a["normalized_shape"]), a["weight"] is not None, a["bias"] is not None
    return _norm(builder, node, nn.LayerNorm(shape, a["eps"], elementwise_affine=affine, bias=bias))


def _instance_norm(builder: Builder, node: fx.Node) -> Made:
    a = arguments(node)
    kinds = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
    kind, width = kinds.get(node.meta["val"].ndim), node.meta["val"].shape[1]
    if kind is None:
        return None
    affine, tracked = a["weight"] is not None, a["running_mean"] is not None
    return _norm(builder, node, kind(width, a["eps"], a["momentum"], affine=affine, track_running_stats=tracked))


def _norm(builder: Builder, node: fx.Node, module: nn.Module) -> Made:
    """Name a norm after its weight, or after the module that called it if it has none."""
    a = arguments(node)
    weights = {name: a.get(name) for name in ("weight", "bias", "running_mean", "running_var")}
    if not all(v is None or builder.is_weight(v) for v in weights.values()):
        return None
    if weights["running_mean"] is not None:
        return builder.owner(node, weights["running_mean"], "running_mean")[0], _fill(builder, module, weights)
    if weights["weight"] is None:
        if weights["bias"] is not None:
            return None
        return f"{calling_module(node) or 'functional'}_{node.name}".replace(".", "_"), module
    return builder.owner(node, weights["weight"])[0], _fill(builder, module, weights)


def _dropout(builder: Builder, node: fx.Node) -> Made:
    owner, a = calling_module(node) or "functional", arguments(node)
    if a["train"]:  # on in eval mode too: the user wants noise always
        return None
    kinds = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}
    channels = node.target in (aten.feature_dropout.default, aten.feature_dropout_.default)
    kind = kinds.get(node.meta["val"].ndim) if channels else nn.Dropout
    return (f"{owner}_{node.name}".replace(".", "_"), kind(a["p"])) if kind is not None else None


def _conv_transpose(builder: Builder, node: fx.Node) -> Made:
    a = arguments(node)
    if not all(v is None or builder.is_weight(v) for v in (a["weight"], a["bias"])):
        return None
    weight = builder.tensor(a["weight"])
    kind = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}[weight.ndim]
    dims = weight.ndim - 2
    spread: dict[str, Any] = {
        name: tuple(a[name]) * (dims if len(a[name]) == 1 else 1)
        for name in ("stride", "padding", "output_padding", "dilation")
    }
    channels, kernel = (weight.shape[0], weight.shape[1] * a["groups"]), tuple(weight.shape[2:])
    module = kind(*channels, kernel, groups=a["groups"], bias=a["bias"] is not None, **spread)  # type: ignore[arg-type]
    return builder.owner(node, a["weight"])[0], _fill(builder, module, {"weight": a["weight"], "bias": a["bias"]})


MODULE_BUILDERS: dict[object, Callable[[Builder, fx.Node], Made]] = {
    aten.conv1d.default: _conv,
    aten.conv1d.padding: _conv,
    aten.conv2d.default: _conv,
    aten.conv2d.padding: _conv,
    aten.conv3d.default: _conv,
    aten.conv3d.padding: _conv,
    aten.batch_norm.default: _batch_norm,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.prelu.default: _prelu,
    aten.group_norm.default: _group_norm,
    aten.layer_norm.default: _layer_norm,
    aten.instance_norm.default: _instance_norm,
    aten.dropout.default: _dropout,
    aten.feature_dropout.default: _dropout,
    aten.conv_transpose1d.default: _conv_transpose,
    aten.conv_transpose2d.input: _conv_transpose,
    aten.conv_transpose3d.input: _conv_transpose,
}
