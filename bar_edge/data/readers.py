"""Where data sets come from: each reader returns the two splits as they were found."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bar_edge.data.cifar_python import read_cifar
from bar_edge.data.images import EncodedImages, FileImages, Images, UserImages
from bar_edge.data.source import Targets, stratified
from bar_edge.errors import EnvironmentLacks, InputError
from bar_edge.user_code import call

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
#: of images that are not read here
_UNREAD = (".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg", ".psd", ".raw", ".dng", ".npy", ".exr")
_TEST_NAMES = ("test", "val", "validation", "valid")
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
#: encoded Parquet images are held in memory; beyond this a folder of files is the better form
_PARQUET_LIMIT_BYTES = 16 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Raw:
    """A data set as found, not yet normalised or divided."""

    #: pixels uint8 (N, C, H, W), or images still to decode
    train: Tensor | Images
    train_targets: Targets
    test: Tensor | Images
    test_targets: Targets
    #: empty where the source names none
    classes: tuple[str, ...] = ()
    #: whether mirroring an image keeps its meaning
    photographs: bool = True
    #: files and folders that were left out, in words
    notes: tuple[str, ...] = ()


def read_digits() -> Raw:
    """Read scikit-learn's 1,797 digits, 1x8x8, divided 80/20 by a fixed stratified draw."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    targets = torch.from_numpy(digits.target.astype(np.int64))
    train, test = stratified(targets, 0.2, seed=0)
    return Raw(
        train=pixels[train],
        train_targets=targets[train],
        test=pixels[test],
        test_targets=targets[test],
        classes=tuple(str(name) for name in digits.target_names),
        photographs=False,
    )


def read_folder(folder: Path) -> Raw:
    """Read a folder that its contents identify; raises InputError with what was found for any other."""
    if _parquet_files(folder, "train"):
        return _read_parquet(folder)
    if (folder / "data_batch_1").is_file() or all((folder / n).is_file() for n in ("train", "test", "meta")):
        (train, train_targets), (test, test_targets), classes = read_cifar(folder)
        return Raw(
            train=train, train_targets=train_targets, test=test, test_targets=test_targets, classes=classes
        )  # fmt: skip
    if (folder / "train").is_dir():
        return _read_class_folders(folder)
    found = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    raise InputError(
        "a folder with train*.parquet and test*.parquet (column image or img, and label), "
        "train/CLASS/*.png|jpg|... and test/CLASS/... or val/CLASS/..., "
        "or the CIFAR python files (data_batch_1 ... test_batch, or train, test, meta)",
        got=f"{folder.name}/ with {', '.join(found[:10]) or 'nothing'}{' ...' if len(found) > 10 else ''}",
        remedy="arrange the images in one of these layouts, or return them from package.module:factory",
    )


# --- Parquet in the Hugging Face image layout


def _parquet_files(folder: Path, *names: str) -> list[Path]:
    for name in names:
        for pattern in (f"{name}*.parquet", f"*/{name}*.parquet"):
            files = sorted(folder.glob(pattern))
            if files:
                return files
    return []


def _read_parquet(folder: Path) -> Raw:
    test_files = _parquet_files(folder, *_TEST_NAMES)
    if not test_files:
        raise InputError("test*.parquet or validation*.parquet beside train*.parquet", got=f"none in {folder.name}/")
    train, train_targets, classes = _read_table(_parquet_files(folder, "train"))
    test, test_targets, _ = _read_table(test_files)
    return Raw(train=train, train_targets=train_targets, test=test, test_targets=test_targets, classes=classes)


