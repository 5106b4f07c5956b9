"""`--lowering auto`: what was measured decides, a lucky winner is found out, and a slower file is called slower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bar_edge.bench import bench_onnx
from bar_edge.bench.protocol import Measurement
from bar_edge.lowering.lower import lower
from bar_edge.network import Network, trace
from bar_edge.records.lowering import Lowering
from bar_edge.targets import form_search as choice
from bar_edge.targets.form_search import CHOOSE_S, JUDGE_S, choose_lowering
from bar_edge.targets.onnx.target import ONNX
from bar_edge.targets.row import PRECISIONS
from tests.lowering.test_lowering import contrasting, difference, sliced_network

REGULAR, FIRST = Lowering.parse("regular"), ONNX.forms["fp32"].candidates[0]
#: time for every form, on however slow a machine
PATIENT = 1e9
Clock = Callable[[str, bool], float]


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock], list[list[str]]]:
    """Replace measuring by a function of the file's name and of whether this is the last judgement."""

    def install(milliseconds: Clock) -> list[list[str]]:
        calls: list[list[str]] = []

        def bench(files: list[Path], *, seconds: float, **_: Any) -> list[Measurement]:
            names = [file.stem.replace("_", ":") for file in files]
            calls.append(names)
            return [
                Measurement(
                    name=name,
                    samples_ms=(milliseconds(name, seconds == JUDGE_S),) * 40,
                    warmup_runs=10,
                    batch=1,
                    environment={"runtime": "clock"},
                )
                for name in names
            ]

        monkeypatch.setattr(choice, "bench_onnx", bench)
        monkeypatch.setattr(choice, "export_onnx", lambda *_, **__: None)
        return calls

    return install


@pytest.fixture(scope="module")
def pruned() -> tuple[Network, Network]:
    dense, sliced, _ = sliced_network("wrn-16-1")
    return dense.float(), sliced.float()


def test_the_fastest_form_is_chosen_and_judged_anew(stopwatch: Any, pruned: tuple[Network, Network]) -> None:
    dense, sliced = pruned
    calls = stopwatch(lambda name, _: {"regular:16": 1.0, "dense": 9.0}.get(name, 2.0))
    chosen = choose_lowering(sliced, dense, seconds=PATIENT)
    assert str(chosen.lowering) == "regular:16" and chosen.faster
    assert (chosen.chosen_ms, chosen.regular_ms, chosen.dense_ms) == (1.0, 2.0, 9.0)
    assert calls[-1] == ["regular:16", "regular", "dense"]
    assert CHOOSE_S < JUDGE_S


def test_a_stream_changes_its_form_where_that_is_faster(stopwatch: Any, pruned: tuple[Network, Network]) -> None:
    dense, sliced = pruned

    def clock(text: str, _: bool) -> float:
        forms = text.split(",") if "," in text else [text] * 3
        return (
            5.0
            if text == "dense"
            else sum({"gather:4": 1.0}.get(f, 1.1) for f in forms) - 0.5 * (forms[1] == "slices:4")
        )

    stopwatch(clock)
    chosen = choose_lowering(sliced, dense, seconds=PATIENT)
    assert str(chosen.lowering) == "gather:4,slices:4,gather:4"
    images = contrasting(2, 3, 8, 8).float()
    assert difference(sliced(images), lower(sliced, chosen.lowering)(images)) < 1e-5


def test_pixels_are_packed_stream_by_stream_as_long_as_that_helps(
    stopwatch: Any, pruned: tuple[Network, Network]
) -> None:
    dense, sliced = pruned
    gains = {(0, "2x2"): 0.2, (1, "2x2"): 0.1, (2, "2x2"): -0.1, (0, "1x2"): 0.3}

    def clock(text: str, _: bool) -> float:
        forms = [form.partition("@")[::2] for form in (text.split(",") if "," in text else [text] * 3)]
        gain = sum(
            gains.get((i, packing), 0.0) - 0.3 * (kind != "pointwise:16") for i, (kind, packing) in enumerate(forms)
        )
        return 9.0 if text == "dense" else 5.0 - gain - (text.startswith("deferred:4") and text != "deferred:4")

    stopwatch(clock)
    chosen = choose_lowering(sliced, dense, precision="int8", convert=lambda _: None, seconds=PATIENT)
    # the other form keeps the packing; once a stream gains nothing, the ones behind it are not tried
    assert str(chosen.lowering) == "deferred:4@1x2,pointwise:16@2x2,pointwise:16"
    packed = [text for text in map(str, chosen.tried_ms) if "@" in text]
    assert packed[:5] == [
        "pointwise:16@2x2,pointwise:16,pointwise:16",
        "pointwise:16@2x2,pointwise:16@2x2,pointwise:16",
        "pointwise:16@2x2",
        "pointwise:16@1x2,pointwise:16@2x2,pointwise:16",
        "pointwise:16@1x2,pointwise:16@1x2,pointwise:16",
    ]
    assert not [text for text in map(str, chosen.tried_ms) if text.endswith("@1x2")]
    assert not [text for text in map(str, choose_lowering(sliced, dense, seconds=PATIENT).tried_ms) if "@" in text], (
        "of no use in float32 there"
    )


def test_a_winner_by_luck_is_not_shipped(stopwatch: Any, pruned: tuple[Network, Network]) -> None:
    dense, sliced = pruned
    stopwatch(lambda name, last: {"dense": 9.0, "regular": 1.5}.get(name, 2.0 if last else 1.0))
    assert choose_lowering(sliced, dense, seconds=PATIENT).lowering == REGULAR


def test_a_dense_network_that_is_faster_is_said(stopwatch: Any, pruned: tuple[Network, Network]) -> None:
    dense, sliced = pruned
    stopwatch(lambda name, _: 0.5 if name == "dense" else 1.0)
    assert not choose_lowering(sliced, dense, seconds=PATIENT).faster


def test_no_time_still_gives_an_answer(stopwatch: Any, pruned: tuple[Network, Network]) -> None:
    dense, sliced = pruned
    stopwatch(lambda name, _: 1.0)
    chosen = choose_lowering(sliced, dense, seconds=0.0)
    assert set(chosen.tried_ms) == {FIRST, REGULAR}


@pytest.mark.parametrize(
    ("runtime", "precision"), [(r, p) for r in ("onnxruntime-cpu", "openvino-cpu", "tensorrt") for p in PRECISIONS]
)
def test_a_network_without_additions_tries_rounded_widths(stopwatch: Any, runtime: str, precision: str) -> None:
    torch.manual_seed(0)
    network = trace(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3)).eval(), torch.zeros(2, 3, 8, 8))
    calls = stopwatch(lambda name, _: {"slices:16": 1.0, "dense": 9.0}.get(name, 2.0))
    chosen = choose_lowering(network, network, runtime=runtime, precision=precision, seconds=PATIENT)
    assert str(chosen.lowering) == "slices:16" and chosen.faster
    assert {"slices:16", "slices"} <= set(map(str, chosen.tried_ms))
    assert {lowering.forms[0].kind for lowering in chosen.tried_ms} == {"slices"}
    assert calls[-1] == ["slices:16", "slices", "dense"]


@pytest.mark.slow
def test_for_real(pruned: tuple[Network, Network]) -> None:
    dense, sliced = pruned
    chosen = choose_lowering(sliced, dense, seconds=5.0)
    assert set(chosen.tried_ms) >= {FIRST, REGULAR}
    assert min(chosen.chosen_ms, chosen.dense_ms) > 0
    assert chosen.environment["runtime"] == "onnxruntime-cpu"
    assert bench_onnx is vars(choice)["bench_onnx"]
