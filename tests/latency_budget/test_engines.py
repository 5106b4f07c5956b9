"""Prices from whole engines: layers by name, grids from scattered samples, the road through a pretended TensorRT."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bar_edge.bench import Measurement, bench_onnx
from bar_edge.latency_budget import profile_device as profiling
from bar_edge.latency_budget.engine_prices import Sample, fitted_prices, layer_samples
from bar_edge.pipeline import profile
from bar_edge.records.latency_table import Kind, LatencyTable
from bar_edge.records.lowering import Lowering
from tests.targets.fake_tensorrt import LAYER_MS, MULTIPLICATION_MS
from tests.targets.test_bundle import site  # noqa: F401

KIND = Kind(op="conv", kernel=(3, 3), shape=(8, 8))


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    """Two 3x3 convolutions, one that only moves channels, a depthwise one and a classifier, on 4 x 8 x 8."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (6, 4, 3, 3), "w10": (8, 6, 3, 3), "depth": (8, 1, 3, 3), "fc": (5, 8)}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    arrays["moves"] = (np.arange(1, 9) * np.eye(8))[:, :, None, None].astype(np.float32)  # and scales
    nodes = [
        helper.make_node("Conv", ["input", "w1"], ["a"], name="conv_1", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], name="relu_1"),
        helper.make_node("Conv", ["b", "w10"], ["c"], name="conv_10", pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Conv", ["c", "moves"], ["d"], name="conv_moves"),
        helper.make_node("Conv", ["d", "depth"], ["e"], name="conv_depth", pads=[1] * 4, group=8),
        helper.make_node("GlobalAveragePool", ["e"], ["f"], name="pool"),
        helper.make_node("Flatten", ["f"], ["g"], name="flat"),
        helper.make_node("Gemm", ["g", "fc"], ["output"], name="linear", transB=1),
    ]
    ends = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4, 8, 8]),
        helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 5]),
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "a.onnx")
    return tmp_path / "a.onnx"


def test_a_layer_goes_to_the_operations_that_are_fused_in_it(onnx_file: Path) -> None:
    first, second = Kind(op="conv", kernel=(3, 3), shape=(8, 8)), Kind(op="conv", kernel=(3, 3), stride=2, shape=(8, 8))
    layers = {
        "conv_1 + relu_1": 3.0,
        "Reformatting CopyNode for Input Tensor 0 to conv_10": 0.5,
        "PWN(conv_10)": 2.0,
        "conv_moves": 0.25,
        "conv_depth": 1.0,
        "pool": 0.125,
        "linear": 0.75,
    }
    depth, linear = Kind(op="depthwise", kernel=(3, 3), shape=(4, 4)), Kind(op="linear")
    samples, rest = layer_samples(onnx_file, layers, (first, second, depth, linear))
    expected = [(first, (4, 6), 3.0), (second, (6, 8), 2.0), (depth, (8,), 1.0), (linear, (8, 5), 0.75)]
    assert samples == [Sample(*one) for one in expected]
    assert rest == 0.5 + 0.25 + 0.125
    # one layer of two operations is shared out by their multiplications: 4 x 6 and 6 x 8 channels on 64 and 16 pixels
    samples, rest = layer_samples(onnx_file, {"{ForeignNode[conv_1...conv_10]}": 3.0}, (first, second))
    assert [sample.ms for sample in samples] == pytest.approx([2.0, 1.0]) and rest == 0
    # what the table does not price is part of the rest
    samples, rest = layer_samples(onnx_file, layers, (first,))
    assert [sample.ms for sample in samples] == [3.0] and rest == 0.5 + 0.25 + 0.125 + 2.0 + 1.0 + 0.75


def law(n_in: int, n_out: int) -> float:
    return 1e-3 + 2e-6 * n_in * n_out


def price(table: LatencyTable, kind: Kind, *widths: int) -> float:
    found = table.prices[str(kind)]
    values = np.array(found.ms).reshape([len(axis) for axis in found.widths])
    for axis, width in zip(found.widths, widths, strict=True):
        values = np.array([np.interp(width, axis, column) for column in values.reshape(len(axis), -1).T])
    return float(values.squeeze())


def test_prices_come_back_from_scattered_samples() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(1, 0.03, 400)
    points = [(int(a), int(b)) for a, b in rng.integers(8, 65, (400, 2))]
    samples = [Sample(KIND, (a, b), law(a, b) * n) for (a, b), n in zip(points, noise, strict=True)]
    samples.append(Sample(KIND, (8, 8), 0.0))  # of a layer that another one has swallowed
    prices = fitted_prices(samples, {KIND: (64, 64), Kind(op="linear"): (64, 10)})
    assert set(prices) == {str(KIND)}  # of what was not sampled nothing is said
    table = LatencyTable(lowering=Lowering.parse("slices"), rounding=1, step=1, prices=prices)
    errors = [abs(price(table, KIND, a, b) / law(a, b) - 1) for a, b in points]
    assert np.median(errors) < 0.02 and max(errors) < 0.25
    values = np.array(prices[str(KIND)].ms).reshape(5, 5)
    assert not values[0].any() and not values[:, 0].any()
    assert (np.diff(values, axis=0) >= 0).all() and (np.diff(values, axis=1) >= 0).all()


def test_the_table_of_a_pretended_tensorrt(
    site: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_WORLD", json.dumps({"version": "10.16"}))
    monkeypatch.setattr(profiling, "CHECK_S", 0.02)
    monkeypatch.setattr(profiling, "SHARES", (1.0, 0.5, 0.2))
    monkeypatch.setattr(profiling, "ENGINES", 6)
    calls: list[tuple[int, bool]] = []

    def noted(files: list[Path], **options: Any) -> list[Measurement]:
        found = bench_onnx(files, **options)
        cache = next(Path(options["caches"]).glob("timing-*.cache")).read_bytes()
        calls.append((len(files), bool(options.get("layers"))))
        assert cache.count(b"|timed") == sum(n for n, _ in calls), "the engines share a timing cache"
        return found

    monkeypatch.setattr(profiling, "bench_onnx", noted)
    monkeypatch.setattr("bar_edge.runs.door.import_tensorrt", lambda: None)  # the stand-in is another process's
    answer = profile(
        "resnet8",
        out=tmp_path / "table.json",
        model_args=("width=0.25",),
        input_shape=(3, 8, 8),
        runtime="tensorrt",
        lowering="gather:4",
    )
    assert calls == [(6, True), (3, False)] and answer["checks"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site", "table.json", "table.svg"]
    table = LatencyTable.load(tmp_path / "table.json")
    assert table.environment["runtime"] == "tensorrt" and table.model == "resnet8"
    for shape, width in (((8, 8), 4), ((4, 4), 8), ((2, 2), 16)):
        kind, n = Kind(op="conv", kernel=(3, 3), shape=shape), width
        expected = LAYER_MS + MULTIPLICATION_MS * 9 * n * n * np.prod(shape)
        assert price(table, kind, n, n) == pytest.approx(expected, rel=0.05)
    adds = [found for text, found in table.prices.items() if Kind.parse(text).op in ("add", "sum")]
    assert adds and all(max(found.ms) > 0 for found in adds)
    handovers = [found for text, found in table.prices.items() if Kind.parse(text).op == "handover"]
    assert handovers and all(max(found.ms) == 0 for found in handovers)
