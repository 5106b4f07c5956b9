"""From a data SPEC to a DataSource: in memory where it fits, streamed where it does not."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bar_edge.data.images import Geometry, Images, UnlikeOthersError, decode_all, survey
from bar_edge.data.memory import MemorySplit, Pixels
from bar_edge.data.readers import Raw, read_digits, read_folder, read_hub, read_user
from bar_edge.data.source import (
    UNLABELLED,
    DataSource,
    Split,
    Targets,
    are_labels,
    channel_statistics,
    count_images,
    stratified,
)
from bar_edge.data.stream import StreamSplit
from bar_edge.errors import InputError

#: decoded data sets up to this live in memory
MEMORY_LIMIT_BYTES = 2 * 2**30
#: side of the crop where images differ in size and none was asked for
DEFAULT_SIZE = 224
HELD_OUT_SHARE = 0.1
#: that few images may have: more are a wrong label
_CLASSES = 100_000
#: training images that give mean and deviation of a streamed data set
_STATISTICS_SAMPLE = 512


def load_data(
    spec: str,
    *,
    seed: int = 0,
    workers: int = 2,
    size: int | None = None,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> DataSource:
    """Load the data set that a SPEC names.

    spec: `digits`, a folder (Parquet, class folders, CIFAR python files), `hf:NAME`, or
    `package.module:factory`; seed: draws the held-out tenth of the training split, stratified;
    workers: processes that decode what does not fit in memory; size: side in pixels that images are
    resized and cropped to. Raises InputError for an unknown source or layout, a corrupt image
    or a label out of range; EnvironmentLacks if an extra is not installed.
    """
    raw, name = _read(spec)
    _check(raw, name)
    train, test, geometry = _decode(raw, size, memory_limit_bytes)
    _check_targets_fit(raw.train_targets, geometry)
    sample = train if isinstance(train, Tensor) else _sample(train, geometry)
    mean, std = channel_statistics(sample)
    _check_variance(std, name)
    # digits and the like turn into something else when mirrored
    mirrored = raw.photographs and geometry.channels == 3
    automatic: tuple[str, ...] = ("crop", "flip") if mirrored else ("crop",)
    # what else targets mean nobody knows here: masks move with their images, but only on request
    automatic = automatic if are_labels(raw.train_targets) else ()

    def split(images: Tensor | Images, targets: Targets, parts: list[Tensor]) -> list[Split]:
        if isinstance(images, Tensor):
            pixels = Pixels(images, targets)
            return [MemorySplit(pixels=pixels, indices=i, mean=mean, std=std, automatic=automatic) for i in parts]
        return [
            StreamSplit(
                images=images, targets=targets, indices=i, geometry=geometry,
                mean=mean, std=std, automatic=automatic, workers=workers,
            )
            for i in parts
        ]  # fmt: skip

    rest, held_out = stratified(raw.train_targets, HELD_OUT_SHARE, seed)
    if not len(held_out):
        raise InputError(
            "at least two training images of some class: choices are made on held-out ones",
            got=f"{len(rest)} training images of {name}, one per class",
            consequence="nothing was started",
            remedy="add images",
        )
    fit_split, held_out_split = split(train, raw.train_targets, [rest, held_out])
    (test_split,) = split(test, raw.test_targets, [torch.arange(count_images(raw.test_targets))])
    return DataSource(
        name=name,
        input_shape=(geometry.channels, geometry.height, geometry.width),
        classes=_classes(raw),
        mean=mean,
        std=std,
        fit=fit_split,
        held_out=held_out_split,
        test=test_split,
        notes=raw.notes,
    )


def check_data(spec: str) -> None:
    """Raise InputError unless `load_data` knows the kind of SPEC; nothing is read and no code is imported."""
    kinds = spec == "digits" or (spec and Path(spec).is_dir()) or spec.startswith("hf:")
    if not kinds and not all(spec.rpartition(":")[::2]):
        raise _unknown(spec)
    where = spec.rpartition(":")[0]
    if not kinds and where.endswith(".py") and not Path(where).is_file():
        raise InputError("a file with the data set's factory", got=f"no file {Path(where).name}")


def _read(spec: str) -> tuple[Raw, str]:
    # the name goes into results and reports, which hold no path
    if spec == "digits":
        return read_digits(), spec
    if spec and Path(spec).is_dir():
        return read_folder(Path(spec)), Path(spec).resolve().name
    if spec.startswith("hf:"):
        name = spec.removeprefix("hf:")
        return read_hub(name), f"hf:{Path(name).name}" if Path(name).is_dir() else spec
    if ":" in spec:
        return read_user(spec), Path(spec).name
    raise _unknown(spec)


def _unknown(spec: str) -> InputError:
    return InputError(
        "data: digits, a folder, hf:NAME, or package.module:factory",
        got=f"{spec!r}, which is no folder either",
        consequence="nothing was started",
        remedy="correct the name or the path",
    )


def _classes(raw: Raw) -> tuple[str, ...]:
    targets = raw.train_targets
    if raw.classes or not isinstance(targets, Tensor) or targets.is_floating_point():
        return raw.classes
    if targets.ndim > 1:
        targets = targets[targets != UNLABELLED]
    classes = int(targets.max()) + 1 if targets.numel() else 0
    if classes > (most := max(_CLASSES, targets.numel())):
        raise InputError(
            f"labels below {most:,}: no more classes than images, or {_CLASSES:,}",
            got=f"label {classes - 1:,}",
            consequence="nothing was started",
            remedy="look for a wrong label; classes are numbered from 0 without gaps",
        )
    return tuple(str(number) for number in range(classes))


def _check(raw: Raw, name: str) -> None:
    splits = {"training": raw.train_targets, "test": raw.test_targets}
    for split, targets in splits.items():
        if not count_images(targets):
            raise InputError(f"images in the {split} split", got=f"{name} with none", remedy="add images")
    classes = len(_classes(raw))
    for split, targets in splits.items():
        if not are_labels(targets) or targets.is_floating_point():
            continue
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            raise InputError(
                f"labels from 0 to {classes - 1}, one per class",
                got=f"labels from {low} to {high} in the {split} split of {name}",
                remedy="remove images without a label, or use a split that has them",
            )


def _check_variance(std: tuple[float, ...], name: str) -> None:
    # `channel_statistics` leaves a channel that never changes unscaled
    still = [str(channel) for channel, deviation in enumerate(std) if deviation == 1.0]
    if still:
        raise InputError(
            "images whose channels differ somewhere",
            got=f"channel {', '.join(still)} is the same in all training images of {name}",
            consequence="nothing was started",
            remedy="look at the images as they are read: a lost range or a wrong format makes them all black",
        )


def _check_targets_fit(targets: Targets, geometry: Geometry) -> None:
    plain = isinstance(targets, Tensor) and targets.ndim <= 2
    if geometry.resize and not plain:
        raise InputError(
            "images of one size that is left as it is, where targets are masks or structures",
            got=f"images to be resized to {geometry.height}x{geometry.width}",
            consequence="the targets would no longer fit them",
            remedy="leave image_size out, and return images and targets of one size",
        )


def _decode(raw: Raw, size: int | None, limit_bytes: int) -> tuple[Tensor | Images, Tensor | Images, Geometry]:
    if isinstance(raw.train, Tensor) or isinstance(raw.test, Tensor):
        assert isinstance(raw.train, Tensor)
        _, channels, height, width = raw.train.shape
        if size not in (None, height):
            raise InputError(f"size {height}, in which these images come", got=str(size), remedy="leave the size out")
        return raw.train, raw.test, Geometry(channels=channels, height=height, width=width, resize=False)
    splits = (raw.train, raw.test)
    geometry = survey(splits, size, DEFAULT_SIZE, whole=False)
    total_bytes = geometry.n_bytes * sum(len(images) for images in splits)
    # images of different sizes are cropped anew in every epoch, so they stream unless a size was asked for
    in_memory = total_bytes <= limit_bytes and (size is not None or not geometry.resize)
    if in_memory:
        try:
            return decode_all(raw.train, geometry), decode_all(raw.test, geometry), geometry
        except UnlikeOthersError:
            # the sample misled; below, every header is read
            pass
    if not geometry.resize or geometry.channels == 1:
        geometry = survey(splits, size, DEFAULT_SIZE, whole=True)
    return raw.train, raw.test, geometry


def _sample(images: Images, geometry: Geometry) -> Tensor:
    step = max(1, len(images) // _STATISTICS_SAMPLE)
    return decode_all(images, geometry, range(0, len(images), step))
