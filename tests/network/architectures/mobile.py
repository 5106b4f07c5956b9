"""Mobile networks: MobileNetV3, EfficientNet, ShuffleNetV2."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tests.network.architectures.parts import (
    Apply,
    Classifier,
    Skip,
    SqueezeExcite,
    Unit,
    classifier_head,
    conv_norm,
    divisible,
    hardswish,
    numbers,
    relu,
    scaled,
    silu,
)
from tests.network.architectures.residual import stages


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