def _read_table(files: list[Path]) -> tuple[EncodedImages, Tensor, tuple[str, ...]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    origin = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    n_bytes = sum(file.stat().st_size for file in files)
    if n_bytes > _PARQUET_LIMIT_BYTES:
        raise InputError(
            f"Parquet files of at most {_PARQUET_LIMIT_BYTES >> 30} GiB",
            got=f"{origin}: {n_bytes / 2**30:.1f} GiB",
            remedy="unpack the images into train/CLASS/ and test/CLASS/, which stream from disk",
        )
    try:
        schema = pq.read_schema(files[0])
        image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
        label = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
        if image is None or label is None or not pa.types.is_integer(schema.field(label).type):
            raise InputError(
                f"a column {' or '.join(_IMAGE_COLUMNS)} and an integer column {' or '.join(_LABEL_COLUMNS)}",
                got=f"{origin} with {', '.join(f'{field.name}: {field.type}' for field in schema)}",
                remedy="rename the columns",
            )
        table = pa.concat_tables([pq.read_table(file, columns=[image, label]) for file in files])
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError("readable Parquet files", got=f"{origin}: {str(error).splitlines()[0]}") from error
    column, labels = table.column(image), table.column(label)
    if pa.types.is_struct(column.type) and any(field.name == "bytes" for field in column.type):
        column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks], column.type.field("bytes").type)
    if not any(is_kind(column.type) for is_kind in (pa.types.is_binary, pa.types.is_large_binary)):
        got = f"{origin} with {image}: {column.type}"
        raise InputError("images as bytes, or as structures with bytes", got=got, remedy="store them encoded")
    try:
        targets = torch.from_numpy(labels.cast(pa.int64()).fill_null(-1).to_numpy().astype(np.int64))
    except pa.ArrowException as error:
        raise InputError("labels of 64 bits", got=f"{origin}: {str(error).splitlines()[0]}") from error
    return EncodedImages(column, origin), targets, _class_names(schema.metadata, label)


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        # many files carry no names; classes are then called 0, 1, ...
        return ()


# --- class folders


def _read_class_folders(folder: Path) -> Raw:
    test_name = next((name for name in _TEST_NAMES if (folder / name).is_dir()), None)
    if test_name is None:
        found = sorted(path.name for path in folder.iterdir())[:10]
        raise InputError("test/CLASS/ or val/CLASS/ beside train/CLASS/", got=f"{folder.name}/ with {', '.join(found)}")
    classes = tuple(path.name for path in _class_folders(folder / "train"))
    train, train_targets = _list_images(folder / "train", classes)
    test, test_targets = _list_images(folder / test_name, classes)
    present = set(torch.unique(train_targets).tolist())
    without = [name for number, name in enumerate(classes) if number not in present]
    if without:
        raise InputError(
            f"images ({', '.join(SUFFIXES)}) in every folder of train/, each of which is a class",
            got=f"none in {', '.join(without[:10])}",
            consequence="nothing was read",
            remedy="remove these folders, or put images there",
        )
    return Raw(
        train=train,
        train_targets=train_targets,
        test=test,
        test_targets=test_targets,
        classes=classes,
        notes=(*_left_out(folder / "train"), *_left_out(folder / test_name)),
    )


def _class_folders(folder: Path) -> list[Path]:
    """Return the folders of classes by name: hidden ones, such as .ipynb_checkpoints, are no classes."""
    return sorted((path for path in folder.iterdir() if path.is_dir() and not _hidden(path)), key=lambda p: p.name)


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name in ("__MACOSX", "__pycache__")


def _left_out(folder: Path) -> list[str]:
    """Say which folders and images are not read."""
    hidden = sorted(path.name for path in folder.iterdir() if path.is_dir() and _hidden(path))
    notes = [f"{folder.name}/{name}/ is no class: left out" for name in hidden]
    unread = Counter(path.suffix.lower() for path in folder.rglob("*") if path.suffix.lower() in _UNREAD)
    if unread:
        found = ", ".join(f"{number} {suffix}" for suffix, number in sorted(unread.items()))
        notes.append(f"{folder.name}/ holds images of formats that are not read, left out: {found}")
    return notes


