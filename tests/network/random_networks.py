"""Random CNNs as ordinary modules, random plans, and the proof: masked = sliced, and the widths are the plan's.

    python -m tests.network.random_networks --cases 2000 --first-seed 0

A network is a list of small steps, so that one that fails can be shrunk by leaving steps out. What a plan
means is `tests.meaning`; nothing here looks at bar_edge's channel rules except to count how often they are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from bar_edge.network import Network, count, prunable, trace
from bar_edge.network.channels import passages
from bar_edge.network.cross_check import uncounted_flops
from bar_edge.records import ChannelPlan
from bar_edge.surgery import slice_network
from tests.meaning import CONVOLUTIONS, masked_run
from tests.reference import contrasting, difference, randomise, torch_flops, visible

FLOAT64 = 1e-9  # the issue's; sums in another order differ by about 1e-16 per layer
ATTEMPTS = 6  # at weights and masks that let the inputs be seen
Shape = tuple[int, ...]
Option = int | float | str | bool | list[int]


# ------------------------------------------------------------------------------------------- records


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation: its name, its kind in KINDS, the names of what it reads ("a.1" is part 1 of a), settings."""

    name: str
    kind: str
    sources: tuple[str, ...]
    options: dict[str, Option]

    def __str__(self) -> str:
        return (
            f"{self.name} = {self.kind}({', '.join([*self.sources, *(f'{k}={v}' for k, v in self.options.items())])})"
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and what is removed from it: inputs are named x0, x1, ..., (N, *shape) each."""

    shapes: tuple[Shape, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    seed: int
    removed: float
    #: share of layers that lose all their channels
    dead: float = 0.0

    def __str__(self) -> str:
        heading = (
            f"inputs {self.shapes}, outputs {self.outputs}, seed {self.seed}, removed {self.removed}, dead {self.dead}"
        )
        return "\n".join([heading, *(f"  {step}" for step in self.steps)])

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        data = json.loads(text)
        steps = [Step(s["name"], s["kind"], tuple(s["sources"]), s["options"]) for s in data.pop("steps")]
        shapes, outputs = tuple(map(tuple, data.pop("shapes"))), tuple(data.pop("outputs"))
        return cls(shapes=shapes, steps=tuple(steps), outputs=outputs, **data)


@dataclasses.dataclass(frozen=True)
class Failure:
    """What went wrong with a case: trace, slice, answer, count, width, file, or meaning (the reference itself)."""

    kind: str
    detail: str
    case: Case

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}\n{self.case}\n  {self.case.to_json()}"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a case showed; blind: the answer does not depend on the inputs; operators, opaque: nodes by operator."""

    failure: Failure | None
    blind: bool = False
    operators: Counter[str] = dataclasses.field(default_factory=Counter)
    opaque: Counter[str] = dataclasses.field(default_factory=Counter)


# --------------------------------------------------------------------------------------------- steps


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
    # without a rule, on purpose
    "softmax": lambda x: nn.Softmax(1),
    "channel_mean": lambda x: Apply(lambda t: t.mean(1, keepdim=True)),
    "maximum": lambda a, b: Apply(torch.maximum),
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


# ----------------------------------------------------------------------------------------- generator


class Grower:
    """Grows a network block by block; `maps` are the tensors that later blocks may read."""

    def __init__(self, seed: int, blocks: int) -> None:
        self.random = random.Random(seed)
        r = self.random
        self.rank = r.choices([4, 3, 5], [85, 10, 5])[0]
        largest = {3: 13, 4: 11, 5: 5}[self.rank]
        space = tuple(r.randint(5, largest) for _ in range(self.rank - 2))
        shapes = [(r.choice([1, 2, 3, 3, 4]), *space)]
        if r.random() < 0.15:
            shapes.append((r.randint(1, 4), *(space if r.random() < 0.5 else [r.randint(5, largest) for _ in space])))
        self.case = Case(tuple(shapes), (), ("x0",), seed, 0.0)
        self.network = RandomNetwork(self.case)
        self.maps = ["x0"]
        self.keep(self.normalised(self.conv("x0", r.randint(4, 8))))
        if len(shapes) > 1:
            other = self.normalised(self.conv(self.resize("x1", self.maps[0]), r.randint(4, 8)))
            self.keep(self.join(self.maps[-1], other))
        while blocks > 0:
            block = r.choices(list(BLOCKS), list(BLOCKS.values()))[0]
            x = self.maps[-1] if r.random() < 0.75 else r.choice(self.maps)
            made = block(self, x)
            if made is not None:
                self.keep(made)
                blocks -= 1
        self.finish()

    def do(self, kind: str, *sources: str, **options: Option) -> str:
        """Add a step and return its name."""
        step = Step(f"s{len(self.case.steps)}_{kind}", kind, sources, options)
        self.case = dataclasses.replace(self.case, steps=(*self.case.steps, step), outputs=(self.maps[-1],))
        tensors: dict[str, Any] = pytree.tree_map(torch.zeros, self.network.shapes, is_leaf=_is_shape)
        given = [_part(tensors, source) for source in sources]
        of = step.name if kind != "again" else str(options["of"])
        if kind != "again":
            self.network.add_module(of, KINDS[kind](*(tuple(t.shape) for t in given), **options).eval())
        with torch.no_grad():
            made = self.network.get_submodule(of).float()(*given)
        self.network.shapes[step.name] = pytree.tree_map(lambda t: tuple(t.shape), made)
        return step.name

    def shape(self, name: str) -> Shape:
        return _part(self.network.shapes, name)

    def keep(self, name: str) -> None:
        """Let later blocks read a map; a large one is made smaller first."""
        if self.shape(name)[1] > 14:
            name = self.conv(name, self.random.randint(4, 10), k=1)
        if max(self.shape(name)[2:]) > 13:
            name = self.do("pool", name, how="MaxPool", k=2, stride=2, ceil=False)
        if min(self.shape(name)[2:]) < 4:
            name = self.do("upsample", name, how="nearest")
        self.maps.append(name)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def width(self) -> int:
        return self.random.randint(3, 10)

    # ---------------------------------------------------------------------------------- small parts

    def conv(self, x: str, out: int, k: int | None = None, stride: int = 1) -> str:
        options: dict[str, Option] = {"out": out, "k": k or self.random.choice([1, 3, 3, 3]), "stride": stride}
        if self.chance(0.4):
            options["bias"] = False
        if self.chance(0.1):
            options["groups"] = self.random.choice([2, 3, 4])
        if self.chance(0.08) and stride == 1:
            options["dilation"] = 2
        if self.chance(0.05):
            options["mode"] = self.random.choice(["reflect", "replicate", "circular"])
        if k is None and "dilation" not in options and self.chance(0.04):
            options["k"] = 5
        if options.get("mode") == "reflect" and self.rank == 5:
            del options["mode"]
        return self.do("conv", x, **options)

    def norm(self, x: str) -> str:
        kind = self.random.choices(["batch_norm", "none", "group_norm", "instance_norm", "layer_norm", "map_norm"],
                                   [65, 20, 6, 4, 3, 1])[0]  # fmt: skip
        affine = self.chance(0.8)
        if kind == "none":
            return x
        if kind == "group_norm":
            return self.do(kind, x, groups=self.random.choice([1, 2, 3, 4]), affine=affine)
        if kind == "instance_norm":
            return self.do(kind, x, affine=affine, running=self.chance(0.3))
        if kind == "layer_norm":
            return self.do("to_first", self.do(kind, self.do("to_last", x), affine=affine))
        return self.do(kind, x) if kind == "map_norm" else self.do(kind, x, affine=affine)

    def act(self, x: str, private: bool = True) -> str:
        """An activation; in place only on a tensor that nobody else reads."""
        if self.chance(0.06):
            return self.do("prelu", x, each=self.chance(0.7))
        names = ["relu"] * 8 + [*ACTIVATIONS] if not self.chance(0.25) else FROM_ZERO
        name = self.random.choice([n for n in names if private or "place" not in n])
        return self.do("act", x, how=name)

    def normalised(self, x: str) -> str:
        """Norm and activation in one of the usual orders, each sometimes missing."""
        x = self.norm(x)
        x = self.act(x, private=not x.endswith(("to_first", "move"))) if self.chance(0.85) else x
        return self.do("dropout", x, whole=self.chance(0.5)) if self.chance(0.05) else x

    def block(self, x: str, out: int | None = None, stride: int = 1) -> str:
        return self.normalised(self.conv(x, out or self.width(), stride=stride))

    def resize(self, x: str, like: str) -> str:
        if self.shape(x)[2:] == self.shape(like)[2:]:
            return x
        return self.do("resize", x, like, how=self.random.choice(["nearest", "linear", "pool", "pad"]))

    def projected(self, x: str, like: str) -> str:
        """x with the shape of another map."""
        x = self.resize(x, like)
        out = self.shape(like)[1]
        return x if self.shape(x)[1] == out else self.norm(self.conv(x, out, k=1))

    def join(self, *parts: str) -> str:
        return self.do("cat", *(self.resize(part, parts[0]) for part in parts))

    def finish(self) -> None:
        """Add one to three heads and choose the outputs."""
        outputs = [self.random.choice(HEADS)(self, self.maps[-1])]
        while self.chance(0.2) and len(outputs) < 3:
            outputs.append(self.random.choice(HEADS)(self, self.random.choice(self.maps[1:])))
        if self.chance(0.04):
            outputs.append(self.random.choice(self.maps[1:]))
        self.case = dataclasses.replace(self.case, outputs=tuple(dict.fromkeys(outputs)))


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, int) for v in value)


