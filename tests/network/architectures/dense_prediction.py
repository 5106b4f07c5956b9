"""Dense prediction: U-Net, a detector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.network.architectures.parts import conv_norm, relu, scaled
from tests.network.architectures.residual import basic_block, resnet_stem, stages


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with BatchNorm; maps of odd size are padded to their skip's."""

    def __init__(self, width: float) -> None:
        super().__init__()
        widths = [scaled(c, width) for c in (64, 128, 256, 512, 1024)]

        def double(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(conv_norm(inputs, outputs, 3), conv_norm(outputs, outputs, 3))

        self.down = nn.ModuleList(double(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        sides = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in sides)
        self.merge = nn.ModuleList(double(2 * b, b) for _, b in sides)
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for down in self.down:
            x = down(self.pool(x) if skips else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = up(x)
            rows, columns = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
            x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
            x = merge(torch.cat([skip, x], dim=1))
        return self.head(x)


class Detector(nn.Module):
    """FCOS (Tian et al. 2019) without centreness on ResNet-18: a feature pyramid, two heads shared by its five levels.

    Returns the class maps (80 classes) and the box maps (4 distances) as two lists, finest level first.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        widths = [scaled(c, width) for c in (64, 128, 256, 512)]
        groups = scaled(32, width)
        channels = 8 * groups
        self.stem = resnet_stem(3, widths[0])
        self.stages = stages(widths[0], (2, 2, 2, 2), widths, 1, basic_block)
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in widths[1:])
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in widths[1:])
        self.coarser = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(2))

        def tower(outputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for _ in range(4):
                layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(groups, channels), relu()]
            return nn.Sequential(*layers, nn.Conv2d(channels, outputs, 3, padding=1))

        self.classes, self.boxes = tower(80), tower(4)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Return five maps of equal width, finest first."""
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        top = self.lateral[-1](maps.pop())
        levels = [self.smooth[-1](top)]
        for lateral, smooth in zip(self.lateral[-2::-1], self.smooth[-2::-1], strict=True):
            skip = lateral(maps.pop())
            top = skip + F.interpolate(top, size=skip.shape[-2:], mode="nearest")
            levels.insert(0, smooth(top))
        levels.append(self.coarser[0](levels[-1]))
        levels.append(self.coarser[1](F.relu(levels[-1])))
        return levels

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        levels = self.pyramid(x)
        return [self.classes(level) for level in levels], [F.relu(self.boxes(level)) for level in levels]