def _list_images(folder: Path, classes: tuple[str, ...]) -> tuple[FileImages, Tensor]:
    strangers = [path.name for path in _class_folders(folder) if path.name not in classes]
    if strangers:
        raise InputError(
            f"{folder.name}/ holds the classes of train/",
            got=f"{folder.name}/ with {', '.join(strangers[:10])} besides",
        )
    paths: list[Path] = []
    targets: list[int] = []
    for number, name in enumerate(classes):
        # a pipe or a device of that name would be waited for
        inside = (p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        found = sorted(path for path in inside if not any(map(_hidden, path.relative_to(folder / name).parents)))
        paths += found
        targets += [number] * len(found)
    return FileImages(folder.parent, tuple(paths)), torch.tensor(targets, dtype=torch.int64)


# --- Hugging Face and the user's own


def read_hub(name: str) -> Raw:
    """Read a data set of the Hugging Face hub, or a local copy, with the extra `hf`."""
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentLacks(
            "the package datasets", got="it is not installed", remedy='pip install "bar-edge[hf]"'
        ) from error
    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise InputError(
            f"hf:{name} names a data set that can be loaded",
            got=f"{type(error).__name__}: {lines[0]}",
            remedy="correct the name, or check the connection; --debug shows the traceback",
        ) from error
    test_name = next((split for split in _TEST_NAMES if split in splits), None)
    features = splits["train"].features if "train" in splits else {}
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key in _LABEL_COLUMNS if key in features), None)
    if test_name is None or image is None or label is None:
        raise InputError(
            f"splits train and {' or '.join(_TEST_NAMES)}, an image column, and {' or '.join(_LABEL_COLUMNS)}",
            got=f"hf:{name} with splits {', '.join(splits)} and columns {', '.join(features)}",
            remedy="return the two splits from package.module:factory instead",
        )
    parts = []
    for split in ("train", test_name):
        encoded = splits[split].cast_column(image, datasets.Image(decode=False))
        parts.append((EncodedImages(_HubColumn(encoded, image), f"hf:{name} {split}"), torch.tensor(encoded[label][:])))
    (train, train_targets), (test, test_targets) = parts
    classes = tuple(getattr(features[label], "names", ()))
    return Raw(train=train, train_targets=train_targets, test=test, test_targets=test_targets, classes=classes)


@dataclasses.dataclass(frozen=True, slots=True)
class _HubColumn:
    """One column of a memory-mapped data set, row by row."""

    dataset: Any
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index][self.name]


def read_user(spec: str) -> Raw:
    """Read what the user's `package.module:factory` returns: (train, test), map-style, of (image, target).

    Images are read once or in every pass, whichever fits in memory, so they must not be random:
    augmentation is bar-edge's. Targets are numbers, tensors of one shape (masks), or tuples, lists and
    dictionaries of both, the same for every image: boxes are drawn onto a grid, or padded to one number.
    The training set's `targets` (all of them) and `classes` (names) are used where it has them.
    """
    returned = call(spec, {}, {})
    if not isinstance(returned, (tuple, list)) or len(returned) != 2 or not all(
        hasattr(part, "__len__") and hasattr(part, "__getitem__") for part in returned
    ):  # fmt: skip
        raise InputError(f"{spec} returns (train, test), two map-style data sets", got=f"a {type(returned).__name__}")
    train, test = returned
    train_targets, test_targets = (_user_targets(part, spec) for part in returned)
    return Raw(
        train=UserImages(train, f"{spec} train"),
        train_targets=train_targets,
        test=UserImages(test, f"{spec} test"),
        test_targets=test_targets,
        classes=tuple(str(name) for name in getattr(train, "classes", ())),
    )


def _user_targets(dataset: Any, spec: str) -> Targets:
    try:
        # torchvision's convention saves reading every image for its target
        values = getattr(dataset, "targets", None)
        values = [dataset[index][1] for index in range(len(dataset))] if values is None else values
        items = [_tensors(value) for value in values]
        return pytree.tree_map(_stacked, *items) if items else torch.empty(0, dtype=torch.int64)
    except Exception as error:
        raise InputError(
            f"{spec}: items are (image, target), and all targets have one shape and structure",
            got=f"{type(error).__name__}: {error}",
            remedy="correct the data set; --debug shows the traceback",
        ) from error


def _tensors(target: Any) -> Targets:
    """Return one image's target as a tensor if it is a number or lists of numbers, else a structure of tensors."""
    leaves = pytree.tree_leaves(target)
    structured = isinstance(target, dict) or any(isinstance(leaf, (Tensor, np.ndarray)) for leaf in leaves)
    return pytree.tree_map(torch.as_tensor, target) if structured else torch.as_tensor(target)


def _stacked(*items: Tensor) -> Tensor:
    tensor = torch.stack(items)
    return tensor if tensor.is_floating_point() else tensor.long()