# each block reads a map and returns a map, or None if it does not fit there


def plain(g: Grower, x: str) -> str:
    stride = 2 if min(g.shape(x)[2:]) > 5 and g.chance(0.3) else 1
    if g.chance(0.1):  # an even kernel: the map grows smaller
        x = g.conv(x, g.width(), k=2)
    return g.block(x, stride=stride)


def residual(g: Grower, x: str) -> str:
    stride = 2 if min(g.shape(x)[2:]) > 5 and g.chance(0.2) else 1
    out = g.shape(x)[1] if g.chance(0.6) and x != "x0" else g.width()
    y = x if g.chance(0.7) else g.act(g.norm(x), private=False)
    y = g.block(y, stride=stride)
    y = g.norm(g.conv(y, out))
    y = squeeze_excite(g, y) if g.chance(0.15) else y
    y = g.do("per_channel", y, how="scale", form=g.random.choice(["thin", "full"])) if g.chance(0.1) else y
    skip = g.projected(x, y)
    both = (y, skip) if g.chance(0.8) else (skip, y)
    in_place = g.chance(0.3) and both[0] == y
    z = g.do("add_" if in_place else "sub" if g.chance(0.05) else "add", *both)
    return g.act(z) if g.chance(0.6) else z


def inverted(g: Grower, x: str) -> str:
    """Expand, depthwise, project, as MobileNetV2 and V3 do."""
    y = g.normalised(g.conv(x, 2 * g.shape(x)[1] if g.shape(x)[1] < 7 else g.shape(x)[1] + 2, k=1))
    y = g.do("depthwise", y, times=g.random.choice([1, 1, 2]), k=g.random.choice([3, 5]), bias=g.chance(0.5))
    y = g.normalised(y)
    y = squeeze_excite(g, y) if g.chance(0.4) else y
    y = g.norm(g.conv(y, g.shape(x)[1], k=1))
    return g.do("add", x, y) if g.chance(0.7) else y


