"""VGG-16 with BatchNorm (Simonyan and Zisserman 2015), parameter names as in torchvision's vgg16_bn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bar_edge.models.layers import conv, initialise, is_small, scaled

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Convolutions with BatchNorm, average pooling, classifier."""

    def __init__(self, features: nn.Module, avgpool: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features, self.avgpool, self.classifier = features, avgpool, classifier
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, classes)."""
        result: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return result


def vgg16(input_shape: tuple[int, int, int], classes: int, width: float = 1.0) -> VGG:
    """Return VGG-16 with BatchNorm; small inputs get the CIFAR head (global average, one linear layer)."""
    channels, *sides = input_shape
    layers: list[nn.Module] = []
    for stage in STAGES:
        for base in stage:
            outputs = scaled(base, width)
            # the bias is redundant before BatchNorm; torchvision's state dicts hold it
            layers += [conv(channels, outputs, 3, bias=True), nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        # an 8x8 input has nothing left to pool after three stages
        if min(sides) > 1:
            layers.append(nn.MaxPool2d(2))
            sides = [side // 2 for side in sides]
    if is_small(input_shape):
        return VGG(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes))
    hidden = scaled(4096, width)
    classifier = nn.Sequential(
        nn.Linear(channels * 7 * 7, hidden), nn.ReLU(), nn.Dropout(),
        nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(),
        nn.Linear(hidden, classes),
    )  # fmt: skip
    return VGG(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(7), classifier)
