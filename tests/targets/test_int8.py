"""INT8 files: where the Q/DQ pairs stand, what they compute, and what is promised about them."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bar_edge.errors import InputError
from bar_edge.lowering.lower import folded, lower
from bar_edge.models import build
from bar_edge.network import Network, trace
from bar_edge.records import ChannelPlan
from bar_edge.records.lowering import Lowering
from bar_edge.records.tolerance import TOLERANCES
from bar_edge.surgery import slice_network
from bar_edge.targets.onnx.file import export_onnx
from bar_edge_calibration.collect import Calibration, collect
from bar_edge_calibration.equalise import equalise
from bar_edge_calibration.finetune import finetune
from bar_edge_calibration.graph import Graph, prepare
from bar_edge_calibration.islands import float_islands, optimised
from bar_edge_calibration.place import place
from bar_edge_calibration.quantize import Promise, quantize
from bar_edge_calibration.recipe import load_recipe, read_recipe, recipes
from tests.reference import random_kept, randomise

NETWORKS = ("wrn-16-1", "resnet20")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pruned networks of mixed connectivity, pre- and post-activation, as float files."""
    folder = tmp_path_factory.mktemp("float")
    for name in NETWORKS:
        module = randomise(build(name, input_shape=(3, 8, 8), classes=4), removed=0.3).eval()
        network = trace(module, torch.zeros(2, 3, 8, 8)).eval()
        plan = ChannelPlan(network=network.fingerprint, kept=random_kept(module, 0.3, seed=1))
        for form, suffix in (("slices", ""), ("gather:4", ".padded"), ("deferred:8@1x2", ".packed")):
            export_onnx(
                lower(slice_network(network, plan), Lowering.parse(form)), (3, 8, 8), folder / f"{name}{suffix}.onnx"
            )
    return folder


def images(n: int = 100, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, *(shape or (3, 8, 8)))).astype(np.float32)


def outputs(model: str | onnx.ModelProto, data: np.ndarray, *, optimise: bool = False) -> np.ndarray:
    """What a file means: computed as it is written, in float; or with integers, as ONNX Runtime optimises it."""
    source = model if isinstance(model, str) else model.SerializeToString()
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: data})[0]


def off(expected: np.ndarray, got: np.ndarray) -> float:
    """By how much of the largest output."""
    return float(np.abs(expected - got).max() / np.abs(expected).max())


def relative_error(expected: np.ndarray, got: np.ndarray) -> float:
    return float(np.square(expected - got).mean() / np.square(expected - expected.mean(0)).mean())


