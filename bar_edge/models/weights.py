"""Weights from a file into a module: safetensors, or torch checkpoints read without running any code of theirs."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from bar_edge.errors import InputError

#: where training scripts put the weights, in the order in which they are looked for
_NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params",
           "ema", "ema_state_dict", "state_dict_ema", "model_ema")  # fmt: skip
#: what DataParallel, AveragedModel and Lightning put before every name
_PREFIXES = ("module.", "model.")
_NAMES_SHOWN = 10
#: how deep weights are looked for: a checkpoint may hold itself
_DEPTH = 8


def load_weights(module: nn.Module, path: Path) -> None:
    """Load the file's weights into `module`; on failure the module is unchanged.

    path: safetensors, or a torch checkpoint, read with weights_only=True. Weights nested under
    `state_dict`, `model`, `ema` and the like are found; the prefixes of DataParallel (`module.`)
    and torch.compile (`_orig_mod.`) are removed. Raises InputError if the file is not weights, and
    one that lists the names if they do not match the module's.
    """
    expected = module.state_dict()
    found = _strip(_unwrap(_read(path), path), expected)
    problems = _mismatches(expected, found)
    if problems:
        listed = "; ".join(problems[:_NAMES_SHOWN])
        more = f"; and {len(problems) - _NAMES_SHOWN} more" if len(problems) > _NAMES_SHOWN else ""
        raise InputError(
            f"weights of this model ({len(expected)} tensors)",
            got=f"{path.name} with {len(problems)} mismatches: {listed}{more}",
            consequence="no weight was loaded",
            remedy="give the weights of the same architecture, width, input channels and number of classes",
        )
    module.load_state_dict(found, strict=False)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError("a weights file", got=f"no file {path}", remedy="correct the path")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):  # torch packs nothing: what unpacks to more is no checkpoint of torch.save
            with zipfile.ZipFile(path) as parts:
                if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
                    raise ValueError("parts larger than the file")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's restricted unpickler raises whatever a damaged file makes it stumble over
        raise InputError(
            "weights: a safetensors file, or a torch checkpoint of tensors and plain containers",
            got=f"{path.name}: {_reason(error)}",
            consequence="the file was not loaded, and no code in it was run",
            remedy="save the weights alone: torch.save(model.state_dict(), FILE)",
        ) from error


def _reason(error: Exception) -> str:
    # torch's own text recommends weights_only=False, which would run the file's code
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code is not None:
        return f"it names {code[1]}, which is code or a class, not weights"
    if isinstance(error, pickle.UnpicklingError):
        return "no checkpoint that torch.save wrote, or a damaged one"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _unwrap(data: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(_DEPTH):
        if isinstance(data, Mapping):
            data = next((data[key] for key in _NESTED if isinstance(data.get(key), Mapping)), data)
    # torch's AveragedModel counts its updates beside the weights
    tensors = {str(k): v for k, v in data.items() if k != "n_averaged"} if isinstance(data, Mapping) else {}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        what = f"a dictionary of {', '.join(list(tensors)[:_NAMES_SHOWN])}" if tensors else f"a {type(data).__name__}"
        raise InputError(
            f"a dictionary of tensors, plain or under one of {', '.join(_NESTED)}",
            got=f"{path.name}: {what}",
            remedy="save the weights alone: torch.save(model.state_dict(), FILE)",
        )
    return tensors


def _strip(found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # a compiled submodule carries the prefix in the middle of its names
    found = {name.replace("_orig_mod.", ""): tensor for name, tensor in found.items()}
    for _ in range(len(_PREFIXES)):
        for prefix in _PREFIXES:
            own = all(name.startswith(prefix) for name in expected)
            if not own and all(name.startswith(prefix) for name in found):
                found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    # checkpoints older than torch 0.4.1 have no such counter, and torch does not ask for it either
    missing = [n for n in expected if n not in found and not n.endswith("num_batches_tracked")]
    shapes = [n for n in expected if n in found and expected[n].shape != found[n].shape]
    odd = [n for n, t in found.items() if t.layout != torch.strided or t.is_meta or t.is_quantized or t.is_complex()]
    return (
        [f"missing {name}" for name in missing]
        + [f"unexpected {name}" for name in found if name not in expected]
        + [f"{name} is sparse, quantised, complex or without data" for name in odd]
        + [f"{name} has shape {tuple(found[name].shape)}, not {tuple(expected[name].shape)}" for name in shapes]
    )
