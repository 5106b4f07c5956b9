"""Padding in every runtime, and errors of loaders that name what they do not know."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F

from bar_edge.bench import bench_onnx
from bar_edge.errors import InputError
from bar_edge.targets.onnx.file import export_onnx
from bar_edge.targets.onnx.parity import cpu_session, difference, relative
from bar_edge.targets.tensorrt.check import require_accepted

HAS_OPENVINO = importlib.util.find_spec("openvino") is not None


class Padded(nn.Module):
    def __init__(self, *pads: int) -> None:
        super().__init__()
        self.pads = list(pads)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, mode="circular") * 2


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "a convolution": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 6, 5)),
    "two of a row": (
        nn.Sequential(
            nn.Conv2d(3, 4, 5, padding=2, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular", stride=2),
        ),
        (3, 8, 8),
    ),
    "one dimension": (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (3, 9)),
    "three dimensions": (nn.Conv3d(2, 2, 3, padding=1, padding_mode="circular"), (2, 4, 5, 6)),
    "unequal": (Padded(1, 2, 0, 3), (3, 6, 5)),
    "one side": (Padded(0, 1, 0, 0), (3, 6, 5)),
    "a whole turn": (Padded(5, 5, 6, 6), (3, 6, 5)),
    "zeros beside it": (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular")),
        (3, 6, 5),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_circular_padding_runs_everywhere(name: str, tmp_path: Path) -> None:
    network, shape = NETWORKS[name]
    export_onnx(network.eval(), shape, path := tmp_path / "a.onnx")
    assert {"Slice", "Concat"} <= {node.op_type for node in onnx.load(path).graph.node}
    modes = [a.s for node in onnx.load(path).graph.node for a in node.attribute if a.name == "mode"]
    assert b"wrap" not in modes
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = [network(images).numpy()]
    got = list(cpu_session(path).run(None, {"input": images.numpy()}))
    assert relative(*difference(expected, got)) < 1e-5
    if HAS_OPENVINO:
        openvino = pytest.importorskip("openvino")
        model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        assert relative(*difference(expected, list(model([images.numpy()]).to_tuple()))) < 1e-5
    if len(shape) == 3:
        require_accepted(path)


@pytest.mark.parametrize("runtime", ["onnxruntime-cpu", "openvino-cpu"])
@pytest.mark.parametrize("operator", ["Unheard", "AnOperatorWithAVeryLongNameThatNobodyKnows"])
def test_a_loader_names_the_operator_that_it_does_not_know(runtime: str, operator: str, tmp_path: Path) -> None:
    if runtime == "openvino-cpu" and not HAS_OPENVINO:
        pytest.skip("OpenVINO is not installed")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", 4)) for name in ("input", "output")]
    nodes = [helper.make_node("Relu", ["input"], ["a"]), helper.make_node(operator, ["a"], ["output"], domain="mine")]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    path = tmp_path / f"{'long' * 20}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    with pytest.raises(InputError, match=operator) as caught:
        bench_onnx([path], runtime=runtime, seconds=0.01)
    assert ".cpp" not in caught.value.got and len(caught.value.got) < 600


class Pooled(nn.Module):
    """A maximum over windows whose padding is larger than all that is inside."""

    def __init__(self, pads: tuple[int, ...], pool: nn.Module, *, bias: float = -3.0) -> None:
        super().__init__()
        self.pads, self.pool, self.bias = list(pads), pool, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.pad(x + self.bias, self.pads)) * 2


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (Pooled((1, 1, 1, 1), nn.MaxPool2d(3, 2)), (3, 16, 16)),
        (Pooled((0, 1, 0, 1), nn.MaxPool2d(2, 2)), (3, 7, 7)),
        (Pooled((1, 1, 1, 1), nn.MaxPool2d(2, 2), bias=3.0), (3, 8, 8)),
        (Pooled((1, 1), nn.MaxPool1d(3, 2)), (3, 16)),
        (nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(3, 2, padding=1)), (3, 16, 16)),
    ],
)
def test_zeros_in_front_of_a_maxpool_stay_zeros(tmp_path: Path, network: nn.Module, shape: tuple[int, ...]) -> None:
    """ONNX Runtime makes them minus infinity; seen in BiT's stem (timm's resnetv2_50x1_bit)."""
    file, images = tmp_path / "a.onnx", torch.randn(2, *shape)
    export_onnx(network.eval(), shape, file)
    (found,) = cpu_session(file).run(None, {"input": images.numpy()})
    assert difference(found, network(images).numpy())[0] < 1e-6