def separable(g: Grower, x: str) -> str:
    return g.block(g.do("depthwise", x, times=g.random.choice([1, 2]), bias=g.chance(0.5)))


def grouped(g: Grower, x: str) -> str:
    """The bottleneck of ResNeXt."""
    groups = g.random.choice([2, 3, 4])
    y = g.normalised(g.conv(x, groups * g.random.randint(1, 3), k=1))
    y = g.normalised(g.do("conv", y, out=groups * g.random.randint(1, 3), groups=groups, bias=g.chance(0.5)))
    y = g.norm(g.conv(y, g.shape(x)[1], k=1))
    return g.act(g.do("add", y, x)) if g.chance(0.7) else y


FLAT = ["features", "view", "largest with its place"]


def squeeze_excite(g: Grower, x: str) -> str:
    width, hidden = g.shape(x)[1], max(2, g.shape(x)[1] // 2)
    gate = {"how": g.random.choice(["sigmoid", "hardsigmoid", "tanh"])}
    if g.chance(0.5):
        how = g.random.choice(["AdaptiveAvgPool", "mean", "sum", "largest", "AdaptiveMaxPool"])
        y = g.do("conv", g.do("squeeze", x, how=how), out=hidden, k=1)
        y = g.do("act", g.do("conv", g.do("act", y, how=g.random.choice(["relu", "silu"])), out=width, k=1), **gate)
    else:
        y = g.do("linear", g.do("squeeze", x, how=g.random.choice(FLAT)), out=hidden)
        y = g.do("act", g.do("linear", g.do("act", y, how="relu"), out=width, bias=g.chance(0.7)), **gate)
        y = g.do("to_map", y, rank=g.rank, how=g.random.choice(["view", "index"]))
    return g.do("mul", x, y) if g.chance(0.7) else g.do("mul", y, x)


def add_broadcast(g: Grower, x: str) -> str:
    y = g.do("squeeze", x, how=g.random.choice(["AdaptiveAvgPool", "mean"]))
    return g.do("add", g.conv(x, g.shape(x)[1]), g.do("conv", y, out=g.shape(x)[1], k=1))


def dense_block(g: Grower, x: str) -> str:
    parts = [x]
    for _ in range(g.random.randint(1, 3)):
        y = g.do("cat", *parts) if len(parts) > 1 else x
        y = g.act(g.norm(y), private=False) if g.chance(0.6) else y
        parts.append(g.conv(y, g.random.randint(2, 4)) if g.chance(0.5) else g.block(y, g.random.randint(2, 4)))
    return g.do("cat", *(parts if g.chance(0.5) else parts[::-1]))


def inception(g: Grower, x: str) -> str:
    parts = [g.block(x, g.random.randint(2, 5)), g.block(g.block(x), g.random.randint(2, 5))]
    if g.chance(0.6):
        pooled = g.do("pool", x, how=g.random.choice(["MaxPool", "AvgPool"]), k=3, stride=1, ceil=False)
        parts.append(g.block(pooled, g.random.randint(2, 4)) if g.chance(0.8) else pooled)
    return g.do("cat", *parts)


def halves(g: Grower, x: str) -> str | None:
    """Chunk, process one half, join, shuffle: ShuffleNetV2."""
    width = g.shape(x)[1]
    if width < 4 or width % 2:
        return None
    y = g.do("split", x, sizes=[width // 2] * 2, how=g.random.choice(["chunk", "split", "slices"]))
    a, b = (f"{y}.0", f"{y}.1") if g.chance(0.5) else (f"{y}.1", f"{y}.0")
    b = g.block(g.norm(g.do("depthwise", g.block(b))), g.shape(a)[1]) if g.chance(0.5) else g.block(b)
    z = g.do("cat", a, b)
    return channel_shuffle(g, z) if g.chance(0.7) else z


def uneven(g: Grower, x: str) -> str | None:
    """Split into unequal parts; process some, drop or keep others."""
    width = g.shape(x)[1]
    if width < 5:
        return None
    first = g.random.randint(1, width - 3)
    second = g.random.randint(1, width - first - 1)
    y = g.do("split", x, sizes=[first, second, 0], how=g.random.choice(["split", "slices"]))
    parts = [g.block(f"{y}.{i}", g.random.randint(2, 4)) if g.chance(0.5) else f"{y}.{i}" for i in range(3)]
    g.random.shuffle(parts)
    return g.do("cat", *parts[: g.random.choice([2, 3])])


def take(g: Grower, x: str) -> str | None:
    if g.shape(x)[1] < 3:
        return None
    how = g.random.choice(["first", "last", "every second", "narrow", "select"])
    y = g.do("take", x, how=how, number=g.random.randint(1, g.shape(x)[1] - 2))
    return g.block(y) if g.chance(0.6) else g.join(y, g.block(x))


def channel_shuffle(g: Grower, x: str) -> str:
    ways = ["view", "reshape", "parts", "function"]
    return g.do("channel_shuffle", x, groups=g.random.choice([2, 3, 4]), how=g.random.choice(ways))


def shuffled(g: Grower, x: str) -> str:
    return g.block(channel_shuffle(g, g.block(x, g.random.choice([4, 6, 8, 9]))))


def pixels(g: Grower, x: str) -> str | None:
    if g.rank != 4:
        return None
    how = "view" if g.chance(0.25) else "function"
    y = g.do("pixel_shuffle", g.normalised(g.conv(x, 4 * g.random.randint(1, 3))), how=how)
    y = g.act(y) if g.chance(0.4) else y
    y = g.do("pixel_unshuffle", y, how="function") if max(g.shape(y)[2:]) > 12 or g.chance(0.2) else y
    return g.normalised(g.conv(y, g.width(), stride=2 if g.chance(0.5) else 1))


def unshuffled(g: Grower, x: str) -> str | None:
    if g.rank != 4 or g.shape(x)[1] > 5:
        return None
    height, width = g.shape(x)[2:]
    even = g.do("pad", x, amounts=[0, width % 2, 0, height % 2], mode="constant") if height % 2 or width % 2 else x
    return g.block(g.do("pixel_unshuffle", even, how=g.random.choice(["function", "slices"])))


def gate(g: Grower, x: str) -> str:
    """a * sigmoid(b) of the two halves of one convolution, or of two convolutions."""
    out = g.width()
    if g.chance(0.6):
        y = g.do("split", g.norm(g.conv(x, 2 * out)), sizes=[out, out], how=g.random.choice(["chunk", "slices"]))
        a, b = f"{y}.0", f"{y}.1"
    else:
        a, b = g.norm(g.conv(x, out)), g.norm(g.conv(x, out))
    return g.do("mul", a, g.do("act", b, how=g.random.choice(["sigmoid", "tanh", "silu", "relu"])))


def spatial_gate(g: Grower, x: str) -> str:
    y = g.do("act", g.do("conv", x, out=1, k=3), how="sigmoid")
    return g.do("mul", g.conv(x, g.width()), y)


def per_channel(g: Grower, x: str) -> str:
    y = g.conv(x, g.width()) if g.chance(0.7) else x
    for _ in range(g.random.randint(1, 2)):
        form = g.random.choice(["thin", "full", "viewed"])
        y = g.do("per_channel", y, how=g.random.choice(["scale", "shift"]), form=form)
    return g.act(y) if g.chance(0.5) and y != x else y


def pool(g: Grower, x: str) -> str:
    if g.chance(0.3):
        how = g.random.choice(["AdaptiveAvgPool", "AdaptiveMaxPool"])
        return g.do("adaptive", x, how=how, size=g.random.randint(4, 6))
    stride = 2 if min(g.shape(x)[2:]) > 7 else 1
    return g.do("pool", x, how=g.random.choice(["MaxPool", "AvgPool"]), k=3, stride=stride, ceil=g.chance(0.3))


def pad(g: Grower, x: str) -> str:
    mode = g.random.choice(["constant", "constant", "reflect", "replicate", "circular"])
    if mode == "reflect" and g.rank == 5:
        mode = "constant"
    amounts = [g.random.randint(0, 2) for _ in range(2 * (g.rank - 2))]
    y = g.do("pad", x, amounts=amounts, mode=mode, value=g.random.choice([0.0, 0.0, 0.5, -1.0]))
    return g.normalised(g.do("conv", y, out=g.width(), k=3)) if g.chance(0.7) else y


def upsample(g: Grower, x: str) -> str:
    if max(g.shape(x)[2:]) > 6:
        x = g.do("pool", x, how="MaxPool", k=2, stride=2, ceil=True)
    if g.chance(0.5):
        k, stride = g.random.choice([(2, 2), (3, 2), (3, 1), (4, 2)])
        groups = g.random.choice([1, 1, 1, 2])
        return g.normalised(g.do("transposed", x, out=g.width(), k=k, stride=stride, groups=groups, bias=g.chance(0.6)))
    return g.block(g.do("upsample", x, how=g.random.choice(["nearest", "linear", "corners"])))


def unet(g: Grower, x: str) -> str:
    """Down, up again, joined with what was there."""
    y = g.block(g.do("pool", g.block(x), how="MaxPool", k=2, stride=2, ceil=False))
    y = g.normalised(g.do("transposed", y, out=g.width())) if g.chance(0.5) else g.do("upsample", y, how="nearest")
    y = g.resize(y, x)
    return g.block(g.do("cat", x, y)) if g.chance(0.8) else g.do("cat", y, x)


def island(g: Grower, x: str) -> str:
    """The channels-last block of ConvNeXt."""
    y = g.do("depthwise", x, k=g.random.choice([3, 5])) if g.chance(0.8) else g.conv(x, g.shape(x)[1])
    y = g.do("layer_norm", g.do("to_last", y), affine=g.chance(0.9)) if g.chance(0.8) else g.do("to_last", y)
    y = g.do("act", g.do("linear", y, out=g.random.randint(4, 12)), how=g.random.choice(["gelu", "relu", "sigmoid"]))
    y = g.do("linear", y, out=g.shape(x)[1])
    y = g.do("per_channel", y, how="scale", form="last") if g.chance(0.7) else y
    return g.do("add", x, g.do("to_first", y)) if g.chance(0.8) else g.do("to_first", y)


def twice(g: Grower, x: str) -> str:
    """The same layers called again: in a row, on two tensors, at two sizes."""
    first = len(g.case.steps)
    y = g.normalised(g.conv(x, g.shape(x)[1]))
    layers = g.case.steps[first:]

    def again(z: str) -> str:
        names = {x: z}
        for step in layers:
            sources = [names[source] for source in step.sources]
            owns = any(True for _ in g.network.get_submodule(step.name).parameters())
            options = {"of": step.name} if owns else step.options
            names[step.name] = g.do("again" if owns else step.kind, *sources, **options)
        return names[y]

    sized = any(step.kind == "map_norm" for step in layers) or g.shape(y) != g.shape(x)
    how = g.random.choice(["row", "tensors", "sizes"])
    if how == "row" and g.shape(y) == g.shape(x):
        return again(y)
    if how == "sizes" and not sized and min(g.shape(x)[2:]) > 5:
        return g.join(y, again(g.do("pool", x, how="AvgPool", k=2, stride=2, ceil=False)))
    return g.do(g.random.choice(["add", "cat"]), y, again(g.conv(x, g.shape(x)[1])))


def unused(g: Grower, x: str) -> str:
    g.block(g.block(x))
    return g.block(g.do("unused", x))


def move(g: Grower, x: str) -> str:
    ways = ["flip channels", "flip", "roll channels", "roll", "there and back", "swap", "expand"]
    ways += ["repeat"] if g.shape(x)[1] < 7 else []
    y = g.do("move", x, how=g.random.choice(ways))
    return g.normalised(y) if g.chance(0.5) else g.block(y)


def two_ways(g: Grower, x: str) -> str:
    """Two branches of one shape, added plainly or over a new axis, or joined along space; then a third one added."""
    out = g.width()
    a, b = g.norm(g.conv(x, out)), g.block(x, out)
    how = g.random.choice(["add", "add", "sub", "stack_sum", "cat_space"])
    z = g.do(how, a, g.resize(b, a))
    if how == "cat_space":
        return g.block(z)
    return g.do("add", z, g.projected(g.random.choice(g.maps[1:]), z))


def from_features(g: Grower, x: str) -> str:
    """A decoder: features become a map."""
    size = [2] * (g.rank - 2)
    y = g.do("linear", g.do("squeeze", x, how="features"), out=3 * math.prod(size))
    return g.join(g.block(x), g.conv(g.do("unflatten", y, shape=[3, *size]), g.random.randint(2, 4), k=1))


def without_rule(g: Grower, x: str) -> str:
    how = g.random.choice(["softmax", "channel_mean", "maximum", "cumsum"])
    if how == "maximum":
        out = g.width()
        return g.do("maximum", a := g.block(x, out), g.resize(g.block(x, out), a))
    if how == "channel_mean":
        return g.do("add", x, g.do(how, x))
    return g.block(g.do(how, x))


BLOCKS: dict[Callable[[Grower, str], str | None], float] = {
    plain: 8, residual: 12, inverted: 5, separable: 4, grouped: 6, squeeze_excite: 5, add_broadcast: 2, dense_block: 6,
    inception: 5, halves: 5, uneven: 4, take: 3, shuffled: 4, pixels: 4, unshuffled: 2, gate: 4, spatial_gate: 2,
    per_channel: 3, pool: 3, pad: 3, upsample: 4, unet: 4, island: 5, twice: 4, unused: 2, move: 3, two_ways: 4,
    from_features: 2, without_rule: 5,
}  # fmt: skip


def pooled_head(g: Grower, x: str) -> str:
    y = g.do("squeeze", x, how=g.random.choice([*FLAT, "AdaptiveAvgPool"]))
    y = g.do("flatten", y, how=g.random.choice(["module", "reshape"])) if len(g.shape(y)) > 2 else y
    return classifier(g, y)


def classifier(g: Grower, y: str) -> str:
    if g.chance(0.4):
        y = g.do("linear", y, out=g.width())
        y = g.do("batch_norm", y) if g.chance(0.4) else y
        y = g.do("act", y, how=g.random.choice(["relu", "sigmoid", "hardswish"]))
        y = g.do("dropout", y) if g.chance(0.3) else y
    return g.do("linear", y, out=g.random.randint(2, 5))


def flat_head(g: Grower, x: str) -> str:
    y = g.do("adaptive", x, how="AdaptiveAvgPool", size=2) if g.rank == 5 or g.chance(0.5) else x
    y = g.normalised(y) if y != x and g.chance(0.3) else y
    return classifier(g, g.do("flatten", y, how=g.random.choice(["module", "reshape"])))


def conv_head(g: Grower, x: str) -> str:
    y = g.block(x) if g.chance(0.5) else x
    y = g.do("conv", y, out=g.random.randint(2, 5), k=1)
    return g.do("act", y, how="sigmoid") if g.chance(0.3) else y


HEADS = [pooled_head, pooled_head, flat_head, conv_head]


def random_case(seed: int, removed: float, blocks: int | None = None) -> Case:
    """Return a random network with a share of its channels to remove; blocks: how long, at random if None."""
    chosen = random.Random(f"size {seed}")
    case = Grower(seed, blocks or chosen.randint(1, 7)).case
    return dataclasses.replace(case, removed=removed, dead=chosen.choice([0, 0, 0, 0.05, 0.2]))


# ----------------------------------------------------------------------------------------- the proof


@torch.no_grad()
def enliven(module: nn.Module, seed: int, removed: float = 0.0) -> nn.Module:
    """Give every parameter and running statistic values that hide nothing and keep the signal; returns the module."""
    randomise(module, seed, removed)
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> None:
        like.copy_(torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    for part in module.modules():
        if isinstance(part, (nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            taps = part.weight[0, 0].numel() / (1 if isinstance(part, nn.Conv3d) else math.prod(part.stride))
            bound = (6 / max(1.0, taps * part.in_channels / part.groups * (1 - removed))) ** 0.5
            uniform(part.weight, -bound, bound)
            if part.bias is not None:
                uniform(part.bias, -0.5, 0.5)
        elif isinstance(part, (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)):
            if part.weight is not None:
                uniform(part.weight, 0.4, 1.4)
                uniform(part.bias, -0.6, 0.6)
            if getattr(part, "running_mean", None) is not None:
                uniform(part.running_mean, -0.5, 0.5)
                uniform(part.running_var, 0.5, 2.0)
        elif isinstance(part, nn.PReLU):
            uniform(part.weight, 0.05, 0.5)
        elif isinstance(part, PerChannel):
            uniform(part.values, 0.4, 1.4)
    return module


def random_plan(network: Network, case: Case, attempt: int) -> dict[str, tuple[int, ...]]:
    """Return kept channels of every prunable layer; a layer's choice depends on its name and width, not on others."""
    kept = {}
    for name, reason in prunable(network).items():
        if reason:
            continue
        layer, r = network.body.get_submodule(name), random.Random(f"{case.seed} {attempt} {name}")
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        left = max(1, round((1 - case.removed) * width)) if r.random() >= case.dead else 0
        kept[name] = tuple(sorted(r.sample(range(width), left)))
    return kept


def inputs_of(case: Case) -> tuple[Tensor, ...]:
    return tuple(contrasting(3, *shape, seed=case.seed + i) for i, shape in enumerate(case.shapes))


def executed(network: Network, inputs: tuple[Tensor, ...]) -> tuple[int, int, int]:
    """Return volume and FLOPs that a network executes for one image, measured by hooks, and all its parameters."""
    volume = flops = 0

    def hook(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        nonlocal volume, flops
        if isinstance(layer, nn.Linear) and made.ndim == 2:
            return  # a classifier's features are no activation volume
        volume += made[0].numel()
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        flops += 2 * (given[0] if transposed else made)[0].numel() * layer.weight[0].numel()  # type: ignore[operator]

    layers = [m for m in network.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
    handles = [m.register_forward_hook(hook) for m in layers]
    with torch.no_grad():
        network(*inputs)
    for handle in handles:
        handle.remove()
    return volume, flops, sum(p.numel() for p in network.parameters())


def masked_and_visible(
    module: nn.Module, network: Network, case: Case, inputs: tuple[Tensor, ...]
) -> tuple[dict[str, tuple[int, ...]], list[Tensor], dict[str, int]]:
    """Return kept channels, answers and existing channels, with weights and masks that let the inputs be seen.

    A constant would hide every error: weights and masks are drawn again until an answer depends on the inputs.
    """
    for attempt in range(ATTEMPTS):
        enliven(module, case.seed + 1000003 * attempt, case.removed)
        network.body.load_state_dict(module.state_dict(), strict=False)  # parameters have the user's names
        kept = random_plan(network, case, attempt)
        answers, widths = masked_run(module, kept, *inputs)
        if any(map(visible, pytree.tree_leaves(answers))):
            break
    return kept, pytree.tree_leaves(answers), widths


def examine(case: Case, files: bool = False) -> Finding:
    """Trace, plan, slice and compare one case; files: save and load the sliced network too."""
    module, inputs = enliven(RandomNetwork(case), case.seed, case.removed), inputs_of(case)
    operators, opaque, stage = Counter[str](), Counter[str](), "trace"

    def failed(kind: str, detail: object) -> Finding:
        return Finding(Failure(kind, str(detail), case), False, operators, +opaque)

    try:
        network = trace(module, inputs)
        for node, passage in passages(network).items():
            if node.op != "placeholder":
                part = network.module_of(node)
                name = str(node.target) if part is None else type(part).__name__
                operators[name] += 1
                opaque[name] += passage.kind == "opaque"
        stage = "meaning"
        kept, wanted, widths = masked_and_visible(module, network, case, inputs)
        stage = "slice"
        plan = ChannelPlan(network=network.fingerprint, kept=kept)
        sliced = slice_network(network, plan)
        got = pytree.tree_leaves(sliced(*inputs))
        costs, counted = count(network, plan), count(sliced)
    except Exception as error:  # whatever it is, it is a finding
        return failed(stage, f"{type(error).__name__}: {error}")
    error = max(difference(a, b) for a, b in zip(wanted, got, strict=True))
    if not error <= FLOAT64:
        return failed("answer", f"differs by {error:.1e}")
    flops, by_torch = count(network).flops + sum(uncounted_flops(network).values()), torch_flops(network, *inputs)[1]
    if flops != by_torch:
        return failed("count", f"{flops} FLOPs counted and named as uncounted, {by_torch} by torch")
    measured = executed(sliced, inputs)
    own = (costs.volume, costs.flops, costs.params)
    # groups are filled up to one width, a layer that is called twice reads what either call needs: zeros are executed
    filled = any(getattr(m, "groups", 1) > 1 for m in sliced.modules()) or any(s.kind == "again" for s in case.steps)
    fits = all(m >= c for m, c in zip(measured, own, strict=True)) if filled else measured == own
    if costs != counted or not fits:
        return failed("count", f"plan {costs}, sliced {counted}, measured {measured}")
    wide = [name for name, number in widths.items() if _width(sliced, name) > number]  # none in groups: they are filled
    if wide:
        return failed("width", f"{wide[0]} has {_width(sliced, wide[0])} channels, {widths[wide[0]]} exist")
    if files and (problem := _reload(sliced, inputs, got)):
        return failed("file", problem)
    return Finding(None, not any(map(visible, wanted)), operators, +opaque)


def _width(network: Network, name: str) -> int:
    """Return the output channels of a layer, 0 if it is gone or in groups."""
    layer = dict(network.body.named_modules()).get(name)
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, CONVOLUTIONS) and layer.groups == 1 else 0


def _reload(network: Network, inputs: tuple[Tensor, ...], answers: list[Tensor]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            network.save(Path(folder))
            again = Network.load(Path(folder)).eval()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    with torch.no_grad():
        same = map(torch.equal, answers, pytree.tree_leaves(again(*inputs)))
        return "" if all(same) else "the loaded network answers differently"


def check(seed: int, removed: float, blocks: int | None = None) -> Failure | None:
    """Return what is wrong with the random network of a seed when a share of its channels is removed."""
    return examine(random_case(seed, removed, blocks), files=seed % 10 == 0).failure


# ------------------------------------------------------------------------------------------ shrinking


def smaller(case: Case) -> Iterator[Case]:
    """Yield cases with fewer outputs, then with fewer steps: long runs of steps first, the last ones first."""
    if len(case.outputs) > 1:
        yield from (_reachable(dataclasses.replace(case, outputs=(name,))) for name in case.outputs)
    yield _reachable(case)
    length = len(case.steps)
    while length := length // 2:
        for start in range(len(case.steps) - length, -1, -length):
            shorter = case
            for step in reversed(case.steps[start : start + length]):
                shorter = _without(shorter, step)
            yield shorter


def _without(case: Case, gone: Step) -> Case:
    """Leave a step out: who reads it reads what it read first."""

    def renamed(name: str) -> str:
        return gone.sources[0] if name.partition(".")[0] == gone.name else name

    steps = [
        dataclasses.replace(step, sources=tuple(map(renamed, step.sources))) for step in case.steps if step != gone
    ]
    return dataclasses.replace(case, steps=tuple(steps), outputs=tuple(dict.fromkeys(map(renamed, case.outputs))))


def _reachable(case: Case) -> Case:
    """Leave out the steps that no output depends on."""
    wanted, steps = {name.partition(".")[0] for name in case.outputs}, []
    for step in reversed(case.steps):
        if step.name in wanted:
            steps.append(step)
            wanted |= {name.partition(".")[0] for name in [*step.sources, str(step.options.get("of", ""))]}
    return dataclasses.replace(case, steps=tuple(reversed(steps)))


def shrink(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Return a case that still fails and none of whose parts can be left out."""
    while True:
        size = (len(case.outputs), len(case.steps))
        better = (c for c in smaller(case) if (len(c.outputs), len(c.steps)) < size and _builds(c) and fails(c))
        found = next(better, None)
        if found is None:
            return case
        case = found


def _builds(case: Case) -> bool:
    try:
        RandomNetwork(case)
    except Exception:  # what is left does not fit together: not a smaller example
        return False
    return True


def shrunk(failure: Failure) -> Failure:
    """Return the same kind of failure of a small network."""
    kind, head = failure.kind, failure.detail.partition(":")[0]

    def same(other: Failure | None) -> bool:
        if other is None or other.kind != kind:
            return False
        return kind not in ("trace", "slice", "meaning", "file") or other.detail.partition(":")[0] == head

    case = shrink(failure.case, lambda c: same(examine(c, files=kind == "file").failure))
    return examine(case, files=kind == "file").failure or failure


# ---------------------------------------------------------------------------------------- command line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, help="blocks per network; 1 to 7 at random if not given")
    parser.add_argument("--case", help="examine this case, the JSON that a failure prints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        finding = examine(Case.from_json(options.case), files=True)
        print(finding.failure or "exact")
        return int(finding.failure is not None)
    failures, blind, start = 0, 0, time.perf_counter()
    operators, opaque, example = Counter[str](), Counter[str](), dict[str, int]()
    for done, seed in enumerate(range(options.first_seed, options.first_seed + options.cases), start=1):
        removed = random.Random(f"removed {seed}").choice([0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9])
        finding = examine(random_case(seed, removed, options.blocks), files=seed % 10 == 0)
        operators, opaque, blind = operators + finding.operators, opaque + finding.opaque, blind + finding.blind
        example = dict.fromkeys(finding.opaque, seed) | example
        if finding.failure is not None:
            failures += 1
            print(f"FAILED seed {seed}: {shrunk(finding.failure)}", flush=True)
        if done % 50 == 0 or done == options.cases:
            seconds = (time.perf_counter() - start) / done
            print(f"{done} cases, {failures} failed, {blind} blind, {seconds:.2f} s each", flush=True)
    total, without = operators.total(), opaque.total()
    print(f"{without} of {total} operators without a rule ({without / max(1, total):.2%}):")
    for name, number in opaque.most_common():
        print(f"  {name}: {number} of {operators[name]}, first in seed {example[name]}")
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
