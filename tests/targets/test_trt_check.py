"""What TensorRT rejects is found, what we export is not rejected."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bar_edge.errors import InputError
from bar_edge.lowering.lower import lower
from bar_edge.methods import GateLayout, random_plan
from bar_edge.models import ZOO, build
from bar_edge.network import Network, count, trace
from bar_edge.records.lowering import Lowering
from bar_edge.surgery import slice_network
from bar_edge.targets.onnx.file import Preprocessing, export_onnx
from bar_edge.targets.onnx.parity import cpu_session, difference, relative
from bar_edge.targets.onnx.precision import to_half
from bar_edge.targets.tensorrt.check import check_onnx, require_accepted
from bar_edge.targets.tensorrt.operators import VERSIONS, types_of
from bar_edge_calibration.collect import random_images
from bar_edge_calibration.quantize import quantize
from bar_edge_calibration.recipe import load_recipe
from tests.reference import randomise

FLOAT = TensorProto.FLOAT
#: of a tensor, names where it is free
Shape = Sequence[int | str]
FREE = ("n", "c", "h", "w")


def constant(name: str, values: object, dtype: str = "f4") -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, dtype), name)


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: Sequence[onnx.TensorProto] = (),
    opset: int = 18,
    shape: Shape = ("batch", 8, 6, 6),
    ir: int = 8,
    out: Shape | None = None,
) -> Path:
    ends = [
        helper.make_tensor_value_info("x", FLOAT, shape),
        helper.make_tensor_value_info("y", FLOAT, out),
    ]
    graph = helper.make_graph(list(nodes), "g", ends[:1], ends[1:], list(constants))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir), path)
    return path


def node(kind: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), name=f"the_{kind}", **attributes)


WEIGHT = constant("w", np.zeros((8, 8, 3, 3)))
SCALE, ZERO, ONE = constant("s", 0.1), constant("z", 0, "i1"), constant("one", 1, "i1")
INDICES = constant("i", [[0], [2]], "i8")

#: what -> (nodes, constants, part of the reason)
REJECTED = {
    "ScatterND with a reduction": (
        [node("ScatterND", "x i u", reduction="add")],
        [INDICES, constant("u", np.zeros((2, 8, 6, 6)))],
        "reduction",
    ),
    "ScatterElements with a reduction": (
        [node("ScatterElements", "x i u", axis=1, reduction="add")],
        [constant("i", np.zeros((1, 2, 6, 6)), "i8"), constant("u", np.zeros((1, 2, 6, 6)))],
        "plugin",
    ),
    "an operator without a table entry": ([node("Unique", "x", "y")], [], "no operator Unique"),
    "an operator of another domain": ([node("FusedConv", "x w", domain="com.microsoft")], [WEIGHT], "com.microsoft::"),
    "zero points": (
        [node("QuantizeLinear", "x s one", "q"), node("DequantizeLinear", "q s one")],
        [SCALE, ONE],
        "zero point other than 0",
    ),
    "unsigned quantisation": (
        [node("QuantizeLinear", "x s u", "q"), node("DequantizeLinear", "q s u")],
        [SCALE, constant("u", 0, "u1")],
        "only INT8",
    ),
    "a scale that is computed": (
        [
            node("ReduceMax", "x", "m", keepdims=0),
            node("QuantizeLinear", "x m z", "q"),
            node("DequantizeLinear", "q s z"),
        ],
        [SCALE, ZERO],
        "must be a constant",
    ),
    "double": (
        [node("Cast", "x", "d", to=TensorProto.DOUBLE), node("Relu", "d", "e"), node("Cast", "e", to=FLOAT)],
        [],
        "DOUBLE",
    ),
    "unsigned bytes inside": (
        [node("Cast", "x", "b", to=TensorProto.UINT8), node("Cast", "b", to=FLOAT)],
        [],
        "UINT8",
    ),
    "indices of a pooling": (
        [
            node("MaxPool", "x", "p i", kernel_shape=[2, 2]),
            node("Cast", "i", "j", to=FLOAT),
            node("Add", "p j"),
        ],
        [],
        "indices",
    ),
    "cubic resizing": (
        [node("Resize", "x _ s2", mode="cubic")],
        [constant("_", [], "f4"), constant("s2", [1, 1, 2, 2])],
        "mode cubic",
    ),
    "axes that are computed": (
        [node("Shape", "x", "a"), node("ReduceSum", "x a")],
        [],
        "must be a constant",
    ),
    "integer matrix products": (
        [
            node("DynamicQuantizeLinear", "x", "q s z"),
            node("Cast", "q", to=FLOAT),
        ],
        [],
        "no operator DynamicQuantizeLinear",
    ),
}


@pytest.mark.parametrize("what", REJECTED)
def test_forbidden_nodes_are_rejected_by_every_version(what: str, tmp_path: Path) -> None:
    nodes, constants, reason = REJECTED[what]
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    path = write(tmp_path / "m.onnx", nodes, constants)
    if "domain" in what:
        model = onnx.load(path)
        del model.opset_import[:]
        model.opset_import.extend(domains)
        onnx.save(model, path)
    found = [f for f in check_onnx(path) if f.kind == "rejected"]
    assert any(reason in f.reason and f.versions == VERSIONS for f in found), [str(f) for f in found]
    assert all(f.operator in {n.op_type for n in nodes} and f.node for f in found)
    with pytest.raises(InputError, match="takes") as caught:
        require_accepted(path)
    assert found[0].operator in str(caught.value) and "x8x6x6" in str(caught.value)


def test_the_same_nodes_without_the_fault_are_accepted(tmp_path: Path) -> None:
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d"), node("Conv", "d w")]
    assert not [f for f in check_onnx(write(tmp_path / "m.onnx", nodes, [SCALE, ZERO, WEIGHT])) if f.kind == "rejected"]
    nodes = [node("MaxPool", "x", "p", kernel_shape=[2, 2]), node("Resize", "p _ s2", mode="linear")]
    constants = [constant("_", [], "f4"), constant("s2", [1, 1, 2, 2])]
    assert check_onnx(write(tmp_path / "m.onnx", nodes, constants)) == []


@pytest.mark.parametrize(
    ("what", "settings", "versions"),
    [
        ("opset 20", {"opset": 20, "ir": 9}, ("10.3",)),
        ("opset 8", {"opset": 8}, VERSIONS),
        ("IR version 11", {"ir": 11}, ("10.3",)),
        ("only the batch may be free", {"shape": ("batch", 8, "h", 6)}, VERSIONS),
    ],
)
def test_the_file_itself_is_judged(
    what: str, settings: dict[str, Any], versions: tuple[str, ...], tmp_path: Path
) -> None:
    found = check_onnx(write(tmp_path / "m.onnx", [node("Relu", "x")], **settings))
    assert all(finding.kind == "rejected" and what in finding.reason for finding in found)
    assert sum((finding.versions for finding in found), ()) == versions


@pytest.mark.parametrize(
    ("what", "nodes", "constants"),
    [
        ("a gather of channels", [node("Gather", "x i", axis=1)], [constant("i", [0, 2], "i8")]),
        ("a scatter", [node("ScatterND", "x i u")], [INDICES, constant("u", np.zeros((2, 8, 6, 6)))]),
        (
            "a scatter",
            [node("ScatterElements", "x i u", axis=1)],
            [constant("i", np.zeros((1, 2, 6, 6)), "i8"), constant("u", np.zeros((1, 2, 6, 6)))],
        ),
        (
            "only one input of the addition",
            [
                node("QuantizeLinear", "x s z", "q"),
                node("DequantizeLinear", "q s z", "d"),
                node("Relu", "x", "r"),
                node("Add", "d r"),
            ],
            [SCALE, ZERO],
        ),
        (
            "5 to 7 channels in INT8",
            [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "d"), node("Conv", "d w7")],
            [SCALE, ZERO, constant("w7", np.zeros((7, 5, 3, 3)))],
        ),
    ],
)
def test_slow_nodes_are_told_but_accepted(
    what: str, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], tmp_path: Path
) -> None:
    shape = ("batch", 5, 6, 6) if "5 to 7" in what else ("batch", 8, 6, 6)
    path = write(tmp_path / "m.onnx", nodes, constants, shape=shape)
    found = require_accepted(path)
    assert [f for f in found if f.kind == "slow" and what in f.reason and f.versions == VERSIONS]


def test_gather_from_a_table_is_not_a_gather_of_channels(tmp_path: Path) -> None:
    nodes = [node("Gather", "t i", "g", axis=1), node("Add", "x g")]
    path = write(tmp_path / "m.onnx", nodes, [constant("t", np.zeros((1, 9, 6, 6))), constant("i", range(8), "i8")])
    assert check_onnx(path) == []


def test_versions_differ() -> None:
    assert not types_of("Gelu", "10.3") and types_of("Gelu", "10.16")
    assert "INT64" not in types_of("Pow", "10.3") and "INT64" in types_of("Pow", "11")
    assert not types_of("Unique", "11")
    with pytest.raises(InputError, match="10.3, 10.16, 11"):
        check_onnx(Path("any"), ("8.6",))
    with pytest.raises(InputError, match="sound"):
        check_onnx(Path(__file__))


# ------------------------------------------------------------------------------------------ what we export


def sliced(name: str, factor: int, seed: int = 0) -> Network:
    """A zoo network with random weights, sliced by random masks to a part of its volume."""
    network = trace(randomise(build(name, input_shape=(3, 32, 32), classes=10), seed), torch.zeros(2, 3, 32, 32))
    plan = random_plan(GateLayout(network), "volume", count(network).volume / factor, seed)
    return slice_network(network, plan)


FAST = [("wrn-10-1", 4), ("wrn-10-1", 16)]
#: docs/zoo.md
NETWORKS = (*ZOO, "wrn-16-2", "wrn-16-4", "wrn-28-10")
CELLS = [*FAST, *(pytest.param(name, factor, marks=pytest.mark.slow) for name in NETWORKS for factor in (4, 16))]


@pytest.mark.parametrize(("name", "factor"), CELLS)
def test_sliced_zoo_networks_are_not_rejected(name: str, factor: int, tmp_path: Path) -> None:
    network = sliced(name, factor)
    path, other = tmp_path / "fp32.onnx", tmp_path / "other.onnx"
    for form in ("slices", "zero-filled", "regular"):
        export_onnx(lower(network, Lowering.parse(form)), network.input_shapes, path)
        require_accepted(path)
        to_half(path, other, "fp16")
        require_accepted(other)
        to_half(path, other, "bf16")
        require_accepted(other, ("10.16", "11"))
        with pytest.raises(InputError, match="opset 22"):
            require_accepted(other, ("10.3",))
        images = random_images(onnx.load(path), 64, 0)
        quantize(path, other, images=images, data="random", recipe=load_recipe("tensorrt"))
        found = require_accepted(other)
        assert not [f for f in found if "only one input of the addition" in f.reason]
        quantised = [n for n in onnx.load(other).graph.node if n.op_type == "QuantizeLinear"]
        assert len(quantised) > sum(n.op_type in ("Conv", "Gemm") for n in onnx.load(other).graph.node)


def test_the_literal_lowering_is_rejected(tmp_path: Path) -> None:
    network = sliced("wrn-10-1", 4)
    export_onnx(lower(network, Lowering.parse("paper")), network.input_shapes, tmp_path / "m.onnx")
    with pytest.raises(InputError, match="ScatterND"):
        require_accepted(tmp_path / "m.onnx")


# ------------------------------------------------------------------------------------------ half precision


@pytest.fixture(scope="module")
def trained_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sliced network with uint8 input and its normalisation inside."""
    network, path = sliced("wrn-10-1", 4), tmp_path_factory.mktemp("half") / "m.onnx"
    preprocessing = Preprocessing(mean=(0.5, 0.5, 0.4), std=(0.2, 0.2, 0.3))
    export_onnx(lower(network, Lowering.parse("slices")), network.input_shapes, path, preprocessing=preprocessing)
    return path


