"""MobileNetV2 (Sandler et al. 2018), parameter names as in torchvision's mobilenet_v2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bar_edge.models.layers import conv, initialise, is_small, scaled

#: expansion, output channels, blocks, stride of the first block (table 2 of the paper)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection, and the addition where shapes allow it."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int, expand: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn_relu6(inputs, hidden, 1)] if expand else []
        layers += [
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            conv(hidden, outputs, 1),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Stem, inverted residual blocks, 1x1 convolution, global average, classifier."""

    def __init__(self, input_shape: tuple[int, int, int], classes: int, width: float) -> None:
        super().__init__()
        # CIFAR form: the stem and the second stage keep the resolution
        small = is_small(input_shape)
        channels = scaled(32, width)
        features: list[nn.Module] = [_conv_bn_relu6(input_shape[0], channels, 3, 1 if small else 2)]
        for number, (expansion, base, blocks, first_stride) in enumerate(STAGES):
            outputs = scaled(base, width)
            for index in range(blocks):
                stride = first_stride if index == 0 and not (small and number == 1) else 1
                features.append(InvertedResidual(channels, channels * expansion, outputs, stride, expansion > 1))
                channels = outputs
        last = scaled(1280, width)
        features.append(_conv_bn_relu6(channels, last, 1))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, classes)."""
        result: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return result


def mobilenetv2(input_shape: tuple[int, int, int], classes: int, width: float = 1.0) -> MobileNetV2:
    """Return MobileNetV2 with every width times `width` (not rounded to multiples of 8)."""
    return MobileNetV2(input_shape, classes, width)
