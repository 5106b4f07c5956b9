"""What the networks of the zoo share: scaled widths, convolutions, initialisation."""

from __future__ import annotations

from torch import nn

#: inputs up to this side get the CIFAR stem, strides or head of a network; larger ones the ImageNet form
SMALL_INPUT_SIDE = 64


def scaled(channels: int, width: float) -> int:
    """Return a channel count times the uniform width multiplier, at least 1."""
    return max(1, round(channels * width))


def is_small(input_shape: tuple[int, int, int]) -> bool:
    """Tell whether an input (C, H, W) gets the CIFAR form of a network."""
    return max(input_shape[1:]) <= SMALL_INPUT_SIDE


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """Return a convolution padded so that stride 1 keeps the map's size."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


def initialise(network: nn.Module) -> None:
    """Initialise convolutions after He et al. 2015 (fan-out), their biases with 0; the rest keeps torch's defaults."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
