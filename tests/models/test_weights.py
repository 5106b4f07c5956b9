"""Weights from every usual kind of file, and refusals that leave the module as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from bar_edge.errors import InputError
from bar_edge.models import build, load_weights


def network(seed: int, **arguments: str) -> nn.Module:
    torch.manual_seed(seed)
    texts = tuple(f"{key}={value}" for key, value in arguments.items())
    return build("wrn-10-1", input_shape=(1, 8, 8), classes=10, model_args=texts)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


FORMS: dict[str, Any] = {
    "plain": lambda w: w,
    "state_dict": lambda w: {"epoch": 3, "state_dict": w, "optimizer": {"lr": 0.1}},
    "model": lambda w: {"model": w},
    "model_state_dict": lambda w: {"model_state_dict": w, "loss": 1.0},
    "ema": lambda w: {"ema": w},
    "nested twice": lambda w: {"model": {"state_dict": w}},
    "DataParallel": lambda w: prefixed(w, "module."),
    "compiled": lambda w: prefixed(w, "_orig_mod."),
    "compiled DataParallel": lambda w: {"state_dict": prefixed(w, "_orig_mod.module.")},
    "DataParallel of compiled": lambda w: prefixed(w, "module._orig_mod."),
    "compiled part": lambda w: {n.replace("stages.", "stages._orig_mod."): t for n, t in w.items()},
    "Lightning": lambda w: {"state_dict": prefixed(w, "model."), "pytorch-lightning_version": "2.5"},
    "AveragedModel": lambda w: {"n_averaged": torch.tensor(4), **prefixed(w, "module.")},
    "before torch 0.4.1": lambda w: {n: t for n, t in w.items() if not n.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("form", FORMS)
def test_torch_checkpoints(form: str, tmp_path: Path) -> None:
    source, target = network(1), network(2)
    assert not same(source.state_dict(), target.state_dict())
    torch.save(FORMS[form](source.state_dict()), tmp_path / "weights.pt")
    load_weights(target, tmp_path / "weights.pt")
    assert same(source.state_dict(), target.state_dict())


def test_safetensors(tmp_path: Path) -> None:
    source, target = network(1), network(2)
    safetensors.torch.save_file(prefixed(source.state_dict(), "module."), tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert same(source.state_dict(), target.state_dict())


def test_own_prefix_is_kept(tmp_path: Path) -> None:
    source = nn.Sequential()
    source.add_module("module", nn.Linear(2, 3))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    target = nn.Sequential()
    target.add_module("module", nn.Linear(2, 3))
    load_weights(target, tmp_path / "w.pt")
    assert same(source.state_dict(), target.state_dict())


def refused(target: nn.Module, path: Path) -> InputError:
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(target, path)
    assert same(before, target.state_dict())
    return caught.value


def test_mismatches_are_listed_by_name(tmp_path: Path) -> None:
    weights = network(1).state_dict()
    weights["head.weight"] = weights.pop("fc.weight")
    weights["conv1.weight"] = weights["conv1.weight"][:, :, :1]
    torch.save(weights, tmp_path / "w.pt")
    got = refused(network(2), tmp_path / "w.pt").got
    assert "3 mismatches" in got
    assert "missing fc.weight" in got
    assert "unexpected head.weight" in got
    assert "conv1.weight has shape (16, 1, 1, 3), not (16, 1, 3, 3)" in got


def test_long_lists_are_cut_and_counted(tmp_path: Path) -> None:
    torch.save(network(1, width="2").state_dict(), tmp_path / "w.pt")
    got = refused(network(2), tmp_path / "w.pt").got
    count = int(got.split(" mismatches")[0].split()[-1])
    assert count > 10
    assert got.endswith(f"and {count - 10} more")
    assert got.count(" has shape ") == 10


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_malicious_checkpoint_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "was_run"
    torch.save({"state_dict": network(1).state_dict(), "extra": Malicious(marker)}, tmp_path / "w.pt")
    assert "mkdir" in refused(network(2), tmp_path / "w.pt").got
    assert not marker.exists()


def test_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(network(1), tmp_path / "w.pt")
    assert "state_dict" in refused(network(2), tmp_path / "w.pt").remedy


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04broken", b"\x80\x02}q\x00."])
def test_files_that_are_not_weights(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert name in refused(network(2), tmp_path / name).got


@pytest.mark.parametrize("data", [[1, 2], {"epoch": 3}, {}, 7, {"model": {"a": "text"}}])
def test_checkpoints_without_weights(data: object, tmp_path: Path) -> None:
    torch.save(data, tmp_path / "w.pt")
    assert "dictionary of tensors" in refused(network(2), tmp_path / "w.pt").required


def test_missing_file(tmp_path: Path) -> None:
    assert "absent.pt" in refused(network(2), tmp_path / "absent.pt").got
