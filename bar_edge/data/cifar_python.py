"""The original CIFAR python files, which are pickles, read without running what a pickle may name.

A pickle is a program that may call any function. The files need three: numpy's `_reconstruct` and
`dtype`, and in some copies `_codecs.encode`. All are replaced by the stand-ins below, which only
keep their arguments; every other name is refused. Not even numpy runs: the pixels are taken from
the raw bytes afterwards, when type and shape have been checked.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bar_edge.errors import InputError

#: at most, in CIFAR-100
_CLASSES = 100


class _Array:
    """Stands for a numpy array: keeps the state that the pickle sets."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _DType:
    """Stands for a numpy dtype: keeps its name, ignores byte order and the rest."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass


def _encode(text: str, encoding: object) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"the encoding {encoding!r} is not allowed")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR file needs")
        return _ALLOWED[module, name]


def read_batch(path: Path) -> dict[str, Any]:
    """Read one file: `data` as uint8 (N, 3, 32, 32), lists as they are; raises InputError for anything else."""
    try:
        raw = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in raw.items()}
        if "data" in batch:
            batch["data"] = _pixels(batch["data"])
    # a damaged pickle raises almost anything
    except Exception as error:
        raise InputError(
            "a CIFAR python file: numpy arrays in plain containers",
            got=f"{path.name}: {type(error).__name__}: {error}",
            consequence="the file was not read, and no code in it was run",
            remedy="fetch the file again from its authors",
        ) from error
    return batch


def _pixels(array: Any) -> Tensor:
    if not isinstance(array, _Array) or not isinstance(array.state, tuple):
        raise ValueError("data is not a numpy array")
    _version, shape, dtype, fortran_order, raw = array.state
    name = dtype.name.decode() if isinstance(dtype.name, bytes) else dtype.name
    if name != "u1" or fortran_order or len(shape) != 2 or shape[1] != 3072 or math.prod(shape) != len(raw):
        raise ValueError(f"data is not uint8 of shape (N, 3072): {name}, {shape}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(-1, 3, 32, 32).copy())


def read_cifar(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[str, ...]]:
    """Read CIFAR-10 or CIFAR-100: ((images, labels) of train, of test, class names)."""
    if (folder / "data_batch_1").is_file():
        train, test = sorted(folder.glob("data_batch_[0-9]")), folder / "test_batch"
        labels_key, meta, names_key = "labels", folder / "batches.meta", "label_names"
    else:
        train, test = [folder / "train"], folder / "test"
        labels_key, meta, names_key = "fine_labels", folder / "meta", "fine_label_names"
    names = read_batch(meta).get(names_key, []) if meta.is_file() else []
    classes = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    return _join(train, labels_key), _join([test], labels_key), classes


def _join(paths: list[Path], labels_key: str) -> tuple[Tensor, Tensor]:
    batches = [read_batch(path) for path in paths]
    for path, batch in zip(paths, batches, strict=True):
        if "data" not in batch or len(batch.get(labels_key, ())) != len(batch["data"]):
            raise InputError(f"{path.name} holds data and as many {labels_key}", got=", ".join(map(str, batch)))
    labels = [label for batch in batches for label in batch[labels_key]]
    wrong = [label for label in labels if type(label) is not int or not 0 <= label < _CLASSES]
    if wrong:
        got = repr(wrong[0])[:40]
        raise InputError(f"{labels_key} from 0 to {_CLASSES - 1}", got=got, consequence="nothing was read")
    return torch.cat([b["data"] for b in batches]), torch.tensor(labels, dtype=torch.int64)
