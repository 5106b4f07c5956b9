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
#: of one image: small files can hold huge ones
_PIXELS = 100_000_000
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
        return _opened(self.paths[index])

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
        return _opened(io.BytesIO(data))

    def describe(self, index: int) -> str:
        """Name a row, counted from 0."""
        return f"{self.origin}, row {index}"


@dataclasses.dataclass(frozen=True, slots=True)
class UserImages:
    """A map-style data set of (image, target): PIL images, or tensors (C, H, W), uint8 or float in [0, 1].

    Tensors may have any number of channels; all but those of 1 and 3 must have one size.
    """

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
        array = _planes(image)
        if array.shape[2] not in (1, 3):
            raise ValueError(f"all images have as many channels as the first, got {array.shape[2]}")
        return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)

    def planes(self, index: int) -> npt.NDArray[np.uint8]:
        """Return one image as (H, W, C)."""
        return _planes(self.dataset[index][0])

    def layers(self) -> Geometry | None:
        """Return the geometry of images of other than 1 or 3 channels, from the first one, else None."""
        try:
            image = self.dataset[0][0]
        except Exception:  # of the user's code: `open` says it with the item's name
            return None
        if not isinstance(image, (Tensor, np.ndarray)) or image.ndim != 3 or image.shape[0] in (1, 3):
            return None
        channels, height, width = image.shape
        return Geometry(channels=channels, height=height, width=width, resize=False)

    def describe(self, index: int) -> str:
        """Name an item, counted from 0."""
        return f"{self.origin}, item {index}"


def _opened(source: Path | io.BytesIO) -> Image.Image:
    """Open an image without decoding it; raises ValueError for one that would not fit into memory with others."""
    image = Image.open(source)
    if image.width * image.height > _PIXELS:
        image.close()
        raise ValueError(f"{image.width}x{image.height} pixels, at most {_PIXELS:,} in all")
    return image


