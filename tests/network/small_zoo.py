"""Small networks with what public collections are built of and what once failed: the zoo that needs no timm.

Each is a factory for `--model tests/network/small_zoo.py:NAME`, of images of 3x16x16. What is trained is random, and so
are scales, biases and statistics: zeros and ones would hide a mistake.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE = (3, 16, 16)
WIDTH = 16


def _random(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(*shape) + 0.5)


def _conv_norm(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    norm = nn.BatchNorm2d(outputs)
    nn.init.uniform_(norm.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
    nn.init.uniform_(norm.bias, -0.2, 0.2)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False), norm)


class Classifier(nn.Module):
    """A stem of stride 2, the blocks in question, a 3x3 convolution, global average and the classifier."""

    def __init__(self, *blocks: nn.Module, classes: int) -> None:
        super().__init__()
        self.stem = _conv_norm(3, WIDTH, stride=2)
        self.blocks = nn.Sequential(*blocks)
        self.last = _conv_norm(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        result: Tensor = self.head(F.relu(self.last(x)).mean((2, 3)))
        return result


class LayerScale(nn.Module):
    """ConvNeXt's block: depthwise, a norm and linear layers over channels last, and a parameter that scales."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH)
        self.norm, self.gamma = nn.LayerNorm(WIDTH), _random(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.narrow(F.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class Tokens(nn.Module):
    """A class token, positions that are added, and attention with a bias for every pair of positions."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token, self.positions, self.bias = _random(1, 1, WIDTH), _random(1, 17, WIDTH), _random(2, 17, 17)
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        q, k, v = self.qkv(self.norm(x)).reshape(-1, 17, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-2, -1) * 0.3 + self.bias).softmax(-1)
        x = x + self.proj((attention @ v).transpose(1, 2).reshape(-1, 17, WIDTH))
        x = x + self.narrow(F.gelu(self.wide(x)))
        result: Tensor = self.head(x[:, 0])
        return result


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters are standardised before every use (BiT, NFNet)."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Casts(nn.Module):
    """Types named in forward, as code for mixed precision has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), _random(WIDTH, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).float()
        y = y * torch.rsqrt(y.pow(2).mean((2, 3), keepdim=True) + 1e-6) * self.scale.to(y.dtype)
        with torch.no_grad():
            position = torch.arange(8, device=x.device).to(y.dtype) / 8
        return x + F.relu(y + position).to(x.dtype)


class FrozenBatchNorm(nn.Module):
    """BatchNorm of buffers, as detectors write it: arithmetic on constants alone."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, variance = self.weight.reshape(1, -1, 1, 1), self.running_var.reshape(1, -1, 1, 1)  # type: ignore
        scale = weight * (variance + 1e-5).rsqrt()
        bias = self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale  # type: ignore
        return x * scale + bias


class Residual(nn.Module):
    """A residual of convolutions: of any kind, each before its norm."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.layers(x)
        return result


class Shuffle(nn.Module):
    """ShuffleNet's unit: half of the channels, its branch, and a shuffle that is written by swapaxes."""

    def __init__(self) -> None:
        super().__init__()
        half = WIDTH // 2
        self.branch = nn.Sequential(_conv_norm(half, half), nn.ReLU(), _conv_norm(half, half))

    def forward(self, x: Tensor) -> Tensor:
        kept, rest = x.chunk(2, dim=1)
        x = torch.cat([kept, self.branch(rest)], 1)
        n, c, h, w = x.shape
        return x.reshape(n, 2, c // 2, h, w).swapaxes(1, 2).reshape(n, c, h, w)


class Attention(nn.Module):
    """torch's own attention module over the positions of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        y = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return x + y.transpose(1, 2).reshape(x.shape)


class CBAM(nn.Module):
    """Channel attention of one branch that is called twice and summed, then attention over space."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = _conv_norm(WIDTH, WIDTH)
        self.squeeze = nn.Sequential(nn.Conv2d(WIDTH, 4, 1), nn.ReLU(), nn.Conv2d(4, WIDTH, 1))
        self.space = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True)) + self.squeeze(y.amax((2, 3), keepdim=True)))
        maps = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
        return F.relu(x + y * torch.sigmoid(self.space(maps)))


class Names(nn.Module):
    """Layers whose names are no identifiers: hyphens, slashes, umlauts, keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleDict({name: _conv_norm(WIDTH, WIDTH) for name in ("conv-3x3", "P3/8", "ä", "class")})

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + sum(path(x) for path in self.paths.values()))


class SplitAttention(nn.Module):
    """ResNeSt's: two parts of a grouped convolution, weighed by a softmax over the parts and summed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = _conv_norm(WIDTH, 2 * WIDTH, groups=2)
        self.squeeze = nn.Sequential(nn.Conv2d(WIDTH, 8, 1), nn.ReLU(), nn.Conv2d(8, 2 * WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = F.relu(self.conv(x)).reshape(n, 2, c, h, w)
        weights = self.squeeze(parts.sum(1).mean((2, 3), keepdim=True)).reshape(n, 2, c, 1, 1).softmax(1)
        return x + (parts * weights).sum(1)


def layer_scale(num_classes: int) -> nn.Module:
    return Classifier(LayerScale(), LayerScale(), classes=num_classes)


def tokens(num_classes: int) -> nn.Module:
    return Tokens(num_classes)


def weight_standardisation(num_classes: int) -> nn.Module:
    convs = [StandardisedConv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2)]
    return Classifier(Residual(convs[0], nn.GroupNorm(4, WIDTH), nn.ReLU(), convs[1]), classes=num_classes)


def casts(num_classes: int) -> nn.Module:
    return Classifier(Casts(), Casts(), classes=num_classes)


def frozen_batchnorm(num_classes: int) -> nn.Module:
    convs = [nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in range(2)]
    return Classifier(
        Residual(convs[0], FrozenBatchNorm(), nn.ReLU(), convs[1], FrozenBatchNorm()), classes=num_classes
    )


def shuffle(num_classes: int) -> nn.Module:
    return Classifier(Shuffle(), Shuffle(), classes=num_classes)


def attention(num_classes: int) -> nn.Module:
    return Classifier(Attention(), classes=num_classes)


def cbam(num_classes: int) -> nn.Module:
    return Classifier(CBAM(), CBAM(), classes=num_classes)


def names(num_classes: int) -> nn.Module:
    return Classifier(Names(), classes=num_classes)


def split_attention(num_classes: int) -> nn.Module:
    return Classifier(SplitAttention(), classes=num_classes)
