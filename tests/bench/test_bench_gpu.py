"""The parts of the GPU benchmark that a CPU can run; its numbers need a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def test_a_dry_run_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    words = f"gpu --device cpu --model resnet20 --factors 4 --seeds 0 --batches 2 --seconds 0.05 --out {out}"
    monkeypatch.setattr(sys, "argv", words.split())
    monkeypatch.setattr(gpu, "LOWERED", ("regular", "paper"))
    gpu.main()
    answer = json.loads(out.read_text())
    assert answer["onnxruntime left out"] is None
    rows = {(row["engine"], row["form"]): row for row in answer["rows"]}
    assert len(rows) == len(answer["rows"]) == 3 + 2  # the paper's form in torch alone
    assert {engine for engine, _ in rows} == {"torch-cpu", "onnxruntime-cpu"}
    for (engine, form), row in rows.items():
        assert row["n"] >= 10 and row["p50_ms"] > 0 and row["over_dense"]["interleaved"]
        if form == "dense":
            assert row["over_dense"]["speedup"] == 1
        if engine == "torch-cpu":
            assert row["error"] < 1e-4
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_half_precision_computes_the_same_to_half_precision() -> None:
    networks = gpu.forms("resnet20", (3, 32, 32), 4, 0)
    images = torch.randn(2, 3, 32, 32)
    for network in networks.values():
        expected, got = network(images), network.half()(images.half())
        assert (expected - got).abs().max() < 0.02 * expected.abs().max()


def test_without_a_gpu_it_says_so_and_exits_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 3
    assert "an NVIDIA GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())
