"""Histograms, the ranges read from them, and the pass over images that fills them."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bar_edge.errors import InputError
from bar_edge_calibration.collect import Calibration, check_file, collect, random_images
from bar_edge_calibration.graph import prepare
from bar_edge_calibration.histogram import BINS, Histogram
from bar_edge_calibration.ranges import METHODS, range_of


def filled(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part.astype(np.float32))
    return histogram


def same(a: Histogram, b: Histogram) -> bool:
    return a.exponent == b.exponent and (a.low, a.high) == (b.low, b.high) and np.array_equal(a.counts, b.counts)


# ------------------------------------------------------------------------------------------ histograms


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 3e7])
def test_histogram_counts_every_value_once_in_its_bin(scale: float) -> None:
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32) * np.float32(scale)
    histogram = filled(values)
    assert histogram.counts.sum() == 5000
    assert np.array_equal(histogram.counts, np.histogram(values.astype(np.float64), histogram.edges)[0])
    width = histogram.edges[1] - histogram.edges[0]
    # no wider than needed: the largest value lies in the outer half of its side
    assert np.abs(values).max() >= width * BINS / 4


def test_order_and_parts_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    parts = [rng.standard_normal(300) * scale for scale in (0.0, 1e-3, 5.0, 40.0, 0.2)]
    expected = filled(np.concatenate(parts))
    for order in itertools.islice(itertools.permutations(parts), 0, 120, 17):
        assert same(filled(*order), expected)
        merged = Histogram()
        for part in order:
            merged.merge(filled(part))
        assert same(merged, expected)


def test_zeros_alone_then_something_below_zero() -> None:
    histogram = filled(np.zeros(7))
    assert histogram.exponent is None and histogram.counts[BINS // 2] == 7
    histogram.add(np.array([-2.0], np.float32))
    assert histogram.counts[BINS // 2] == 7 and histogram.counts.sum() == 8 and histogram.low == -2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        filled(np.array([1.0, value]))


# ------------------------------------------------------------------------------------------ ranges


def error_of(values: np.ndarray, span: tuple[float, float], levels: int = 255) -> float:
    low, high = span
    step = (high - low) / levels
    rounded = np.clip(np.round((values - low) / step), 0, levels) * step + low
    return float(np.square(rounded - values).mean())


def outlier() -> np.ndarray:
    values = np.abs(np.random.default_rng(2).standard_normal(20_000)).astype(np.float32)
    values[0] = 12.0
    return values


def test_minmax_and_percentile() -> None:
    values = np.random.default_rng(3).standard_normal(200_000).astype(np.float32)
    assert range_of(filled(values), "minmax") == (values.min(), values.max())
    low, high = range_of(filled(values), "percentile")
    exponent = filled(values).exponent
    assert exponent is not None
    width = 2.0**exponent
    # half of a ten-thousandth lies outside on each side, and at least as many if the range lost a bin
    assert (values < low).mean() <= 0.00005 <= (values <= low + width).mean()
    assert (values > high).mean() <= 0.00005 <= (values >= high - width).mean()


def test_mse_has_the_least_error_of_all_ranges() -> None:
    values = outlier()
    found = error_of(values, range_of(filled(values), "mse"))
    shares = np.linspace(0.01, 1, 200)
    least = min(error_of(values, (0.0, share * values.max())) for share in shares)
    # tried in steps of a hundredth of the whole range
    assert found <= 1.05 * least
    assert found < error_of(values, (0.0, values.max()))


def test_entropy_drops_an_outlier_and_keeps_what_is_even() -> None:
    assert range_of(filled(outlier()), "entropy")[1] < 6
    even = np.linspace(-1, 3, 100_000)
    low, high = range_of(filled(even), "entropy")
    assert low < -0.9 and high > 2.8


@pytest.mark.parametrize("method", METHODS)
def test_ranges_stay_within_the_values(method: str) -> None:
    rng = np.random.default_rng(4)
    for values in (np.zeros(10), rng.random(1000) + 5, -rng.random(1000) * 1e-6, rng.standard_normal(3)):
        low, high = range_of(filled(values), method)
        values = values.astype(np.float32)
        assert low >= min(values.min(), 0) and high <= max(values.max(), 0) and low <= high


def test_unknown_method() -> None:
    with pytest.raises(InputError, match="minmax, percentile, entropy, mse"):
        range_of(filled(np.ones(3)), "best")


# ------------------------------------------------------------------------------------------ collecting


def constant(name: str, values: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, np.float32), name)


def small_model(batch: str | int = "batch", scale: float = 1.0) -> onnx.ModelProto:
    """Conv, Relu, Slice, Conv on images (2, 5, 5)."""
    rng = np.random.default_rng(5)
    nodes = [
        helper.make_node("Conv", ["input", "first.weight"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Slice", ["b", "start", "end", "axis"], ["c"]),
        helper.make_node("Conv", ["c", "second.weight"], ["output"]),
    ]
    constants = [
        constant("first.weight", scale * rng.standard_normal((4, 2, 3, 3))),
        constant("second.weight", rng.standard_normal((3, 2, 1, 1))),
        *(numpy_helper.from_array(np.array([v]), n) for n, v in (("start", 1), ("end", 3), ("axis", 1))),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 2, 5, 5])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, 3, 5, 5])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.fixture
def model(tmp_path: Path) -> onnx.ModelProto:
    onnx.save(small_model(), tmp_path / "small.onnx")
    return prepare(small_model(), batchnorm_as_convolution=False)


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 2, 5, 5)).astype(np.float32)


def observe(model: onnx.ModelProto, tmp_path: Path, batches: Iterable[np.ndarray]) -> Calibration:
    return collect(tmp_path / "small.onnx", model, batches, data="noise")


def test_collects_what_the_network_computes(model: onnx.ModelProto, tmp_path: Path) -> None:
    data = images(100)
    found = observe(model, tmp_path, np.array_split(data, 7))
    # what is only bounded or moved is not observed
    assert list(found.histograms) == ["input", "b"] and found.images == 100
    weight = numpy_helper.to_array(model.graph.initializer[0])
    padded = np.pad(data, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    expected = np.maximum(np.einsum("nchwyx,ocyx->nohw", windows, weight), 0)
    assert found.histograms["b"].counts.sum() == expected.size
    # another order of summation
    assert found.histograms["b"].high == pytest.approx(expected.max(), rel=1e-5)
    np.testing.assert_allclose(found.means["input"], data.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)


def test_batches_do_not_matter_and_parts_merge(model: onnx.ModelProto, tmp_path: Path) -> None:
    data = images(130)
    whole = observe(model, tmp_path, [data])
    parts = [observe(model, tmp_path, [data[:65]]), observe(model, tmp_path, [data[65:]])]
    parts[0].merge(parts[1])
    for other in (parts[0], observe(model, tmp_path, (data[i : i + 1] for i in range(130)))):
        assert other.images == 130
        assert all(same(whole.histograms[name], other.histograms[name]) for name in whole.histograms)


def test_saved_and_loaded(model: onnx.ModelProto, tmp_path: Path) -> None:
    found = observe(model, tmp_path, [images(64)])
    found.save(tmp_path / "ranges.npz")
    first = (tmp_path / "ranges.npz").read_bytes()
    again = Calibration.load(tmp_path / "ranges.npz")
    assert again.ranges("mse") == found.ranges("mse")
    assert (again.onnx_sha256, again.images, again.seed, again.data) == (found.onnx_sha256, 64, 0, "noise")
    again.save(tmp_path / "ranges.npz")
    assert (tmp_path / "ranges.npz").read_bytes() == first

    (tmp_path / "ranges.npz").write_bytes(first[:-200])
    with pytest.raises(InputError, match="a calibration that bar-edge saved"):
        Calibration.load(tmp_path / "ranges.npz")


def test_few_images_are_an_error_then_a_warning(model: onnx.ModelProto, tmp_path: Path) -> None:
    for n in (0, 63):
        with pytest.raises(InputError, match=f"got: {n} of noise"):
            observe(model, tmp_path, [images(n)] if n else [])
    assert "299 images" in observe(model, tmp_path, [images(299)]).warnings[0]
    assert observe(model, tmp_path, [images(300)]).warnings == []


@pytest.mark.parametrize(
    "batch",
    [np.zeros((70, 3, 5, 5), np.float32), np.zeros((70, 2, 5, 6), np.float32), np.zeros((70, 2, 5, 5), np.uint8)],
)
def test_images_that_the_file_does_not_take(model: onnx.ModelProto, tmp_path: Path, batch: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"float32 images \['batch', 2, 5, 5\]"):
        observe(model, tmp_path, [batch])


def test_a_batch_that_the_file_fixes(tmp_path: Path) -> None:
    onnx.save(small_model(batch=4), tmp_path / "small.onnx")
    model = prepare(small_model(batch=4), batchnorm_as_convolution=False)
    assert observe(model, tmp_path, [images(68)]).images == 68
    with pytest.raises(InputError, match=r"images \[4, 2, 5, 5\]"):
        observe(model, tmp_path, [images(68), images(3)])


def test_activations_that_are_not_finite(model: onnx.ModelProto, tmp_path: Path) -> None:
    data = images(70)
    data[40, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="not finite in input of small.onnx"):
        observe(model, tmp_path, [data])


def test_ranges_of_another_file(model: onnx.ModelProto, tmp_path: Path) -> None:
    found = observe(model, tmp_path, [images(64)])
    check_file(found, tmp_path / "small.onnx")
    onnx.save(small_model(scale=2.0), tmp_path / "small.onnx")
    with pytest.raises(InputError, match="one of another ONNX file"):
        check_file(found, tmp_path / "small.onnx")
    other = observe(prepare(small_model(scale=2.0), batchnorm_as_convolution=False), tmp_path, [images(64)])
    with pytest.raises(InputError, match="one of another ONNX file"):
        found.merge(other)


def test_random_images_by_name(model: onnx.ModelProto) -> None:
    found = np.concatenate(list(random_images(model, 5, seed=1)))
    assert found.shape == (5, 2, 5, 5) and found.dtype == np.float32
    assert np.array_equal(found, np.concatenate(list(random_images(model, 5, seed=1))))
