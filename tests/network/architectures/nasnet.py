"""NASNet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.network.architectures.parts import classifier_head, conv_norm, relu, scaled


def separable(channels: int, stride: int, kernel: int) -> nn.Module:
    """ReLU, depthwise and 1x1 convolution, BatchNorm, twice; only the second ReLU is in place: x has other readers."""

    def once(stride: int) -> tuple[nn.Module, ...]:
        depthwise = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
        return depthwise, nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels, 1e-3)

    return nn.Sequential(nn.ReLU(), *once(stride), relu(), *once(1))


#: name -> channels, stride -> operation
OPERATIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "sep3": partial(separable, kernel=3),
    "sep5": partial(separable, kernel=5),
    "sep7": partial(separable, kernel=7),
    "mean": lambda channels, stride: nn.AvgPool2d(3, stride, 1, count_include_pad=False),
    "peak": lambda channels, stride: nn.MaxPool2d(3, stride, 1),
    "same": lambda channels, stride: nn.Identity(),
}
#: each sum is the next state; state 0 is the last cell's output, 1 the output of the cell before
NORMAL = "sep5 0 + sep3 1; sep5 1 + sep3 1; mean 0 + same 1; mean 1 + mean 1; sep3 0 + same 0"
REDUCTION = "sep5 0 + sep7 1; peak 0 + sep7 1; mean 0 + sep5 1; same 3 + mean 2; sep3 2 + peak 0"


class Halve(nn.Module):
    """Half the map by two 1x1 convolutions, one of them a pixel further, concatenated and normalised."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pool, self.pad = nn.AvgPool2d(1, 2), nn.ZeroPad2d((0, 1, 0, 1))
        self.here = nn.Conv2d(inputs, outputs // 2, 1, bias=False)
        self.there = nn.Conv2d(inputs, outputs - outputs // 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs, 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        moved = self.pad(x)[:, :, 1:, 1:]
        return self.norm(torch.cat([self.here(self.pool(x)), self.there(self.pool(moved))], 1))


class Cell(nn.Module):
    """A cell of NASNet-A over the outputs of the last two cells; halve: the older one is twice as large."""

    def __init__(self, older: int, newer: int, filters: int, reduction: bool, halve: bool) -> None:
        super().__init__()

        def enter(inputs: int) -> nn.Module:
            return nn.Sequential(nn.ReLU(), conv_norm(inputs, filters, act=None, eps=1e-3))

        self.newer, self.older = enter(newer), Halve(older, filters) if halve else enter(older)
        # the cell's output is every state that no sum reads
        self.joined = (3, 4, 5, 6) if reduction else (1, 2, 3, 4, 5, 6)
        self.outputs = filters * len(self.joined)
        self.operations, self.read = nn.ModuleList(), []
        for term in (REDUCTION if reduction else NORMAL).replace(";", "+").split("+"):
            name, state = term.split()
            self.operations.append(OPERATIONS[name](filters, 2 if reduction and int(state) < 2 else 1))
            self.read.append(int(state))

    def forward(self, older: Tensor, newer: Tensor) -> Tensor:
        states = [self.newer(newer), self.older(older)]
        for left in range(0, len(self.read), 2):
            a, b = (self.operations[term](states[self.read[term]]) for term in (left, left + 1))
            states.append(a + b)
        return torch.cat([states[i] for i in self.joined], 1)


class NasNetA(nn.Module):
    """NASNet-A Mobile (Zoph et al. 2018), padded as torch pads: two reductions, then three times four normal cells."""

    def __init__(self, width: float) -> None:
        super().__init__()
        older = newer = scaled(32, width)
        self.stem = conv_norm(3, newer, 3, 2, 0, act=None, eps=1e-3)
        self.cells = nn.ModuleList()
        halve = False
        for filters, kinds in ((11, "R"), (22, "R"), (44, "NNNN"), (88, "RNNNN"), (176, "RNNNN")):
            for kind in kinds:
                cell = Cell(older, newer, scaled(filters, width), kind == "R", halve)
                self.cells.append(cell)
                older, newer, halve = newer, cell.outputs, kind == "R"
        self.head = nn.Sequential(nn.ReLU(), classifier_head(newer, width, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        older = newer = self.stem(x)
        for cell in self.cells:
            older, newer = newer, cell(older, newer)
        return self.head(newer)
