"""Every kind of step as a module, and a network made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tests.network.random_networks.case import Case, Shape, Step


class Apply(nn.Module):
    """A function of tensors, without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


class PerChannel(nn.Module):
    """x * p or x + p for a parameter p of one number per channel, written in one of the ways people write it."""

    def __init__(self, x: Shape, how: str, form: str) -> None:
        super().__init__()
        width, ones = x[-1] if form == "last" else x[1], [1] * (len(x) - 2)
        shape = {"thin": [width, *ones], "full": [1, width, *ones]}.get(form, [width])
        self.values, self.how, self.view = nn.Parameter(torch.rand(shape) + 0.5), how, form == "viewed"

    def forward(self, x: Tensor) -> Tensor:
        p = self.values.view(1, -1, *[1] * (x.ndim - 2)) if self.view else self.values
        return x * p if self.how == "scale" else p + x


class Unused(nn.Module):
    """An identity that owns a layer which is never called."""

    def __init__(self, x: Shape) -> None:
        super().__init__()
        self.auxiliary = _layer("Conv", x)(x[1], 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x


def _layer(name: str, x: Shape) -> Any:
    return getattr(nn, f"{name}{max(1, len(x) - 2)}d")


def _conv(
    x: Shape,
    out: int,
    k: int = 3,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = True,
    mode: str = "zeros",
) -> nn.Module:
    groups, padding = math.gcd(x[1], out, groups), dilation * (k - 1) // 2
    conv = _layer("Conv", x)
    return conv(x[1], out, k, stride, padding, dilation, groups, bias, mode if padding < min(x[2:]) else "zeros")


def _depthwise(x: Shape, times: int = 1, k: int = 3, stride: int = 1, bias: bool = True) -> nn.Module:
    return _layer("Conv", x)(x[1], times * x[1], k, stride, k // 2, groups=x[1], bias=bias)


def _transposed(x: Shape, out: int, k: int = 2, stride: int = 2, groups: int = 1, bias: bool = True) -> nn.Module:
    groups = math.gcd(x[1], out, groups)
    return _layer("ConvTranspose", x)(x[1], out, k, stride, padding=k // 3, groups=groups, bias=bias)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu method": lambda x: x.relu(),
    "relu in place": lambda x: F.relu(x, inplace=True),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "elu": F.elu,
    "selu": F.selu,
    "tanh": torch.tanh,
    "abs": torch.abs,
    "product": lambda x: x * torch.sigmoid(x),
    "quotient": lambda x: x / (1 + x.abs()),
    "the larger of it and 0": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "bounded below": lambda x: x.clamp_min(-0.2),
    "a slope below 0": lambda x: torch.where(x > 0, x, 0.2 * x),
    "times its sign": lambda x: x * (x > 0),
    "filter response norm": lambda x: (
        x * torch.rsqrt(x.square().mean(tuple(range(2, x.ndim)), True) + 0.1) if x.ndim > 2 else x
    ),
    # f(0) != 0
    "sigmoid": torch.sigmoid,
    "sigmoid in place": lambda x: x.sigmoid_(),
    "hardsigmoid": F.hardsigmoid,
    "softplus": F.softplus,
    "exp": lambda x: torch.exp(torch.clamp(x, -3.0, 2.0)),
    "clamp away from 0": lambda x: torch.clamp(x, 0.25, 3.0),
    "cos": torch.cos,
    "threshold": lambda x: F.threshold(x, 0.1, 0.4),
    "filled": lambda x: x.masked_fill(x <= 0, 0.3),
    "plus": lambda x: x + 0.5,
    "plus in place": lambda x: x.add_(0.5),
    "minus": lambda x: 1 - x,
    "divided": lambda x: x / 3,
    "logarithm": lambda x: torch.log(x.abs() + 0.5),
    "reciprocal": lambda x: 1 / (x.abs() + 1),
}
FROM_ZERO = [
    "sigmoid",
    "sigmoid in place",
    "hardsigmoid",
    "softplus",
    "exp",
    "clamp away from 0",
    "cos",
    "threshold",
    "filled",
    "plus",
    "minus",
    "logarithm",
    "reciprocal",
]


def _group_norm(x: Shape, groups: int, affine: bool = True) -> nn.Module:
    return nn.GroupNorm(math.gcd(x[1], groups), x[1], affine=affine)


def _instance_norm(x: Shape, affine: bool = True, running: bool = False) -> nn.Module:
    return _layer("InstanceNorm", x)(x[1], affine=affine, track_running_stats=running)


def _piece(x: Shape, sizes: list[int], how: str) -> nn.Module:
    """Cut the channels into parts of the given sizes; the last part takes what is left."""
    sizes = [*sizes[:-1], x[1] - sum(sizes[:-1])]
    assert min(sizes) > 0
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    if how == "chunk":
        return Apply(lambda t: t.chunk(len(sizes), 1))
    if how == "split":
        return Apply(lambda t: torch.split(t, sizes, dim=1))
    return Apply(lambda t: tuple(t[:, end - size : end] for end, size in zip(ends, sizes, strict=True)))


def _channel_shuffle(x: Shape, groups: int, how: str) -> nn.Module:
    groups = math.gcd(x[1], groups)

    def by_view(t: Tensor) -> Tensor:
        n, c, *space = t.shape
        return t.view(n, groups, c // groups, *space).transpose(1, 2).contiguous().view(n, c, *space)

    def by_reshape(t: Tensor) -> Tensor:
        return t.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)

    def by_parts(t: Tensor) -> Tensor:
        n, c, *space = t.shape
        return torch.cat(t.reshape(n, c // groups, groups, *space).unbind(2), 1)

    function = lambda t: F.channel_shuffle(t, groups)  # noqa: E731
    return Apply({"view": by_view, "reshape": by_reshape, "parts": by_parts}.get(how, function))


def _pixel_shuffle(x: Shape, how: str) -> nn.Module:
    assert x[1] % 4 == 0

    def by_view(t: Tensor) -> Tensor:
        n, c, h, w = t.shape
        return t.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)

    return Apply(by_view if how == "view" else lambda t: F.pixel_shuffle(t, 2))


def _pixel_unshuffle(x: Shape, how: str) -> nn.Module:
    def by_slices(t: Tensor) -> Tensor:
        return torch.cat([t[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)

    return Apply(by_slices if how == "slices" else lambda t: F.pixel_unshuffle(t, 2))


def _pool(x: Shape, how: str, k: int, stride: int, ceil: bool) -> nn.Module:
    return _layer(how, x)(k, stride, k // 2 if stride == 1 else 0, ceil_mode=ceil)


def _squeeze(x: Shape, how: str) -> nn.Module:
    space = tuple(range(2, len(x)))
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda t: t.mean(space, keepdim=True),
        "sum": lambda t: t.sum(space, keepdim=True) / 8,
        "largest": lambda t: t.amax(space, keepdim=True),
        "features": lambda t: t.mean(space),
        "largest with its place": lambda t: t.flatten(2).max(2)[0],
        "view": lambda t: t.view(t.size(0), t.size(1), -1).mean(-1),
    }
    return Apply(functions[how]) if how in functions else _layer(how, x)(1)


def _to_map(x: Shape, rank: int, how: str) -> nn.Module:
    assert len(x) == 2
    if how == "view":
        return Apply(lambda t: t.view(t.shape[0], x[1], *[1] * (rank - 2)))
    return Apply(lambda t: t[(..., *[None] * (rank - 2))])


def _resize(x: Shape, like: Shape, how: str) -> nn.Module:
    """Bring a map to the size of another one."""
    assert len(x) == len(like)
    linear = {3: "linear", 4: "bilinear", 5: "trilinear"}[len(x)]
    if how == "linear":
        return Apply(lambda t, other: F.interpolate(t, size=other.shape[2:], mode=linear, align_corners=False))
    if how == "pool":
        return Apply(
            lambda t, other: [F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d][len(x) - 3](
                t, like[2:]
            )
        )
    if how == "pad":  # negative: crop
        return Apply(
            lambda t, _other: F.pad(t, [v for a, b in zip(x[:1:-1], like[:1:-1], strict=True) for v in (0, b - a)])
        )
    return Apply(lambda t, other: F.interpolate(t, size=other.shape[2:]))


def _upsample(x: Shape, how: str) -> nn.Module:
    if how == "nearest":
        return nn.Upsample(scale_factor=2)
    linear = {3: "linear", 4: "bilinear", 5: "trilinear"}[len(x)]
    return Apply(lambda t: F.interpolate(t, scale_factor=1.5, mode=linear, align_corners=how == "corners"))


def _pad(x: Shape, amounts: list[int], mode: str, value: float = 0.0) -> nn.Module:
    return Apply(lambda t: F.pad(t, amounts, mode, value if mode == "constant" else None))


def _take(x: Shape, how: str, number: int) -> nn.Module:
    """Some of the channels, by slicing and its relatives."""
    number = min(number, x[1] - 1)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "first": lambda t: t[:, :number],
        "last": lambda t: t[:, -number:],
        "every second": lambda t: t[:, ::2],
        "narrow": lambda t: t.narrow(1, 1, number),
        "select": lambda t: t[:, number].unsqueeze(1),
    }
    assert number > 0
    return Apply(functions[how])


def _move(x: Shape, how: str) -> nn.Module:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "flip channels": lambda t: t.flip(1),
        "flip": lambda t: torch.flip(t, (-1,)),
        "roll channels": lambda t: t.roll(1, 1),
        "roll": lambda t: torch.roll(t, 2, -1),
        "repeat": lambda t: t.repeat(1, 2, *[1] * (len(x) - 2)),
        "there and back": lambda t: (
            t.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).reshape(t.shape[0], *x[1:])
        ),
        "swap": lambda t: t.transpose(-1, -2) if len(x) > 3 else t,
        "expand": lambda t: t.mean(-1, keepdim=True).expand(-1, -1, *x[2:]),
    }
    return Apply(functions[how])


KINDS: dict[str, Callable[..., nn.Module]] = {
    "conv": _conv,
    "depthwise": _depthwise,
    "transposed": _transposed,
    "linear": lambda x, out, bias=True: nn.Linear(x[-1], out, bias),
    "batch_norm": lambda x, affine=True: _layer("BatchNorm", x)(x[1], affine=affine),
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "layer_norm": lambda x, affine=True: nn.LayerNorm(x[-1], elementwise_affine=affine),
    "map_norm": lambda x: nn.LayerNorm(x[1:]),
    "act": lambda x, how: Apply(ACTIVATIONS[how]),
    "prelu": lambda x, each=True: nn.PReLU(x[1] if each else 1),
    "per_channel": PerChannel,
    "dropout": lambda x, whole=False: _layer("Dropout", x)(0.2) if whole and len(x) > 2 else nn.Dropout(0.2),
    "add": lambda a, b: Apply(lambda s, t: s + t),
    "add_": lambda a, b: Apply(lambda s, t: s.add_(t)),
    "sub": lambda a, b: Apply(torch.sub),
    "mul": lambda a, b: Apply(lambda s, t: s * t),
    "cat": lambda *xs: Apply(lambda *ts: torch.cat(ts, 1)),
    "cat_space": lambda *xs: Apply(lambda *ts: torch.cat(ts, -1)),
    "stack_sum": lambda *xs: Apply(lambda *ts: torch.stack(ts, 1).sum(1)),
    "split": _piece,
    "take": _take,
    "move": _move,
    "channel_shuffle": _channel_shuffle,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "pool": _pool,
    "adaptive": lambda x, how, size: _layer(how, x)(size),
    "squeeze": _squeeze,
    "to_map": _to_map,
    "resize": _resize,
    "upsample": _upsample,
    "pad": _pad,
    "to_last": lambda x: Apply(lambda t: t.movedim(1, -1) if len(x) != 4 else t.permute(0, 2, 3, 1)),
    "to_first": lambda x: Apply(lambda t: t.movedim(-1, 1) if len(x) != 4 else t.permute(0, 3, 1, 2)),
    "flatten": lambda x, how="module": nn.Flatten() if how == "module" else Apply(lambda t: t.reshape(t.shape[0], -1)),
    "unflatten": lambda x, shape: Apply(lambda t: t.view(-1, *shape)),
    "unused": Unused,
    "maximum": lambda a, b: Apply(torch.maximum),
    "glu": lambda x: Apply(lambda t: F.glu(t, 1)),
    # without a rule, on purpose
    "softmax": lambda x: nn.Softmax(1),
    "channel_mean": lambda x: Apply(lambda t: t.mean(1, keepdim=True)),
    "cumsum": lambda x: Apply(lambda t: t.cumsum(1)),
}


class RandomNetwork(nn.Module):
    """The network of a case; a layer's name is its step's name."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.steps, self.outputs = case.steps, case.outputs
        tensors: dict[str, Any] = {f"x{i}": torch.zeros(2, *shape) for i, shape in enumerate(case.shapes)}
        for step in case.steps:
            given = [_part(tensors, source) for source in step.sources]
            if step.kind != "again":
                self.add_module(step.name, KINDS[step.kind](*(tuple(t.shape) for t in given), **step.options).eval())
            with torch.no_grad():
                tensors[step.name] = self._module(step)(*given)
        assert all(isinstance(_part(tensors, name), Tensor) for name in case.outputs)
        self.shapes = {name: pytree.tree_map(lambda t: tuple(t.shape), value) for name, value in tensors.items()}
        self.double().eval()

    def _module(self, step: Step) -> nn.Module:
        return self.get_submodule(str(step.options["of"]) if step.kind == "again" else step.name)

    def forward(self, *inputs: Tensor) -> Any:
        tensors: dict[str, Any] = {f"x{i}": x for i, x in enumerate(inputs)}
        for step in self.steps:
            tensors[step.name] = self._module(step)(*(_part(tensors, source) for source in step.sources))
        answers = {name: _part(tensors, name) for name in self.outputs}
        return (
            answers if len(answers) > 2 else tuple(answers.values()) if len(answers) == 2 else answers[self.outputs[0]]
        )


def _part(tensors: dict[str, Any], name: str) -> Any:
    whole, _, part = name.partition(".")
    return tensors[whole][int(part)] if part else tensors[whole]
