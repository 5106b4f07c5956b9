"""ResNets (He et al. 2016), for CIFAR (resnet20 to resnet110) and ImageNet (resnet18, resnet50).

Layout and parameter names are torchvision's, v1.5: the stride of a bottleneck sits in its 3x3
convolution. Shortcuts whose shape changes are a 1x1 convolution with BatchNorm, on CIFAR too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bar_edge.models.layers import conv, initialise, is_small, scaled


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the addition: (N, inputs, H, W) -> (N, outputs, H/stride, W/stride)."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, inner, 3, stride)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu = nn.ReLU()
        self.conv2 = conv(inner, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        result: Tensor = self.relu(self.bn2(self.conv2(y)) + identity)
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and the addition: (N, inputs, H, W) -> (N, outputs, H/stride, W/stride)."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv(inner, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        result: Tensor = self.relu(self.bn3(self.conv3(y)) + identity)
        return result


class ResNet(nn.Module):
    """A post-activation ResNet: stem, stages of blocks, global average, classifier.

    stages: (blocks, inner width, output width) of each; every stage but the first halves the map.
    small: a 3x3 stem at full resolution instead of 7x7, stride 2 and max-pooling.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        stages: list[tuple[int, int, int]],
        *,
        stem: int,
        in_channels: int,
        classes: int,
        small: bool,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, stem, 3) if small else conv(in_channels, stem, 7, 2)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.stage_names: list[str] = []
        channels = stem
        for number, (blocks, inner, outputs) in enumerate(stages, start=1):
            layers: list[nn.Module] = []
            for index in range(blocks):
                stride = 2 if index == 0 and number > 1 else 1
                layers.append(block(channels, inner, outputs, stride))
                channels = outputs
            self.add_module(f"layer{number}", nn.Sequential(*layers))
            self.stage_names.append(f"layer{number}")
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
        result: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return result


def cifar_resnet(depth: int, input_shape: tuple[int, int, int], classes: int, width: float = 1.0) -> ResNet:
    """Return the CIFAR ResNet of depth 6n+2 with widths 16, 32, 64 times `width`."""
    blocks = (depth - 2) // 6
    widths = [scaled(16 * 2**i, width) for i in range(3)]
    stages = [(blocks, w, w) for w in widths]
    return ResNet(BasicBlock, stages, stem=widths[0], in_channels=input_shape[0], classes=classes, small=True)


def resnet18(input_shape: tuple[int, int, int], classes: int, width: float = 1.0) -> ResNet:
    """Return torchvision's resnet18 layout; small inputs get a 3x3 stem."""
    stages = [(2, scaled(64 * 2**i, width), scaled(64 * 2**i, width)) for i in range(4)]
    return _imagenet(BasicBlock, stages, input_shape, classes, width)


def resnet50(input_shape: tuple[int, int, int], classes: int, width: float = 1.0) -> ResNet:
    """Return torchvision's resnet50 layout (v1.5); small inputs get a 3x3 stem."""
    blocks = (3, 4, 6, 3)
    stages = [(n, scaled(64 * 2**i, width), scaled(256 * 2**i, width)) for i, n in enumerate(blocks)]
    return _imagenet(Bottleneck, stages, input_shape, classes, width)


def _imagenet(
    block: type[BasicBlock] | type[Bottleneck],
    stages: list[tuple[int, int, int]],
    input_shape: tuple[int, int, int],
    classes: int,
    width: float,
) -> ResNet:
    stem = scaled(64, width)
    small = is_small(input_shape)
    return ResNet(block, stages, stem=stem, in_channels=input_shape[0], classes=classes, small=small)
