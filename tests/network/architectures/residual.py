"""Residual networks: ResNet, ResNeXt, SE-ResNet, RegNet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from tests.network.architectures.parts import (
    Block,
    Classifier,
    Residual,
    SqueezeExcite,
    classifier_head,
    conv_norm,
    relu,
    scaled,
)


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