def _planes(image: Any) -> npt.NDArray[np.uint8]:
    pixels = torch.as_tensor(image)
    if pixels.ndim != 3:
        raise ValueError(f"an image has shape (C, H, W), got {tuple(pixels.shape)}")
    if pixels.is_floating_point():
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError("float images lie in [0, 1]: return them before normalisation, bar-edge normalises")
        pixels = (pixels * 255).round()
    return pixels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def corrupt(got: str) -> InputError:
    """Return the error for an image that cannot be decoded."""
    return InputError(
        "every image of the data set can be decoded",
        got=got,
        consequence="the data set cannot be used as it is",
        remedy="remove or replace this image; images of more than 4 channels come as tensors (C, H, W) from "
        "package.module:factory",
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How images become equal: their channels, and a size, or the one that they all have."""

    channels: int
    #: height and width of the result
    height: int
    width: int
    #: resize and crop; otherwise every image must have this size already
    resize: bool
    #: bits that integers above 8 bits use, and the value of white in float images: 1 or 255
    bits: int = 16
    white: float = 255.0

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
        if isinstance(images, UserImages) and geometry.channels not in (1, 3):
            return images.planes(index).reshape(geometry.height, geometry.width, geometry.channels)
        with images.open(index) as image:
            if mode == "L" and image.mode not in _GREY_MODES:
                raise UnlikeOthersError(f"{images.describe(index)} has colours")
            if not geometry.resize and image.size != (geometry.width, geometry.height):
                raise UnlikeOthersError(f"{images.describe(index)} is {image.width}x{image.height} pixels")
            fitting = _resize_and_crop(image, geometry, corner, images.describe(index)) if geometry.resize else image
            array = np.asarray(_eight_bits(fitting, mode, geometry, images.describe(index)))
    except (BarEdgeError, UnlikeOthersError):
        raise
    # Pillow and a user's data set raise a dozen kinds of exception for a broken image
    except Exception as error:
        raise corrupt(f"{images.describe(index)}: {type(error).__name__}: {_without_path(error)}") from error
    return array.reshape(geometry.height, geometry.width, geometry.channels)


def _without_path(error: Exception) -> str:
    # Pillow's text ends in the object's address or the whole path; describe() has named the image
    return "cannot identify image file" if "cannot identify" in str(error) else str(error)


def _eight_bits(image: Image.Image, mode: str, geometry: Geometry, name: str) -> Image.Image:
    """Return an image of 8 bits; more bits and floats, which Pillow would clip at 255, are scaled by their range."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("pixels that are no numbers")
        brightest = geometry.white if image.mode == "F" else (1 << geometry.bits) - 1
        if not (values.min() >= 0 and values.max() <= brightest):
            raise UnlikeOthersError(
                f"{name} has pixels from {values.min():g} to {values.max():g}, beyond {brightest:g}"
            )
        # whole levels of integers, as a shift would give them
        scale = 255 / geometry.white if image.mode == "F" else 2.0 ** (8 - geometry.bits)
        scaled = (values * scale).round() if image.mode == "F" else np.floor(values * scale)
        image = Image.fromarray(scaled.astype(np.uint8))
    return image if image.mode == mode else image.convert(mode)


def _resize_and_crop(image: Image.Image, geometry: Geometry, corner: tuple[float, float], name: str) -> Image.Image:
    # the usual 256 for a crop of 224, in proportion
    shorter = max(round(geometry.height * 8 / 7), geometry.height)
    image.draft(None, (shorter, shorter))
    scale = shorter / min(image.size)
    size = (max(shorter, round(image.width * scale)), max(shorter, round(image.height * scale)))
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB") if image.mode not in _GREY_MODES else _eight_bits(image, "L", geometry, name)
    image = image.resize(size, Image.Resampling.BILINEAR)
    top = round(corner[0] * (size[1] - geometry.height))
    left = round(corner[1] * (size[0] - geometry.width))
    return image.crop((left, top, left + geometry.width, top + geometry.height))


def survey(splits: Sequence[Images], size: int | None, default_size: int, *, whole: bool) -> Geometry:
    """Decide the geometry from the headers of a sample of each split, or of all images.

    size: asked for by the user; default_size: used where images differ and nothing was asked for.
    """
    layers = splits[0].layers() if isinstance(splits[0], UserImages) else None
    if layers is not None:
        if size not in (None, layers.height):
            raise InputError(f"size {layers.height}, in which these images come", got=str(size), remedy="omit the size")
        return layers
    sizes: set[tuple[int, int]] = set()
    grey, brightest = True, {"I": 0.0, "F": 0.0}
    for images in splits:
        step = 1 if whole else max(1, len(images) // _SAMPLE)
        for index in range(0, len(images), step):
            try:
                with images.open(index) as image:
                    sizes.add(image.size)
                    grey = grey and image.mode in _GREY_MODES
                    if image.mode[0] in brightest:
                        brightest[image.mode[0]] = max(brightest[image.mode[0]], _brightest(image))
            except Exception as error:
                raise corrupt(f"{images.describe(index)}: {type(error).__name__}: {_without_path(error)}") from error
    width, height = next(iter(sizes))
    resize = len(sizes) > 1 or (size is not None and (height, width) != (size, size))
    if resize:
        height = width = size or default_size
    bits = next((bits for bits in (8, 10, 12, 14) if brightest["I"] < 1 << bits), 16) if brightest["I"] else 16
    white = 255.0 if brightest["F"] > 1 or not brightest["F"] else 1.0
    return Geometry(channels=1 if grey else 3, height=height, width=width, resize=resize, bits=bits, white=white)


def _brightest(image: Image.Image) -> float:
    """Return the largest pixel of an image of integers above 8 bits or of floats."""
    low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
    most = 255 if image.mode == "F" else 65535
    if not (low >= 0 and high <= most):
        raise ValueError(f"pixels lie in [0, 1], [0, 255] or 16 bits, got {low:g} to {high:g}")
    return high


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
