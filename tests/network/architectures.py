"""Well-known networks in torch alone, for tests: layers, widths, topology and operators of the papers and of their
usual implementations, in-place calls included.

Left out: auxiliary heads and stochastic depth (neither acts at inference), and the published initial values. A width
multiplier scales every width, classes included, so that the tests' networks are small; 1.0 is the published network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[], nn.Module]
#: conv_norm with some arguments bound
Unit = Callable[..., nn.Sequential]
#: inputs, outputs, stride -> block
Block = Callable[[int, int, int], nn.Module]

relu: Activation = partial(nn.ReLU, inplace=True)
silu: Activation = partial(nn.SiLU, inplace=True)
hardswish: Activation = partial(nn.Hardswish, inplace=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One network of the table, without its batch axis."""

    build: Callable[[float], nn.Module]
    """width multiplier -> network; 1.0 is the published one"""
    input_shape: tuple[int, ...]
    """published"""
    small_shape: tuple[int, ...]
    """for tests: about as small as its strides allow"""
    kind: Literal["plain", "hybrid"] = "plain"
    """plain: convolutions do nearly all the work; hybrid: linear layers over channels or tokens share it"""


# ---- what the networks share ----


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


# ---- residual networks ----


def stages(inputs: int, depths: Sequence[int], widths: Sequence[int], first: int, block: Block) -> nn.Sequential:
    """Return stages of blocks; each but the first halves the map in its first block, the first has its own stride."""
    made = nn.Sequential()
    for number, (depth, outputs) in enumerate(zip(depths, widths, strict=True)):
        blocks = [block(inputs, outputs, 2 if number else first)]
        blocks += [block(outputs, outputs, 1) for _ in range(depth - 1)]
        made.append(nn.Sequential(*blocks))
        inputs = outputs
    return made


def basic_block(inputs: int, outputs: int, stride: int, dims: int = 2) -> nn.Module:
    """Two 3x3 convolutions."""
    first = conv_norm(inputs, outputs, 3, stride, dims=dims)
    second = conv_norm(outputs, outputs, 3, act=None, dims=dims)
    return Residual(nn.Sequential(first, second), inputs, outputs, stride, dims)


def resnet_stem(inputs: int, outputs: int, dims: int = 2) -> nn.Sequential:
    """7x7 convolution and max-pooling, stride 2 each."""
    pool = nn.MaxPool1d(3, 2, 1) if dims == 1 else nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(conv_norm(inputs, outputs, 7, 2, dims=dims), pool)


def resnet18_1d(width: float) -> nn.Module:
    """ResNet-18 (He et al. 2016) along one axis, on signals of 12 leads as in Ribeiro et al. 2020."""
    widths = [scaled(c, width) for c in (64, 128, 256, 512)]
    stem = resnet_stem(12, widths[0], dims=1)
    body = stages(widths[0], (2, 2, 2, 2), widths, 1, partial(basic_block, dims=1))
    return Classifier(nn.Sequential(stem, body), classifier_head(widths[-1], width, dims=1))


def resnext50_32x4d(width: float) -> nn.Module:
    """ResNeXt-50 (Xie et al. 2017); the multiplier scales the 32 groups, not their widths."""
    groups, stem = scaled(32, width), scaled(64, width)

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        inner = outputs // 2
        grouped = conv_norm(inner, inner, 3, stride, groups=groups)
        body = nn.Sequential(conv_norm(inputs, inner), grouped, conv_norm(inner, outputs, act=None))
        return Residual(body, inputs, outputs, stride)

    widths = [groups * c for c in (8, 16, 32, 64)]
    body = stages(stem, (3, 4, 6, 3), widths, 1, block)
    return Classifier(nn.Sequential(resnet_stem(3, stem), body), classifier_head(widths[-1], width))


