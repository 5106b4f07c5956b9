"""Networks with LayerNorm, linear layers and attention: ConvNeXt, a hybrid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.network.architectures.parts import Classifier, Skip, channels_first, channels_last, scaled
from tests.network.architectures.residual import basic_block, resnet_stem, stages


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
