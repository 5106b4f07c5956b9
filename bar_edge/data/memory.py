"""Splits of a data set that lives decoded in memory, as one uint8 tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from bar_edge.data import augment as augmentation
from bar_edge.data.source import DataSource, Shape, Targets, count_batches, each, generator, take

#: name of images without meaning, and how many there are
RANDOM, RANDOM_IMAGES, RANDOM_HELD_OUT = "random", 512, 256


class Pixels:
    """One tensor of images with its targets, copied at most once to each device that asks.

    images: uint8 (N, C, H, W); targets: of (N, ...) tensors. Splits share it and hold indices.
    """

    def __init__(self, images: Tensor, targets: Targets) -> None:
        self.images, self.targets = images, targets
        self._copies: dict[torch.device, tuple[Tensor, Targets]] = {images.device: (images, targets)}

    def on(self, device: torch.device) -> tuple[Tensor, Targets]:
        """Return (images, targets) on a device."""
        if device not in self._copies:
            self._copies[device] = (self.images.to(device), each(lambda t: t.to(device), self.targets))
        return self._copies[device]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemorySplit:
    """A subset of Pixels; see `Split`."""

    pixels: Pixels
    #: (n,) rows of pixels, in the order of the split
    indices: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    #: what augment="auto" does
    automatic: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    def all_targets(self) -> Targets:
        """Return the targets of every image, in the order of the split."""
        return take(self.pixels.targets, self.indices)

    def n_batches(self, batch: int, drop_last: bool) -> int:
        """Return how many batches one pass yields."""
        return count_batches(len(self), batch, drop_last)

    def batches(
        self,
        batch: int,
        *,
        train: bool,
        seed: int,
        epoch: int,
        device: torch.device | str,
        augment: str = "auto",
        first: int = 0,
    ) -> Iterator[tuple[Tensor, Targets]]:
        """Yield (images, targets) on `device`; see `Split.batches`."""
        device = torch.device(device)
        images, targets = self.pixels.on(device)
        names = augmentation.parse(augment, self.automatic) if train else ()
        draws = augmentation.Draws.of(len(self), images.shape[2], seed=seed, epoch=epoch)
        indices = (self.indices[draws.order] if train else self.indices).to(device)
        # moved once an epoch: a copy per batch would make a GPU wait
        rows, columns, flip = (t.to(device) for t in (draws.rows, draws.columns, draws.flip))
        for number in range(first, self.n_batches(batch, drop_last=train)):
            part = slice(number * batch, (number + 1) * batch)
            chosen = images[indices[part]], take(targets, indices[part])
            moved, aims = augmentation.move(*chosen, rows[part], columns[part], flip[part], names)
            yield augmentation.normalise(moved, self.mean, self.std), aims


def random_data(
    input_shape: Shape, classes: tuple[str, ...], mean: tuple[float, ...], std: tuple[float, ...]
) -> DataSource:
    """Return images and labels without meaning, for measuring speed where the data set is not at hand."""
    count = RANDOM_IMAGES + RANDOM_HELD_OUT
    images = torch.randint(0, 256, (count, *input_shape), dtype=torch.uint8, generator=generator(0))
    pixels = Pixels(images, torch.zeros(count, dtype=torch.int64))

    def split(start: int, end: int) -> MemorySplit:
        return MemorySplit(pixels=pixels, indices=torch.arange(start, end), mean=mean, std=std, automatic=())

    held_out = split(RANDOM_IMAGES, count)
    return DataSource(
        name=RANDOM,
        input_shape=input_shape,
        classes=classes,
        mean=mean,
        std=std,
        fit=split(0, RANDOM_IMAGES),
        held_out=held_out,
        test=held_out,
    )
