"""Well-known networks in torch alone, for tests: layers, widths, topology and operators of the papers and of their
usual implementations, in-place calls included.

Left out: auxiliary heads and stochastic depth (neither acts at inference), and the published initial values. A width
multiplier scales every width, classes included, so that the tests' networks are small; 1.0 is the published network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from tests.network.architectures.attention import AttentionHybrid, convnext_tiny
from tests.network.architectures.concatenating import densenet121, googlenet, inception_v3, squeezenet1_1
from tests.network.architectures.dense_prediction import Detector, UNet
from tests.network.architectures.mobile import efficientnet_b0, mobilenet_v3_large, shufflenet_v2
from tests.network.architectures.nasnet import NasNetA
from tests.network.architectures.residual import regnet_y_400mf, resnet18_1d, resnext50_32x4d, se_resnet50


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
