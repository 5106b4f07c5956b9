"""What a data set is to the rest of the code: three splits that yield normalised batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Shape = tuple[int, int, int]
#: (N, ...) tensors, one or in tuples, lists and dictionaries; the same row of each belongs to one image
Targets = Any
#: value of a mask's pixels that belong to no class (the convention of Pascal VOC and Cityscapes)
UNLABELLED = 255


class Split(Protocol):
    """Images and targets in a fixed order."""

    def __len__(self) -> int:
        """Return the number of images."""

    def all_targets(self) -> Targets:
        """Return the targets of every image, in the order of the split."""

    def n_batches(self, batch: int, drop_last: bool) -> int:
        """Return how many batches one pass yields; drop_last is what training does."""

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
        """Yield (images, targets) on `device`: float32 (N, C, H, W), normalised, channels last if C > 1.

        train: shuffled and augmented by (seed, epoch) alone, without the last partial batch unless
        the split is smaller than one; otherwise everything, in order, as it is. augment: auto (none
        unless the targets are labels), none, or a comma list out of crop, flip; masks move with their
        images. first: how many batches of the epoch to pass over, those before a stop. Raises InputError for
        an unknown augmentation, for one that the targets cannot follow (see `augment.move`) and for an image
        that cannot be decoded.
        """


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """A data set: choices are made on `held_out`, the numbers reported are read once on `test`."""

    #: for reports; never a path
    name: str
    #: channels, height, width
    input_shape: Shape
    classes: tuple[str, ...]
    #: per channel, of the training images scaled to [0, 1]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Split
    held_out: Split
    test: Split
    #: what a person should know of the data, such as files that were left out
    notes: tuple[str, ...] = ()


def each(function: Callable[[Tensor], Tensor], targets: Targets) -> Targets:
    """Return the targets with the function applied to every tensor."""
    return pytree.tree_map(function, targets)


def take(targets: Targets, indices: Tensor) -> Targets:
    """Return the targets of some images."""
    return each(lambda tensor: tensor[indices], targets)


def count_images(targets: Targets) -> int:
    """Return the number of images that the targets belong to."""
    return min((len(tensor) for tensor in pytree.tree_leaves(targets)), default=0)


def are_labels(targets: Targets) -> bool:
    """Tell whether there is one number per image: a class, or a value to regress."""
    return isinstance(targets, Tensor) and targets.ndim == 1


def count_batches(images: int, batch: int, drop_last: bool) -> int:
    """Return the number of batches; a split smaller than one batch is one batch in training too."""
    return max(1, images // batch) if drop_last else -(-images // batch)


def generator(*seeds: int) -> torch.Generator:
    """Return a CPU generator that all the seeds determine together."""
    # torch's CPU generator uses the low 32 bits of a seed only, so the seeds are hashed, not packed;
    # their number goes in too, because SeedSequence ignores zeros at the end
    state = np.random.SeedSequence([len(seeds), *(seed & 0xFFFFFFFF for seed in seeds)]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def stratified(targets: Targets, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices into (rest, chosen), both ascending, with the same share of every class chosen.

    targets: (N,) classes, at least one image of a class with two or more is chosen; anything else
    (masks, floats, structures) is one stratum.
    """
    number = count_images(targets)
    strata = targets if are_labels(targets) and not targets.is_floating_point() else torch.zeros(number)
    draw = generator(seed)
    chosen = torch.zeros(number, dtype=torch.bool)
    for stratum in np.unique(strata.numpy()):
        members = (strata == int(stratum)).nonzero()[:, 0]
        count = max(round(share * len(members)), min(1, len(members) - 1))
        chosen[members[torch.randperm(len(members), generator=draw)[:count]]] = True
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


def channel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel, in units of 255, of uint8 images (N, C, H, W).

    The sums are integers that float64 holds exactly, so the result depends on neither order nor threads.
    """
    channels = pixels.shape[1]
    total = torch.zeros(channels, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for chunk in torch.split(pixels, 64):
        values = chunk.permute(1, 0, 2, 3).reshape(channels, -1).double()
        total += values.sum(1)
        squares += values.square_().sum(1)
    count = pixels.numel() // channels
    mean = total / count
    std = (squares / count - mean**2).clamp_min(0).sqrt()
    # a channel that never changes is left unscaled rather than divided by zero
    std = torch.where(std > 0, std, 255.0)
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