def test_fp16_computes_nearly_the_same_from_the_same_inputs(trained_like: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    to_half(trained_like, half, "fp16")
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), np.uint8)
    expected, got = (cpu_session(path).run(None, {"input": images}) for path in (trained_like, half))
    assert got[0].dtype == np.float32
    error = relative(*difference(expected, got))
    assert 1e-6 < error < 2e-2  # eleven bits through 20 layers; 0 would mean that nothing was converted
    model = onnx.load(half)
    assert {t.data_type for t in model.graph.initializer} <= {TensorProto.FLOAT16, TensorProto.INT64}
    assert half.stat().st_size < 0.7 * trained_like.stat().st_size
    require_accepted(half)


def test_bf16_has_the_type_everywhere_and_the_same_interface(trained_like: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    to_half(trained_like, half, "bf16")
    model = onnx.load(half)
    assert {t.data_type for t in model.graph.initializer} <= {TensorProto.BFLOAT16, TensorProto.INT64}
    before = onnx.load(trained_like).graph
    assert list(model.graph.input) == list(before.input) and list(model.graph.output) == list(before.output)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    (expected,) = cpu_session(trained_like).run(None, {"input": images})
    got = ReferenceEvaluator(str(half)).run(None, {"input": images})
    assert isinstance(got, list) and got[0].dtype == np.float32
    assert 1e-4 < relative(*difference([expected], got)) < 0.1  # eight bits through 10 layers


def test_what_does_not_fit_into_half_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [node("Mul", "x large")], [constant("large", 7e4)], out=FREE)
    with pytest.raises(InputError, match="70000 in large"):
        to_half(path, tmp_path / "h.onnx", "fp16")
    assert not (tmp_path / "h.onnx").exists()
    to_half(path, tmp_path / "h.onnx", "bf16")
    path = write(
        tmp_path / "m.onnx", [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z")], [SCALE, ZERO]
    )
    with pytest.raises(InputError, match="quantised"):
        to_half(path, tmp_path / "h.onnx", "fp16")


def test_inputs_that_stay_float32(tmp_path: Path) -> None:
    nodes = [node("Relu", "x", "r"), node("Resize", "r _ s2", mode="linear")]
    path = write(tmp_path / "m.onnx", nodes, [constant("_", [], "f4"), constant("s2", [1, 1, 2, 2])], out=FREE)
    to_half(path, tmp_path / "h.onnx", "fp16")
    images = np.random.default_rng(0).standard_normal((1, 8, 6, 6)).astype("f4")
    expected, got = (cpu_session(p).run(None, {"x": images}) for p in (path, tmp_path / "h.onnx"))
    np.testing.assert_allclose(got[0], expected[0], atol=2e-3)  # values up to 4 in eleven bits
