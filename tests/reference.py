"""Independent references for the tests: what a plan means on the user's own module, and what it costs.

Nothing here uses bar_edge's channel rules, liveness or counting. `Masked` runs an ordinary nn.Module on a
value that carries a mask of its channels through `__torch_function__`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Kept = Mapping[str, Iterable[int]]


class Masked:
    """A tensor and which of its channels (axis 1) exist; absent channels are 0 in `value`.

    kept: id of a convolution's weight -> its kept output channels; the id of a running mean says that
    this BatchNorm has no rule, as one that is called twice.
    """

    def __init__(self, value: Tensor, mask: Tensor, kept: Mapping[int, Iterable[int]]) -> None:
        shape = [1, -1, *[1] * (value.ndim - 2)]
        self.value, self.mask, self.kept = value * mask.view(shape).to(value), mask, kept

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    def dim(self) -> int:
        return self.value.ndim

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)

    def __mul__(self, other: Any) -> Any:
        return torch.mul(self, other)

    def permute(self, *axes: int) -> Any:
        return torch.permute(self, axes)

    def size(self, axis: int) -> int:
        return self.value.shape[axis]

    def __getattr__(self, name: str) -> Any:
        """x.mean(...), x.relu(): the function of torch of that name."""
        function = getattr(torch, name)
        return lambda *args, **kwargs: function(self, *args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = list(args[0]) if isinstance(args[0], list | tuple) else [*args, *(kwargs or {}).values()]
        given = [a for a in flat if isinstance(a, Masked)]
        plain = [_plain(a) for a in args]
        named = {name: _plain(a) for name, a in (kwargs or {}).items()}
        value = func(*plain, **named)
        if isinstance(value, tuple | list):
            return tuple(Masked(v, _full(given, v, args), given[0].kept) for v in value)
        mask = MEANINGS.get(func.__name__, _full)(given, value, args)
        return Masked(value, mask, given[0].kept)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_plain(v) for v in value)
    return value.value if isinstance(value, Masked) else value


def _conv(given: list[Masked], value: Tensor, args: Any) -> Tensor:
    """No live input, no live output; a depthwise convolution has the channels of its input."""
    x, weight, groups = given[0], args[1], args[6] if len(args) > 6 else 1
    if groups > 1:
        return x.mask if groups == len(x.mask) == len(weight) else _full(given, value, args)
    mask = torch.zeros(len(weight), dtype=torch.bool)
    if x.mask.any():
        mask[list(x.kept.get(id(weight), range(len(weight))))] = True
    return mask


def _linear(given: list[Masked], value: Tensor, args: Any) -> Tensor:
    return torch.full((value.shape[-1],), bool(given[0].mask.any()))


def _norm(given: list[Masked], value: Tensor, args: Any) -> Tensor:
    return _full(given, value, args) if id(args[1]) in given[0].kept else given[0].mask


def _same(given: list[Masked], value: Tensor, args: Any) -> Tensor:
    return given[0].mask


def _sum(given: list[Masked], value: Tensor, args: Any) -> Tensor:
    return torch.stack([x.mask for x in given]).any(0)


def _join(given: list[Masked], value: Tensor, args: Any) -> Tensor:
    return torch.cat([x.mask for x in given])


def _flat(given: list[Masked], value: Tensor, args: Any) -> Tensor:
    return given[0].mask.repeat_interleave(math.prod(given[0].shape[2:]))


def _full(given: list[Masked], value: Tensor, args: Any) -> Tensor:
    return torch.ones(value.shape[1], dtype=torch.bool)


MEANINGS: dict[str, Callable[[list[Masked], Tensor, Any], Tensor]] = {
    "conv2d": _conv,
    "linear": _linear,
    "batch_norm": _norm,
    "add": _sum,
    "cat": _join,
    "flatten": _flat,
} | dict.fromkeys(
    ("relu", "relu6", "hardtanh", "leaky_relu", "sigmoid", "silu", "max_pool2d", "adaptive_avg_pool2d",
     "avg_pool2d", "dropout", "mean", "boolean_dispatch", "_max_pool2d"),
    _same,
)  # fmt: skip


def masked_answer(module: nn.Module, kept: Kept, images: Tensor, without_rule: Iterable[str] = ()) -> Tensor:
    """Return the eval-mode answer of the user's module in which every absent channel is 0 wherever it is read."""
    by_weight = {id(module.get_submodule(name).weight): list(ids) for name, ids in kept.items()}
    by_weight |= {id(module.get_submodule(name).running_mean): [] for name in without_rule}
    module.eval()
    with torch.no_grad():
        answer = module(Masked(images, torch.ones(images.shape[1], dtype=torch.bool), by_weight))
    return answer.value