class SqueezeExciteLinear(nn.Module):
    """Squeeze-excite with linear layers, between views."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(channels, squeezed), relu(), nn.Linear(squeezed, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, _, _ = x.size()
        scale = self.fc(self.pool(x).view(batch, channels)).view(batch, channels, 1, 1)
        return x * scale.expand_as(x)


def se_resnet50(width: float) -> nn.Module:
    """SE-ResNet-50 (Hu et al. 2018)."""
    stem = scaled(64, width)

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        inner = outputs // 4
        convs = (conv_norm(inputs, inner), conv_norm(inner, inner, 3, stride), conv_norm(inner, outputs, act=None))
        squeeze = SqueezeExciteLinear(outputs, max(1, outputs // 16))
        return Residual(nn.Sequential(*convs, squeeze), inputs, outputs, stride)

    widths = [4 * scaled(c, width) for c in (64, 128, 256, 512)]
    body = stages(stem, (3, 4, 6, 3), widths, 1, block)
    return Classifier(nn.Sequential(resnet_stem(3, stem), body), classifier_head(widths[-1], width))


def regnet_y_400mf(width: float) -> nn.Module:
    """RegNetY-400MF (Radosavovic et al. 2020): groups of 8 channels, squeeze-excite before the last convolution."""
    stem = scaled(32, width)

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        grouped = conv_norm(outputs, outputs, 3, stride, groups=outputs // 8)
        squeeze = SqueezeExcite(outputs, scaled(inputs, 0.25), relu, nn.Sigmoid)
        body = nn.Sequential(conv_norm(inputs, outputs), grouped, squeeze, conv_norm(outputs, outputs, act=None))
        return Residual(body, inputs, outputs, stride)

    widths = [scaled(c, width, 8) for c in (48, 104, 208, 440)]
    body = stages(stem, (1, 3, 6, 6), widths, 2, block)
    return Classifier(nn.Sequential(conv_norm(3, stem, 3, 2), body), classifier_head(widths[-1], width))


# ---- mobile networks ----


def inverted_residual(
    inputs: int, hidden: int, outputs: int, kernel: int, stride: int, squeeze: nn.Module | None, unit: Unit
) -> nn.Module:
    """1x1 expansion (none where hidden == inputs), depthwise convolution, squeeze-excite, linear 1x1 projection."""
    layers: list[nn.Module] = [unit(inputs, hidden)] if hidden != inputs else []
    layers += [unit(hidden, hidden, kernel, stride, groups=hidden), *([squeeze] if squeeze else [])]
    body = nn.Sequential(*layers, unit(hidden, outputs, act=None))
    return Skip(body) if stride == 1 and inputs == outputs else body


#: kernel, hidden, outputs, squeeze-excite, hardswish, stride (table 1 of the paper)
MOBILENET_V3_LARGE = """
    3 16 16 0 0 1; 3 64 24 0 0 2; 3 72 24 0 0 1;
    5 72 40 1 0 2; 5 120 40 1 0 1; 5 120 40 1 0 1;
    3 240 80 0 1 2; 3 200 80 0 1 1; 3 184 80 0 1 1; 3 184 80 0 1 1;
    3 480 112 1 1 1; 3 672 112 1 1 1; 5 672 160 1 1 2; 5 960 160 1 1 1; 5 960 160 1 1 1"""


def mobilenet_v3_large(width: float) -> nn.Module:
    """MobileNetV3-Large (Howard et al. 2019)."""
    channels, last, hidden = divisible(16 * width), divisible(960 * width), divisible(1280 * width)
    features = nn.Sequential(conv_norm(3, channels, 3, 2, act=hardswish, eps=1e-3))
    for kernel, inner, base, excite, hard, stride in numbers(MOBILENET_V3_LARGE):
        inner, outputs = divisible(inner * width), divisible(base * width)
        squeeze = SqueezeExcite(inner, divisible(inner / 4), relu, nn.Hardsigmoid) if excite else None
        unit = partial(conv_norm, act=hardswish if hard else relu, eps=1e-3)
        features.append(inverted_residual(channels, inner, outputs, kernel, stride, squeeze, unit))
        channels = outputs
    features.append(conv_norm(channels, last, act=hardswish, eps=1e-3))
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(last, hidden), hardswish(), nn.Dropout(0.2, inplace=True))
    return Classifier(features, nn.Sequential(*pool, nn.Linear(hidden, scaled(1000, width))))


#: expansion, kernel, stride, outputs, blocks (table 1 of the paper)
EFFICIENTNET_B0 = "1 3 1 16 1; 6 3 2 24 2; 6 5 2 40 2; 6 3 2 80 3; 6 5 1 112 3; 6 5 2 192 4; 6 3 1 320 1"


def efficientnet_b0(width: float) -> nn.Module:
    """EfficientNet-B0 (Tan and Le 2019)."""
    channels, last = divisible(32 * width), divisible(1280 * width)
    unit = partial(conv_norm, act=silu)
    features = nn.Sequential(unit(3, channels, 3, 2))
    for expansion, kernel, first_stride, base, blocks in numbers(EFFICIENTNET_B0):
        outputs = divisible(base * width)
        for stride in (first_stride, *[1] * (blocks - 1)):
            hidden = channels * expansion
            squeeze = SqueezeExcite(hidden, channels // 4, silu, nn.Sigmoid)
            features.append(inverted_residual(channels, hidden, outputs, kernel, stride, squeeze, unit))
            channels = outputs
    features.append(unit(channels, last))
    return Classifier(features, classifier_head(last, width, 0.2))


class ShuffleUnit(nn.Module):
    """Split, transform one half (both where the stride is 2), concatenate, shuffle the two halves."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half, self.stride = outputs // 2, stride
        taken = half if stride == 1 else inputs
        depthwise = partial(conv_norm, kernel=3, stride=stride, act=None)
        if stride == 2:
            self.left = nn.Sequential(depthwise(inputs, inputs, groups=inputs), conv_norm(inputs, half))
        self.right = nn.Sequential(conv_norm(taken, half), depthwise(half, half, groups=half), conv_norm(half, half))

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            kept, taken = x.chunk(2, dim=1)
            y = torch.cat((kept, self.right(taken)), dim=1)
        else:
            y = torch.cat((self.left(x), self.right(x)), dim=1)
        batch, channels, rows, columns = y.size()
        y = y.view(batch, 2, channels // 2, rows, columns).transpose(1, 2).contiguous()
        return y.view(batch, channels, rows, columns)


def shufflenet_v2(width: float) -> nn.Module:
    """ShuffleNetV2 x1.0 (Ma et al. 2018)."""
    stem, last = scaled(24, width), scaled(1024, width)
    widths = [scaled(c, width, 2) for c in (116, 232, 464)]
    body = stages(stem, (4, 8, 4), widths, 2, ShuffleUnit)
    features = nn.Sequential(conv_norm(3, stem, 3, 2), nn.MaxPool2d(3, 2, 1), body, conv_norm(widths[-1], last))
    mean = Apply(lambda x: x.mean([2, 3]))
    return Classifier(features, nn.Sequential(mean, nn.Linear(last, scaled(1000, width))))


# ---- networks that concatenate ----


class DenseBlock(nn.Module):
    """Each layer reads the concatenation of the input and of all earlier layers' outputs."""

    def __init__(self, inputs: int, growth: int, depth: int) -> None:
        super().__init__()
        inner, self.layers = 4 * growth, nn.ModuleList()
        for joined in range(inputs, inputs + depth * growth, growth):
            narrow = nn.BatchNorm2d(joined), relu(), nn.Conv2d(joined, inner, 1, bias=False)
            grow = nn.BatchNorm2d(inner), relu(), nn.Conv2d(inner, growth, 3, padding=1, bias=False)
            self.layers.append(nn.Sequential(*narrow, *grow))

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.layers:
            maps.append(layer(torch.cat(maps, 1)))
        return torch.cat(maps, 1)


def densenet121(width: float) -> nn.Module:
    """DenseNet-121 (Huang et al. 2017)."""
    growth, channels = scaled(32, width), scaled(64, width)
    features = nn.Sequential(resnet_stem(3, channels))
    for depth in (6, 12, 24, 16):
        if len(features) > 1:
            conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
            features.append(nn.Sequential(nn.BatchNorm2d(channels), relu(), conv, nn.AvgPool2d(2, 2)))
            channels //= 2
        features.append(DenseBlock(channels, growth, depth))
        channels += depth * growth
    features.extend([nn.BatchNorm2d(channels), relu()])
    return Classifier(features, classifier_head(channels, width))


def squeezenet1_1(width: float) -> nn.Module:
    """SqueezeNet 1.1 (Iandola et al. 2016): convolutions with bias, no BatchNorm, a convolution as classifier."""

    def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, padding: int = 0) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding), relu())

    channels = scaled(64, width)
    features = nn.Sequential(conv(3, channels, 3, 2))
    for base in (16, 16, 32, 32, 48, 48, 64, 64):
        if len(features) in (1, 4, 7):
            features.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        narrow, wide = scaled(base, width), scaled(4 * base, width)
        fire = Branches(narrow, conv(narrow, wide), conv(narrow, wide, 3, padding=1))
        features.append(nn.Sequential(conv(channels, narrow), fire))
        channels = 2 * wide
    head = (nn.Dropout(0.5), conv(channels, scaled(1000, width)), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    return Classifier(features, nn.Sequential(*head))


class Inceptions:
    """The parts of GoogLeNet and Inception-v3, at one width multiplier."""

    def __init__(self, width: float) -> None:
        self.width = width

    def chain(self, inputs: int, *layers: nn.Module | tuple) -> nn.Sequential:
        """Return a sequence; a tuple is a conv_norm: published outputs, kernel, stride, padding."""
        made = nn.Sequential()
        for layer in layers:
            if isinstance(layer, tuple):
                layer = conv_norm(inputs, scaled(layer[0], self.width), *layer[1:], eps=1e-3)
            made.append(layer)
            inputs = outputs_of(layer, inputs)
        return made

    def branches(self, inputs: int, *branches: tuple) -> Branches:
        """Return parallel chains, each a tuple of layers."""
        return Branches(inputs, *(self.chain(inputs, *layers) for layers in branches))


#: outputs of the four branches' convolutions: 1x1 | 1x1, 3x3 | 1x1, 3x3 | 1x1 after pooling
GOOGLENET = """
    64 96 128 16 32 32; 128 128 192 32 96 64; 192 96 208 16 48 64; 160 112 224 24 64 64; 128 128 256 24 64 64;
    112 144 288 32 64 64; 256 160 320 32 128 128; 256 160 320 32 128 128; 384 192 384 48 128 128"""


def googlenet(width: float) -> nn.Module:
    """GoogLeNet (Szegedy et al. 2015) with BatchNorm, its 5x5 convolutions 3x3, as in torchvision."""
    make, pool = Inceptions(width), partial(nn.MaxPool2d, ceil_mode=True)
    features = make.chain(3, (64, 7, 2), pool(3, 2), (64,), (192, 3), pool(3, 2))
    for number, (a, b, c, d, e, f) in enumerate(numbers(GOOGLENET)):
        branches = ((a,),), ((b,), (c, 3)), ((d,), (e, 3)), (pool(3, 1, 1), (f,))
        features.append(make.branches(outputs_of(features, 3), *branches))
        if number in (1, 6):
            features.append(pool(3 if number == 1 else 2, 2))
    return Classifier(features, classifier_head(outputs_of(features, 3), width, 0.2))


def inception_v3(width: float) -> nn.Module:
    """Inception-v3 (Szegedy et al. 2016)."""
    make = Inceptions(width)
    row, column, average = (1, 7), (7, 1), partial(nn.AvgPool2d, 3, 1, 1)
    features = make.chain(3, (32, 3, 2, 0), (32, 3, 1, 0), (64, 3), nn.MaxPool2d(3, 2))
    features.extend(make.chain(outputs_of(features, 3), (80,), (192, 3, 1, 0), nn.MaxPool2d(3, 2)))

    def add(*branches: tuple) -> None:
        features.append(make.branches(outputs_of(features, 3), *branches))

    def fork() -> Branches:
        return make.branches(scaled(384, width), ((384, (1, 3)),), ((384, (3, 1)),))

    for c in (32, 64, 64):
        add(((64,),), ((48,), (64, 5)), ((64,), (96, 3), (96, 3)), (average(), (c,)))
    add(((384, 3, 2, 0),), ((64,), (96, 3), (96, 3, 2, 0)), (nn.MaxPool2d(3, 2),))
    for c in (128, 160, 160, 192):
        twice = ((c,), (c, column), (c, row), (c, column), (192, row))
        add(((192,),), ((c,), (c, row), (192, column)), twice, (average(), (192,)))
    add(((192,), (320, 3, 2, 0)), ((192,), (192, row), (192, column), (192, 3, 2, 0)), (nn.MaxPool2d(3, 2),))
    for _ in range(2):
        add(((320,),), ((384,), fork()), ((448,), (384, 3), fork()), (average(), (192,)))
    return Classifier(features, classifier_head(outputs_of(features, 3), width, 0.5))


# ---- NASNet ----


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


# ---- LayerNorm, linear layers, attention ----


class LayerScale(nn.Module):
    """x times one parameter per channel, near 1 (not 1e-6, as published, which would hide a block from the tests)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def norm_channels(channels: int) -> nn.Sequential:
    """Return LayerNorm over the channels of a map."""
    return nn.Sequential(channels_last(), nn.LayerNorm(channels, 1e-6), channels_first())


def norm_mlp(channels: int) -> tuple[nn.Module, ...]:
    """Return LayerNorm and two linear layers over the last axis, four times wider in between."""
    wide = 4 * channels
    return nn.LayerNorm(channels, 1e-6), nn.Linear(channels, wide), nn.GELU(), nn.Linear(wide, channels)


def convnext_tiny(width: float) -> nn.Module:
    """ConvNeXt-T (Liu et al. 2022)."""
    widths = [scaled(c, width) for c in (96, 192, 384, 768)]
    features = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), norm_channels(widths[0]))
    channels = widths[0]
    for depth, outputs in zip((3, 3, 9, 3), widths, strict=True):
        if len(features) > 2:
            features.append(nn.Sequential(norm_channels(channels), nn.Conv2d(channels, outputs, 2, 2)))
        channels = outputs
        for _ in range(depth):
            depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
            island = channels_last(), *norm_mlp(channels), channels_first()
            features.append(Skip(nn.Sequential(depthwise, *island, LayerScale(channels))))
    head = nn.AdaptiveAvgPool2d(1), norm_channels(channels), nn.Flatten(1), nn.Linear(channels, scaled(1000, width))
    return Classifier(features, nn.Sequential(*head))


class Attention(nn.Module):
    """Multi-head self-attention over tokens (N, tokens, channels)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, channels // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * (channels // self.heads) ** -0.5).softmax(dim=-1)
        return self.project((weights @ v).transpose(1, 2).reshape(batch, tokens, channels))


class AttentionHybrid(nn.Module):
    """Residual stages of ResNet-18, then four transformer blocks on their positions, mean over tokens, classifier."""

    def __init__(self, width: float) -> None:
        super().__init__()
        widths = [scaled(c, width, 4) for c in (64, 128, 256)]
        channels = widths[-1]
        self.stem = resnet_stem(3, widths[0])
        self.body = stages(widths[0], (2, 2, 2), widths, 1, basic_block)
        self.blocks = nn.Sequential()
        for _ in range(4):
            self.blocks.append(Skip(nn.Sequential(nn.LayerNorm(channels), Attention(channels, 4))))
            self.blocks.append(Skip(nn.Sequential(*norm_mlp(channels))))
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, scaled(1000, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.body(self.stem(x)).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


# ---- dense prediction ----


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with BatchNorm; maps of odd size are padded to their skip's."""

    def __init__(self, width: float) -> None:
        super().__init__()
        widths = [scaled(c, width) for c in (64, 128, 256, 512, 1024)]

        def double(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(conv_norm(inputs, outputs, 3), conv_norm(outputs, outputs, 3))

        self.down = nn.ModuleList(double(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        sides = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in sides)
        self.merge = nn.ModuleList(double(2 * b, b) for _, b in sides)
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for down in self.down:
            x = down(self.pool(x) if skips else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = up(x)
            rows, columns = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
            x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
            x = merge(torch.cat([skip, x], dim=1))
        return self.head(x)


class Detector(nn.Module):
    """FCOS (Tian et al. 2019) without centreness on ResNet-18: a feature pyramid, two heads shared by its five levels.

    Returns the class maps (80 classes) and the box maps (4 distances) as two lists, finest level first.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        widths = [scaled(c, width) for c in (64, 128, 256, 512)]
        groups = scaled(32, width)
        channels = 8 * groups
        self.stem = resnet_stem(3, widths[0])
        self.stages = stages(widths[0], (2, 2, 2, 2), widths, 1, basic_block)
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in widths[1:])
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in widths[1:])
        self.coarser = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(2))

        def tower(outputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for _ in range(4):
                layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(groups, channels), relu()]
            return nn.Sequential(*layers, nn.Conv2d(channels, outputs, 3, padding=1))

        self.classes, self.boxes = tower(80), tower(4)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Return five maps of equal width, finest first."""
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        top = self.lateral[-1](maps.pop())
        levels = [self.smooth[-1](top)]
        for lateral, smooth in zip(self.lateral[-2::-1], self.smooth[-2::-1], strict=True):
            skip = lateral(maps.pop())
            top = skip + F.interpolate(top, size=skip.shape[-2:], mode="nearest")
            levels.insert(0, smooth(top))
        levels.append(self.coarser[0](levels[-1]))
        levels.append(self.coarser[1](F.relu(levels[-1])))
        return levels

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        levels = self.pyramid(x)
        return [self.classes(level) for level in levels], [F.relu(self.boxes(level)) for level in levels]


def entry(
    build: Callable[[float], nn.Module],
    input_shape: tuple[int, ...] = (3, 224, 224),
    small_shape: tuple[int, ...] = (3, 64, 64),
    kind: Literal["plain", "hybrid"] = "plain",
) -> Architecture:
    """Return the row of a network, initialised after He et al. 2015: torch's defaults fade to 1e-12 in deep ones."""

    def initialised(width: float) -> nn.Module:
        network = build(width)
        for module in network.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        return network

    return Architecture(build=initialised, input_shape=input_shape, small_shape=small_shape, kind=kind)


ARCHITECTURES: dict[str, Architecture] = {
    "densenet121": entry(densenet121),
    "googlenet": entry(googlenet),
    "inception_v3": entry(inception_v3, (3, 299, 299), (3, 75, 75)),
    "squeezenet1_1": entry(squeezenet1_1),
    "shufflenet_v2": entry(shufflenet_v2),
    "mobilenet_v3_large": entry(mobilenet_v3_large),
    "efficientnet_b0": entry(efficientnet_b0),
    "regnet_y_400mf": entry(regnet_y_400mf),
    "resnext50_32x4d": entry(resnext50_32x4d),
    "se_resnet50": entry(se_resnet50),
    "nasnet_a_mobile": entry(NasNetA),
    "convnext_tiny": entry(convnext_tiny, kind="hybrid"),
    "unet": entry(UNet, (3, 256, 256), (3, 37, 45)),
    "fpn_detector": entry(Detector, (3, 256, 256)),
    "resnet18_1d": entry(resnet18_1d, (12, 4096), (12, 128)),
    "attention_hybrid": entry(AttentionHybrid, kind="hybrid"),
}
