"""Networks that concatenate: DenseNet, SqueezeNet, GoogLeNet, Inception."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tests.network.architectures.parts import (
    Branches,
    Classifier,
    classifier_head,
    conv_norm,
    numbers,
    outputs_of,
    relu,
    scaled,
)
from tests.network.architectures.residual import resnet_stem


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
