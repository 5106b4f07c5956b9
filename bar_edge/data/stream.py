"""Splits of a data set too big for memory: worker processes decode, and hold a few batches at most."""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bar_edge.data import augment as augmentation
from bar_edge.data.images import Geometry, Images, UnlikeOthersError, corrupt, decode
from bar_edge.data.source import Targets, count_batches, each, generator, take
from bar_edge.errors import InputError

#: batches that each worker decodes ahead
_AHEAD = 2


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """One batch for a worker: images and where each is cropped."""

    indices: tuple[int, ...]
    corners: tuple[tuple[float, float], ...]


class _Decoder(Dataset[Any]):
    """Maps a job to its pixels, uint8 (N, C, H, W), or to the text of what went wrong."""

    def __init__(self, images: Images, geometry: Geometry) -> None:
        self.images, self.geometry = images, geometry

    def __getitem__(self, job: _Job) -> Tensor | str:
        # an exception of ours would lose its fields on the way out of a worker process
        try:
            arrays = [
                decode(self.images, index, self.geometry, corner)
                for index, corner in zip(job.indices, job.corners, strict=True)
            ]
        except UnlikeOthersError as error:
            return f"{error}, unlike the others"
        except InputError as error:
            return error.got
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _leave_interrupts(_: int) -> None:
    """Leave Ctrl-C and a closed terminal to the parent, which has a step to end and a checkpoint to write."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _unchanged(item: Any) -> Any:
    return item


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StreamSplit:
    """A subset of encoded images, decoded anew in every pass; see `Split`."""

    images: Images
    #: targets of all images
    targets: Targets
    #: (n,) rows of images, in the order of the split
    indices: Tensor
    geometry: Geometry
    mean: tuple[float, ...]
    std: tuple[float, ...]
    #: what augment="auto" does
    automatic: tuple[str, ...]
    workers: int

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    def all_targets(self) -> Targets:
        """Return the targets of every image, in the order of the split."""
        return take(self.targets, self.indices)

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
        names = augmentation.parse(augment, self.automatic) if train else ()
        draws = augmentation.Draws.of(len(self), self.geometry.height, seed=seed, epoch=epoch)
        indices = self.indices[draws.order] if train else self.indices
        corners = torch.full((len(self), 2), 0.5)
        if self.geometry.resize and "crop" in names:
            # the worker crops from the larger image, so nothing is padded here
            corners = torch.rand((len(self), 2), generator=generator(seed, epoch, 1))
            names = tuple(name for name in names if name != "crop")
        parts = [slice(n * batch, (n + 1) * batch) for n in range(first, self.n_batches(batch, drop_last=train))]
        for part, pixels in zip(parts, self._decoded(indices, corners, parts, device), strict=True):
            rows, columns, flip = (t[part].to(device) for t in (draws.rows, draws.columns, draws.flip))
            targets = each(lambda t: t.to(device), take(self.targets, indices[part]))
            moved = pixels.to(device, non_blocking=True)
            moved, targets = augmentation.move(moved, targets, rows, columns, flip, names)
            yield augmentation.normalise(moved, self.mean, self.std), targets

    def _decoded(self, indices: Tensor, corners: Tensor, parts: list[slice], device: torch.device) -> Iterator[Tensor]:
        jobs = [
            _Job(tuple(indices[part].tolist()), tuple((top, left) for top, left in corners[part].tolist()))
            for part in parts
        ]
        loader: DataLoader[Any] = DataLoader(
            _Decoder(self.images, self.geometry),
            batch_size=None,
            sampler=jobs,
            num_workers=self.workers,
            prefetch_factor=_AHEAD if self.workers else None,
            collate_fn=_unchanged,
            worker_init_fn=_leave_interrupts,
            pin_memory=device.type == "cuda",
            # fork shares what is in memory with the workers instead of sending it
            multiprocessing_context=multiprocessing.get_context("fork") if self.workers else None,
            # without a generator of its own it would draw from, and so change, the global one
            generator=torch.Generator(),
        )
        for item in loader:
            if isinstance(item, str):
                raise corrupt(item)
            yield item
