"""Wide ResNets (Zagoruyko and Komodakis 2016): pre-activation, widths 16, 16k, 32k, 64k."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bar_edge.errors import InputError
from bar_edge.models.layers import conv, initialise, scaled


class PreActivationBlock(nn.Module):
    """BN, ReLU, 3x3 convolution, twice, and the addition.

    Where the shape changes, a 1x1 convolution without BatchNorm replaces the identity; it reads
    what the first BN and ReLU return, as in the authors' code.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        self.relu = nn.ReLU()
        self.shortcut = conv(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = self.relu(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(self.relu(self.bn2(self.conv1(y))))
        result: Tensor = y + identity
        return result


class WideResNet(nn.Module):
    """Stem, three stages of pre-activation blocks, BN, ReLU, global average, classifier."""

    def __init__(self, blocks: int, widths: tuple[int, ...], in_channels: int, classes: int) -> None:
        super().__init__()
        stem, *stages = widths
        self.conv1 = conv(in_channels, stem, 3)
        layers: list[nn.Module] = []
        channels = stem
        for number, outputs in enumerate(stages):
            stage: list[nn.Module] = []
            for index in range(blocks):
                stage.append(PreActivationBlock(channels, outputs, 2 if index == 0 and number > 0 else 1))
                channels = outputs
            layers.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, classes)."""
        x = self.relu(self.bn(self.stages(self.conv1(x))))
        result: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return result


def wide_resnet(
    depth: int, factor: int, input_shape: tuple[int, int, int], classes: int, width: float = 1.0
) -> WideResNet:
    """Return wrn-depth-factor; raises InputError unless depth is 6n+4 with n >= 1 and factor >= 1."""
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1 or factor < 1:
        below = max(1, (depth - 4) // 6) * 6 + 4
        raise InputError(
            "wrn-D-K with D = 6n+4 (10, 16, 22, 28, ...) and K at least 1",
            got=f"wrn-{depth}-{factor}",
            remedy=f"take wrn-{below}-{max(1, factor)}",
        )
    widths = (scaled(16, width), *(scaled(16 * factor * 2**i, width) for i in range(3)))
    return WideResNet(blocks, widths, input_shape[0], classes)
