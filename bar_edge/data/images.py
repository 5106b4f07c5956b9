"""Encoded images from files, Parquet rows or the user's data set, and how they become pixels."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from bar_edge.errors import BarEdgeError, InputError

#: images whose size and colours decide about a data set before all of them are read
_SAMPLE = 256
_CHUNK = 500
_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "F")


class Images(Protocol):
    """A sequence of images, opened one at a time."""

    @property
    def threaded(self) -> bool:
        """Whether several threads may open images at once."""

    def __len__(self) -> int:
        """Return the number of images."""

    def open(self, index: int) -> Image.Image:
        """Open one image; its pixels may be decoded later. Raises whatever a broken image raises."""

    def describe(self, index: int) -> str:
        """Name one image for an error message."""


@dataclasses.dataclass(frozen=True, slots=True)
class FileImages:
    """Image files below a root folder."""

    root: Path
    paths: Sequence[Path]
    threaded: bool = True

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        """Open one file."""
        return Image.open(self.paths[index])

    def describe(self, index: int) -> str:
        """Name a file relative to the root."""
        return self.paths[index].relative_to(self.root).as_posix()


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedImages:
    """A column of encoded images: an Arrow array, or anything indexable whose items hold bytes."""

    column: Any
    #: what the column belongs to, for error messages
    origin: str
    threaded: bool = True

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.column)

    def open(self, index: int) -> Image.Image:
        """Open one row."""
        cell = self.column[index]
        cell = cell.as_py() if hasattr(cell, "as_py") else cell
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not data:
            raise ValueError("the row holds no image bytes")
        return Image.open(io.BytesIO(data))

    def describe(self, index: int) -> str:
        """Name a row, counted from 0."""
        return f"{self.origin}, row {index}"


@dataclasses.dataclass(frozen=True, slots=True)
class UserImages:
    """A map-style data set of (image, target): PIL images, or tensors (C, H, W), uint8 or float in [0, 1]."""

    dataset: Any
    origin: str
    # nothing is known about the user's code
    threaded: bool = False

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def open(self, index: int) -> Image.Image:
        """Return one image as PIL."""
        image = self.dataset[index][0]
        if isinstance(image, Image.Image):
            # a copy, because what is opened here is closed after use
            return image.copy()
        pixels = torch.as_tensor(image)
        if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
            raise ValueError(f"an image has shape (1 or 3, H, W), got {tuple(pixels.shape)}")
        if pixels.is_floating_point():
            if not (pixels.min() >= 0 and pixels.max() <= 1):
                raise ValueError("float images lie in [0, 1]: return them before normalisation, bar-edge normalises")
            pixels = (pixels * 255).round()
        array = pixels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)

    def describe(self, index: int) -> str:
        """Name an item, counted from 0."""
        return f"{self.origin}, item {index}"


def corrupt(got: str) -> InputError:
    """Return the error for an image that cannot be decoded."""
    return InputError(
        "every image of the data set can be decoded",
        got=got,
        consequence="the data set cannot be used as it is",
        remedy="remove or replace this image",
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How images become equal: `channels` 1 or 3, and a size, or the one that they all have."""

    channels: int
    #: height and width of the result
    height: int
    width: int
    #: resize and crop; otherwise every image must have this size already
    resize: bool

    @property
    def n_bytes(self) -> int:
        """Decoded bytes of one image."""
        return self.channels * self.height * self.width


class UnlikeOthersError(Exception):
    """An image has another size or more colours than the sample promised."""


def decode(
    images: Images, index: int, geometry: Geometry, corner: tuple[float, float] = (0.5, 0.5)
) -> npt.NDArray[np.uint8]:
    """Decode one image into uint8 (H, W, C).

    corner: where the crop lies after resizing, each from 0 (top, left) to 1; (.5, .5) is the centre.
    Raises InputError naming an image that cannot be decoded, UnlikeOthersError for one that does not fit.
    """
    mode = "L" if geometry.channels == 1 else "RGB"
    try:
        with images.open(index) as image:
            if mode == "L" and image.mode not in _GREY_MODES:
                raise UnlikeOthersError(f"{images.describe(index)} has colours")
            if not geometry.resize and image.size != (geometry.width, geometry.height):
                raise UnlikeOthersError(f"{images.describe(index)} is {image.width}x{image.height} pixels")
            fitting = _resize_and_crop(image, geometry, corner) if geometry.resize else image
            array = np.asarray(_eight_bits(fitting, mode))
    except (BarEdgeError, UnlikeOthersError):
        raise
    # Pillow and a user's data set raise a dozen kinds of exception for a broken image
    except Exception as error:
        raise corrupt(f"{images.describe(index)}: {type(error).__name__}: {_without_path(error)}") from error
    return array.reshape(geometry.height, geometry.width, geometry.channels)


def _without_path(error: Exception) -> str:
    # Pillow's text ends in the object's address or the whole path; describe() has named the image
    return "cannot identify image file" if "cannot identify" in str(error) else str(error)


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit images at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


def _resize_and_crop(image: Image.Image, geometry: Geometry, corner: tuple[float, float]) -> Image.Image:
    # the usual 256 for a crop of 224, in proportion
    shorter = max(round(geometry.height * 8 / 7), geometry.height)
    image.draft(None, (shorter, shorter))
    scale = shorter / min(image.size)
    size = (max(shorter, round(image.width * scale)), max(shorter, round(image.height * scale)))
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB") if image.mode not in _GREY_MODES else _eight_bits(image, "L")
    image = image.resize(size, Image.Resampling.BILINEAR)
    top = round(corner[0] * (size[1] - geometry.height))
    left = round(corner[1] * (size[0] - geometry.width))
    return image.crop((left, top, left + geometry.width, top + geometry.height))


def survey(splits: Sequence[Images], size: int | None, default_size: int, *, whole: bool) -> Geometry:
    """Decide the geometry from the headers of a sample of each split, or of all images.

    size: asked for by the user; default_size: used where images differ and nothing was asked for.
    """
    sizes: set[tuple[int, int]] = set()
    grey = True
    for images in splits:
        step = 1 if whole else max(1, len(images) // _SAMPLE)
        for index in range(0, len(images), step):
            try:
                with images.open(index) as image:
                    sizes.add(image.size)
                    grey = grey and image.mode in _GREY_MODES
            except Exception as error:
                raise corrupt(f"{images.describe(index)}: {type(error).__name__}: {_without_path(error)}") from error
    width, height = next(iter(sizes))
    resize = len(sizes) > 1 or (size is not None and (height, width) != (size, size))
    if resize:
        height = width = size or default_size
    return Geometry(channels=1 if grey else 3, height=height, width=width, resize=resize)


def decode_all(images: Images, geometry: Geometry, indices: Sequence[int] | None = None) -> Tensor:
    """Decode images into one uint8 tensor (N, C, H, W), channels last in memory; errors as in `decode`."""
    chosen = range(len(images)) if indices is None else indices
    pixels = np.empty((len(chosen), geometry.height, geometry.width, geometry.channels), dtype=np.uint8)

    def decode_chunk(start: int) -> None:
        for row in range(start, min(start + _CHUNK, len(chosen))):
            pixels[row] = decode(images, chosen[row], geometry)

    starts = range(0, len(chosen), _CHUNK)
    if images.threaded:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(decode_chunk, starts))
    else:
        for start in starts:
            decode_chunk(start)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