def contrasting(n: int, *shape: int, seed: int = 7) -> Tensor:
    """Return float64 noise (n, *shape) of n strengths, so that answers differ from image to image."""
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise * torch.logspace(-0.1, 1.1, n, dtype=torch.float64).view(n, *[1] * len(shape))


def difference(a: Tensor, b: Tensor) -> float:
    """Return max |a - b| / max |a|, infinite where a is all zeros and b is not."""
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    gap, scale = float((a - b).abs().max()), float(a.abs().max())
    return 0.0 if gap == 0 else gap / scale if scale else math.inf


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0, removed: float = 0.0) -> nn.Module:
    """Give weights, gammas, betas, biases and running statistics values that hide nothing; returns the module.

    Without it a mean of 0 and a beta of 0 make a forgotten constant invisible. Filters are as large as
    a network needs that keeps its signal when a share of the channels is removed.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator).to(like) * (high - low) + low

    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.copy_(uniform(part.running_mean, -0.5, 0.5))
            part.running_var.copy_(uniform(part.running_var, 0.5, 2.0))
            if part.weight is not None:
                sign = (uniform(part.weight, 0, 1) > 0.3).to(part.weight) * 2 - 1
                part.weight.copy_(uniform(part.weight, 0.4, 1.2) * sign)
                part.bias.copy_(uniform(part.bias, -0.6, 0.6))
        elif isinstance(part, nn.Conv1d | nn.Conv2d | nn.Linear):
            fan_in = part.weight[0].numel() * (1 - removed)
            part.weight.copy_(uniform(part.weight, -1, 1) * (6 / max(1.0, fan_in)) ** 0.5)
            if part.bias is not None:
                part.bias.copy_(uniform(part.bias, -0.5, 0.5))
    return module


def visible(answers: Tensor) -> bool:
    """Tell whether the answers depend on the images: a parity of constants would see nothing."""
    return bool((answers - answers[:1]).abs().max() > 0.01 * answers.abs().max())


def convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the convolutions that can be pruned: all but depthwise ones."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}


def random_kept(module: nn.Module, removed: float, seed: int, dead: Iterable[str] = ()) -> dict[str, tuple[int, ...]]:
    """Return a random choice of channels: a share removed, at least one left, none in the layers named dead."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, conv in convolutions(module).items():
        n = max(1, round((1 - removed) * conv.out_channels))
        kept[name] = tuple(sorted(torch.randperm(conv.out_channels, generator=generator)[:n].tolist()))
    return kept | dict.fromkeys(dead, ())


def torch_flops(module: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    """Return the FLOPs of convolutions, and of everything, for one image by torch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    by_operator = counter.get_flop_counts().get("Global", {})
    convolutions = sum(flops for name, flops in by_operator.items() if "conv" in str(name))
    n = len(inputs[0])
    assert convolutions % n == counter.get_total_flops() % n == 0
    return convolutions // n, counter.get_total_flops() // n


def hooked_counts(module: nn.Module, images: Tensor) -> tuple[int, int, int]:
    """Return volume and FLOPs that convolutions execute for one image, measured by hooks, and all parameters."""
    volume = flops = 0

    def hook(conv: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal volume, flops
        maps = output[0].numel()
        volume += maps
        flops += 2 * maps * conv.weight[0].numel()

    handles = [m.register_forward_hook(hook) for m in module.modules() if isinstance(m, nn.Conv1d | nn.Conv2d)]
    with torch.no_grad():
        module(images)
    for handle in handles:
        handle.remove()
    return volume, flops, sum(p.numel() for p in module.parameters())