def quantised(files: Path, name: str, recipe: str, tmp_path: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    target = tmp_path / f"{name}.{recipe}.onnx"
    batches = np.array_split(images(), 3)
    record = quantize(
        files / f"{name}.onnx", target, images=batches, data="noise", recipe=load_recipe(recipe), **options
    )
    return target, record


def ops(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


# ------------------------------------------------------------------------------------------ placement


@pytest.mark.parametrize("name", [*NETWORKS, "wrn-16-1.padded", "wrn-16-1.packed"])
@pytest.mark.parametrize("recipe", recipes())
def test_an_int8_file_computes_nearly_the_same(
    files: Path, name: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bar_edge_calibration.place.LARGE", 1000)
    target, _ = quantised(files, name, recipe, tmp_path)
    onnx.checker.check_model(onnx.load(target), full_check=True)
    new = images(50, seed=1)
    expected, got = outputs(str(files / f"{name}.onnx"), new), outputs(str(target), new)
    # eight bits on random weights: each of the 20 layers adds about a thousandth
    assert 0 < relative_error(expected, got) < 0.05
    # with integers, on this processor, whichever it is: what is in 8 bits, for TensorRT, nothing here has to compute
    bits = load_recipe(recipe).weight_bits
    assert bits == 8 or off(got, outputs(str(target), new, optimise=True)) <= TOLERANCES["int8"]
    assert (bits == 8) == (recipe == "tensorrt")
    assert outputs(str(target), new[:1]).shape == (1, 4)


@pytest.mark.parametrize("recipe", recipes())
def test_what_the_recipe_says_is_in_the_file(
    files: Path, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bar_edge_calibration.place.LARGE", large := 1200)
    target, _ = quantised(files, "wrn-16-1", recipe, tmp_path)
    graph, wanted = Graph(onnx.load(target)), load_recipe(recipe)
    assert len(ops(graph.model, "BatchNormalization")) == (0 if wanted.batchnorm == "convolution" else 7)
    for pair in ops(graph.model, "QuantizeLinear"):
        scale, zero = graph.array(pair.input[1]), graph.array(pair.input[2])
        assert scale.shape == zero.shape == () and zero.dtype == wanted.activations
        assert wanted.activations == "uint8" or zero == 0
    kinds = []
    for node in ops(graph.model, "Conv") + ops(graph.model, "Gemm"):
        weight = graph.producers[node.input[1]]
        integers, scale = graph.array(weight.input[0]), graph.array(weight.input[1])
        assert integers.dtype == np.int8 and scale.shape == (integers.shape[0],)
        zero = set(graph.array(weight.input[2]))
        limit = 2 * large if integers.shape[2:] == (1, 1) else large  # a 1x1 shortcut has 2,048
        shifted = node.op_type == "Conv" and integers.size >= limit and integers.shape[1] > 1
        assert zero == {int(wanted.weights == "shifted" and shifted)}
        # every channel that is not all zeros uses its whole range, of which two products fit into 16 bits
        whole = {7: 64, 8: 127}[wanted.weight_bits] - min(zero)
        assert set(np.abs(integers.astype(int) - min(zero)).reshape(len(scale), -1).max(1)) <= {0, whole}
        assert wanted.weight_bits == 8 or 2 * 255 * int(np.abs(integers.astype(int)).max()) < 2**15
        kinds += [graph.producers[b].op_type if b in graph.producers else "float" for b in node.input[2:]]
    assert set(kinds) == {"DequantizeLinear" if wanted.bias == "int32" else "float"}
    assert (len(kinds) == len(ops(graph.model, "Conv") + ops(graph.model, "Gemm"))) == (wanted.bias == "every")


@pytest.mark.parametrize("name", NETWORKS)
def test_values_that_only_move_keep_their_grid(files: Path, name: str, tmp_path: Path) -> None:
    for recipe in ("onnxruntime-cpu", "tensorrt"):
        graph = Graph(onnx.load(quantised(files, name, recipe, tmp_path)[0]))
        grid = {pair.output[0]: tuple(pair.input[1:]) for pair in ops(graph.model, "DequantizeLinear")}
        after = {pair.input[0]: tuple(pair.input[1:]) for pair in ops(graph.model, "QuantizeLinear")}
        slices, joins = ops(graph.model, "Slice"), ops(graph.model, "Concat") + ops(graph.model, "Add")
        assert slices and joins
        assert all(grid[node.input[0]] == after[node.output[0]] for node in slices)
        shared = [len({grid[i] for i in node.input}) == 1 for node in joins]
        # a Relu on the stream needs a zero point of 0, which what is added to it cannot have
        assert all(shared) == (recipe == "tensorrt" or name == "wrn-16-1")


@pytest.mark.parametrize("name", [f"{name}{suffix}" for name in NETWORKS for suffix in ("", ".padded", ".packed")])
def test_no_island_of_float_in_onnxruntime(files: Path, name: str, tmp_path: Path) -> None:
    source = onnx.load(files / f"{name}.onnx")
    assert bool(ops(source, "Pad")) == name.endswith("padded")
    # pads on one side only are those of a convolution that ends the packed part
    pads = [list(a.ints) for node in ops(source, "Conv") for a in node.attribute if a.name == "pads"]
    assert ([1, 1, 0, 0] in pads) == name.endswith("packed")
    target, record = quantised(files, name, "onnxruntime-cpu", tmp_path)
    assert record["float_between_int8"] == []
    left = {node.op_type for node in optimised(target).graph.node}
    assert not left & {"Conv", "Relu", "Add", "DequantizeLinear", "BatchNormalization", "GlobalAveragePool"}


def test_islands_are_seen(files: Path, tmp_path: Path) -> None:
    model = prepare(onnx.load(files / "wrn-16-1.onnx"), batchnorm_as_convolution=False)
    found = collect(files / "wrn-16-1.onnx", model, [images()], data="noise")
    recipe = load_recipe("onnxruntime-cpu")
    onnx.save(place(model, found.ranges("minmax"), recipe), tmp_path / "a.onnx")
    assert any("BatchNormalization" in island for island in float_islands(tmp_path / "a.onnx"))

    model = prepare(onnx.load(files / "resnet20.onnx"), batchnorm_as_convolution=False)
    found = collect(files / "resnet20.onnx", model, [images()], data="noise")
    floats = frozenset({next(node.name for node in model.graph.node if node.name.startswith("layer2.1.conv1"))})
    onnx.save(place(model, found.ranges("minmax"), recipe, float_layers=floats), tmp_path / "b.onnx")
    bound, layer = (island.split()[0] for island in float_islands(tmp_path / "b.onnx"))
    assert bound == "Clip" and layer in ("Conv", "FusedConv")


def test_batchnorm_as_a_convolution_is_the_same_function(files: Path) -> None:
    model = onnx.load(files / "wrn-16-1.onnx")
    changed = prepare(model, batchnorm_as_convolution=True)
    assert len(ops(model, "BatchNormalization")) == 7 and not ops(changed, "BatchNormalization")
    assert ops(changed, "GlobalAveragePool") and not ops(changed, "ReduceMean")
    # float32, another order of operations
    np.testing.assert_allclose(outputs(changed, images(9)), outputs(model, images(9)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [f"{name}{suffix}" for name in NETWORKS for suffix in ("", ".padded", ".packed")])
def test_openvino_computes_the_mixed_forms(files: Path, name: str, tmp_path: Path) -> None:
    """Convolutions without a bias among them: what they are added to came out wrong until they got one."""
    pytest.importorskip("openvino")
    target, _ = quantised(files, name, "openvino-cpu", tmp_path)
    graph = Graph(onnx.load(target))
    assert all(graph.array(node.input[2]).any() for node in ops(graph.model, "Conv") if len(node.input) == 3)
    assert all(len(node.input) == 3 for node in ops(graph.model, "Conv"))
    assert name.startswith("resnet") or any(len(n.input) == 2 for n in ops(onnx.load(files / f"{name}.onnx"), "Conv"))
    np.save(tmp_path / "images.npy", images(8, seed=2))
    # in a process of its own: its compiler has crashed on such files
    program = (
        "import sys, numpy, openvino\n"
        "model = openvino.Core().compile_model(sys.argv[1], 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})\n"
        "numpy.save(sys.argv[3], model([numpy.load(sys.argv[2])])[0])\n"
    )
    paths = [str(path) for path in (target, tmp_path / "images.npy", tmp_path / "out.npy")]
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.returncode} {done.stderr[-500:]}"
    # the same integers; where a value lies between two of them, rounding may fall either way, in every layer
    assert relative_error(outputs(str(target), images(8, seed=2)), np.load(tmp_path / "out.npy")) < 5e-3


# ------------------------------------------------------------------------------------------ small graphs


def model_of(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], shape: tuple[int, ...], classes: tuple[int, ...]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", *classes])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_images_of_bytes_are_normalised_inside(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["input"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["a", "factor"], ["b"]),
        helper.make_node("Sub", ["b", "shift"], ["c"]),
        helper.make_node("Conv", ["c", "weight"], ["output"]),
    ]
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    constants = {"factor": np.float32(1 / 128), "shift": np.float32(0.5), "weight": weight}
    model = model_of(nodes, constants, (3, 6, 6), (4, 4, 4))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    onnx.save(model, tmp_path / "bytes.onnx")
    data = np.random.default_rng(0).integers(0, 256, (80, 3, 6, 6), np.uint8)
    recipe = load_recipe("onnxruntime-cpu")
    quantize(tmp_path / "bytes.onnx", tmp_path / "int8.onnx", images=[data], data="noise", recipe=recipe)
    assert len(ops(onnx.load(tmp_path / "int8.onnx"), "QuantizeLinear")) == 1
    assert relative_error(outputs(model, data), outputs(str(tmp_path / "int8.onnx"), data)) < 1e-3


def in_a_row(activation: str = "Relu", depthwise: bool = False) -> onnx.ModelProto:
    """Conv, activation, Conv with channels of very different sizes."""
    rng = np.random.default_rng(0)
    sizes = np.array([1, 10, 0.1, 3, 0], np.float32).reshape(5, 1, 1, 1)
    constants = {
        "first.weight": rng.standard_normal((5, 3, 3, 3)).astype(np.float32) * sizes,
        "first.bias": rng.standard_normal(5).astype(np.float32),
        "second.weight": rng.standard_normal((5, 1, 3, 3) if depthwise else (2, 5, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["input", "first.weight", "first.bias"], ["a"], pads=[1] * 4),
        helper.make_node(activation, ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second.weight"], ["output"], pads=[1] * 4, group=5 if depthwise else 1),
    ]
    return prepare(model_of(nodes, constants, (3, 6, 6), (5 if depthwise else 2, 6, 6)), batchnorm_as_convolution=False)


@pytest.mark.parametrize("depthwise", [False, True])
def test_equalised_networks_are_equal_and_balanced(depthwise: bool) -> None:
    model = in_a_row(depthwise=depthwise)
    equal, pairs = equalise(model)
    assert pairs == 1
    data = images(5, 3, 6, 6)
    np.testing.assert_allclose(outputs(equal, data), outputs(model, data), rtol=1e-4, atol=1e-3)  # of up to 200
    graph = Graph(equal)
    first, second = (graph.array(node.input[1]) for node in graph.nodes if node.op_type == "Conv")
    sizes = np.abs(first).max((1, 2, 3))
    np.testing.assert_allclose(sizes[:4], np.abs(second).max((1, 2, 3) if depthwise else (0, 2, 3))[:4], rtol=1e-5)
    assert sizes[4] == 0


def test_nothing_is_equalised_across_other_activations() -> None:
    model = in_a_row("Sigmoid")
    equal, pairs = equalise(model)
    assert pairs == 0 and equal.SerializeToString() == model.SerializeToString()


@pytest.mark.parametrize("depthwise", [False, True])
def test_bias_correction_centres_the_output(tmp_path: Path, depthwise: bool) -> None:
    model = in_a_row(depthwise=depthwise)
    onnx.save(model, tmp_path / "a.onnx")
    data = images(200, 3, 6, 6)
    found = collect(tmp_path / "a.onnx", model, [data], data="noise")
    recipe, ranges = load_recipe("openvino-cpu"), found.ranges("minmax")
    expected, shifts = outputs(model, data), []
    for means in (None, found.means):
        shift = (outputs(place(model, ranges, recipe, means=means), data) - expected).mean((0, 2, 3))
        shifts.append(np.abs(shift).mean())
    # the rest comes from the rounding of activations
    assert shifts[1] < 0.9 * shifts[0]


def test_a_dead_channel_keeps_its_bias(tmp_path: Path) -> None:
    model = in_a_row()
    onnx.save(model, tmp_path / "a.onnx")
    data = images(100, 3, 6, 6)
    ranges = collect(tmp_path / "a.onnx", model, [data], data="noise").ranges("minmax")
    for recipe in recipes():
        assert relative_error(outputs(model, data), outputs(place(model, ranges, load_recipe(recipe)), data)) < 0.01


# ------------------------------------------------------------------------------------------ the promise


def test_same_images_same_bytes(files: Path, tmp_path: Path) -> None:
    first, record = quantised(files, "wrn-16-1", "onnxruntime-cpu", tmp_path)
    before = first.read_bytes()
    second, again = quantised(files, "wrn-16-1", "onnxruntime-cpu", tmp_path)
    assert second.read_bytes() == before and record == again == json.loads(json.dumps(record))
    assert record["calibration"]["images"] == 100 and "100 images" in record["warnings"][0]
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_a_calibration_can_be_kept(files: Path, tmp_path: Path) -> None:
    recipe, source = load_recipe("openvino-cpu"), files / "wrn-16-1.onnx"
    model = prepare(onnx.load(source), batchnorm_as_convolution=False)
    collect(source, model, [images()], data="noise").save(tmp_path / "kept.npz")
    kept = Calibration.load(tmp_path / "kept.npz")
    options = {"images": [], "data": "noise", "recipe": recipe, "calibration": kept}
    quantize(source, tmp_path / "int8.onnx", **options)
    assert (tmp_path / "int8.onnx").read_bytes() == quantised(files, "wrn-16-1", recipe.name, tmp_path)[0].read_bytes()
    with pytest.raises(InputError, match="one of another ONNX file"):
        quantize(files / "resnet20.onnx", tmp_path / "int8.onnx", **options)


def scripted(float_score: float, *int8_scores: float) -> Callable[[Path], float]:
    """Return a score that says what it is told to, the last for ever."""
    scores = itertools.chain([float_score, *int8_scores], itertools.repeat(int8_scores[-1]))
    return lambda path: next(scores) if path.is_file() else pytest.fail("no file to score")


def test_a_promise_kept_at_once_climbs_no_ladder(files: Path, tmp_path: Path) -> None:
    promise = Promise(score=scripted(0.9, 0.895), max_drop=0.5)
    _, record = quantised(files, "wrn-16-1", "onnxruntime-cpu", tmp_path, promise=promise)
    assert [rung["rung"] for rung in record["rungs"]] == ["recipe"]
    assert record["score"]["within"] and record["score"]["drop_points"] == pytest.approx(0.5)
    assert record["sensitivity"] is None


def test_each_rung_is_kept_only_if_it_helps(files: Path, tmp_path: Path) -> None:
    # recipe .80, minmax .79, percentile .82, entropy .82, bias correction .81, equalised .83 and .85
    promise = Promise(score=scripted(0.9, 0.80, 0.79, 0.82, 0.82, 0.81, 0.83, 0.85), max_drop=5.0)
    target, record = quantised(files, "wrn-16-1", "onnxruntime-cpu", tmp_path, promise=promise)
    assert [rung["kept"] for rung in record["rungs"]] == [True, False, True, False, False, True, True]
    assert record["rungs"][2]["change"] == {"ranges": "percentile"}
    expected = {
        "ranges": "percentile",
        "bias_correction": True,
        "equalised": True,
        "finetuned": False,
        "float_layers": [],
    }
    assert record["settings"] == expected and record["score"]["int8"] == 0.85 and record["score"]["within"]
    assert float_islands(target) == []


def test_a_promise_missed_says_so_and_names_the_sensitive_layers(files: Path, tmp_path: Path) -> None:
    promise = Promise(score=scripted(0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6, 0.5), max_drop=1.0)
    target, record = quantised(files, "wrn-16-1", "onnxruntime-cpu", tmp_path, promise=promise)
    assert not record["score"]["within"] and record["score"]["drop_points"] == pytest.approx(30)
    most = max(record["sensitivity"], key=record["sensitivity"].get)
    assert record["settings"]["float_layers"] == [most]
    tried = [rung["change"]["float_layers"] for rung in record["rungs"] if rung["rung"] == "float layers"]
    assert len(tried) == len(record["sensitivity"]) // 4 and all(layers[0] == most for layers in tried)
    assert len(ops(optimised(target), "Conv")) + len(ops(optimised(target), "FusedConv")) == 1


def test_the_last_rung_is_a_finetuned_network(files: Path, tmp_path: Path) -> None:
    def tuned(path: Path) -> None:
        model = onnx.load(files / "wrn-16-1.onnx")
        (last,) = (t for t in model.graph.initializer if t.dims == [4] and t.name.endswith("bias"))
        last.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(last) + np.float32(100), last.name))
        onnx.save(model, path)

    def score(path: Path) -> float:
        return 0.9 if path.parent == files or outputs(str(path), images(4)).min() > 50 else 0.5

    promise = Promise(score=score, max_drop=1.0, finetune=tuned)
    target, record = quantised(files, "wrn-16-1", "onnxruntime-cpu", tmp_path, promise=promise)
    assert record["rungs"][-1]["rung"] == "fine-tuning" and record["rungs"][-1]["kept"]
    assert record["settings"]["finetuned"] and record["score"]["within"]
    assert outputs(str(target), images(4)).min() > 50


def test_finetuning_brings_the_rounded_network_nearer(tmp_path: Path) -> None:
    name = "resnet20"
    torch.manual_seed(0)
    network = folded(trace(randomise(build(name, input_shape=(3, 8, 8), classes=4)).eval(), torch.zeros(2, 3, 8, 8)))
    batches = [torch.from_numpy(images(32, seed=i)) for i in range(40)]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    tuned = finetune(network, batches, weight_bits=load_recipe("onnxruntime-cpu").weight_bits)
    assert tuned.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    moved = [key for key, value in tuned.state_dict().items() if not torch.equal(value, before[key])]
    assert any(key.endswith("weight") for key in moved)

    def error(other: Network) -> float:
        export_onnx(lower(other, Lowering.parse("slices")), (3, 8, 8), tmp_path / f"{name}.onnx")
        target, _ = quantised(tmp_path, name, "onnxruntime-cpu", tmp_path)
        with torch.no_grad():
            return relative_error(
                network(torch.from_numpy(images(64, seed=99))).numpy(), outputs(str(target), images(64, seed=99))
            )

    assert error(tuned) < error(network)


def test_images_that_are_gone_after_one_reading(files: Path, tmp_path: Path) -> None:
    promise = Promise(score=scripted(0.9, 0.9), max_drop=1.0)
    with pytest.raises(InputError, match="read more than once"):
        quantize(
            files / "resnet20.onnx",
            tmp_path / "a.onnx",
            images=iter([images()]),
            data="noise",
            recipe=load_recipe("tensorrt"),
            promise=promise,
        )
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_no_onnx_file(tmp_path: Path) -> None:
    Path(tmp_path / "a.onnx").write_text("none")
    recipe = load_recipe("tensorrt")
    with pytest.raises(InputError, match=r"got: a\.onnx"):
        quantize(tmp_path / "a.onnx", tmp_path / "b.onnx", images=[images()], data="noise", recipe=recipe)


# ------------------------------------------------------------------------------------------ recipes

GOOD = (
    'activations="int8"\npairs="layers"\ngrids="signed"\nweights="symmetric"\nweight_bits=7\nbias="float32"\n'
    'batchnorm="float32"\nranges="mse"\n'
)


def test_recipes_are_read_and_checked() -> None:
    assert recipes() == ["onnxruntime-amx", "onnxruntime-cpu", "openvino-cpu", "tensorrt"]
    assert read_recipe("mine", GOOD).activations == "int8"
    with pytest.raises(InputError, match="onnxruntime-cpu, openvino-cpu, tensorrt"):
        load_recipe("../x")
    for text, wrong in [
        (GOOD.replace("int8", "int4"), "activations = one of uint8, int8"),
        (GOOD + 'speed="high"\n', "only activations, pairs"),
        (GOOD.replace("bits=7", "bits=6"), "weight_bits = one of 7, 8"),
        (GOOD.replace('grids="signed"\n', ""), "grids = one of signed, shared"),
        (GOOD.replace('"signed"', "[1]"), "grids = one of signed, shared"),
        ("pairs=", "TOML in the recipe mine"),
    ]:
        with pytest.raises(InputError, match=wrong):
            read_recipe("mine", text)
