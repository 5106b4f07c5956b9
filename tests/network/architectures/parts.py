"""What the networks share: convolutions with their norms, classifiers, branches, squeeze and excitation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

Activation = Callable[[], nn.Module]
#: conv_norm with some arguments bound
Unit = Callable[..., nn.Sequential]
#: inputs, outputs, stride -> block
Block = Callable[[int, int, int], nn.Module]

relu: Activation = partial(nn.ReLU, inplace=True)
silu: Activation = partial(nn.SiLU, inplace=True)
hardswish: Activation = partial(nn.Hardswish, inplace=True)


def scaled(channels: float, width: float, multiple: int = 1) -> int:
    """Return channels * width rounded to a multiple, at least that multiple."""
    return max(1, round(channels * width / multiple)) * multiple


def divisible(channels: float) -> int:
    """Return the nearest multiple of 8, at least 8 and no more than 10 % below: the rule of the MobileNets."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int] = 1,
    stride: int = 1,
    padding: int | None = None,
    *,
    groups: int = 1,
    act: Activation | None = relu,
    eps: float = 1e-5,
    dims: int = 2,
) -> nn.Sequential:
    """Convolution without bias, BatchNorm, activation; the padding keeps the size unless it is given."""
    conv, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}[dims]
    sides = (kernel,) * dims if isinstance(kernel, int) else kernel
    pads = tuple(side // 2 for side in sides) if padding is None else padding
    layers = [conv(inputs, outputs, sides, stride, pads, groups=groups, bias=False), norm(outputs, eps=eps)]
    return nn.Sequential(*layers, act()) if act else nn.Sequential(*layers)


def numbers(table: str) -> list[list[int]]:
    """Return the numbers of a table whose rows are separated by semicolons."""
    return [[int(cell) for cell in row.split()] for row in table.split(";")]


def classifier_head(channels: int, width: float, dropout: float = 0.0, dims: int = 2) -> nn.Sequential:
    """Global average, dropout, linear layer to (scaled) 1000 classes."""
    pool = nn.AdaptiveAvgPool1d(1) if dims == 1 else nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(pool, nn.Flatten(1), nn.Dropout(dropout), nn.Linear(channels, scaled(1000, width)))


class Classifier(nn.Module):
    """head(features(x))."""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Skip(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), added and rectified in place; 1x1 shortcut where the shape changes."""

    def __init__(self, body: nn.Module, inputs: int, outputs: int, stride: int, dims: int = 2) -> None:
        super().__init__()
        same = stride == 1 and inputs == outputs
        self.body = body
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride, act=None, dims=dims)
        self.relu = relu()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.shortcut(x)
        return self.relu(y)


class Branches(nn.Module):
    """Concatenation over channels of what each branch makes of the same input."""

    def __init__(self, inputs: int, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.outputs = sum(outputs_of(branch, inputs) for branch in branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def outputs_of(module: nn.Module, inputs: int) -> int:
    """Return how many channels leave a convolution, Branches or a sequence of them; others keep the inputs."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    if isinstance(module, Branches):
        return module.outputs
    for child in module.children():
        inputs = outputs_of(child, inputs)
    return inputs


class SqueezeExcite(nn.Module):
    """Squeeze-excite with 1x1 convolutions."""

    def __init__(self, channels: int, squeezed: int, act: Activation, gate: Activation) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.act = nn.Conv2d(channels, squeezed, 1), act()
        self.expand, self.gate = nn.Conv2d(squeezed, channels, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.expand(self.act(self.reduce(self.pool(x))))) * x


class Apply(nn.Module):
    """A function of the tensor, as a step of a sequence."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def channels_last() -> nn.Module:
    return Apply(lambda x: x.permute(0, 2, 3, 1))


def channels_first() -> nn.Module:
    return Apply(lambda x: x.permute(0, 3, 1, 2))
