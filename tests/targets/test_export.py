"""One ONNX file: clean graph, same bytes, same outputs."""

import collections
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bar_edge
from bar_edge.errors import BarEdgeError, InputError
from bar_edge.lowering.lower import lower
from bar_edge.models import build
from bar_edge.network import Network, prunable, trace
from bar_edge.records import ChannelPlan
from bar_edge.records.lowering import Lowering
from bar_edge.surgery import slice_network
from bar_edge.targets.onnx.file import IR_VERSION, OPSETS, Preprocessing, _clean, export_onnx, parity_onnx
from bar_edge.targets.onnx.parity import cpu_session
from bar_edge.targets.table import TARGETS
from tests.network.architectures.concatenating import DenseBlock
from tests.network.architectures.dense_prediction import UNet

# float32 against ONNX Runtime's fused float32: issue 2 allows 1e-4, these shallow networks stay 20 times below
TOLERANCE = 5e-6
SHAPE_CHASERS = {"Shape", "ConstantOfShape", "Expand", "Unsqueeze", "Constant", "Identity", "If", "Loop"}
NORMALISATION = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


class Small(nn.Module):
    """Convolution, BatchNorm, a pre-activation BatchNorm behind an addition, a view by batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2, self.drop, self.head = nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(self.conv1(x)))
        b = F.relu(self.bn2(a + self.conv2(a)))
        return self.head(self.drop(F.adaptive_avg_pool2d(b, 1).view(x.size(0), -1)))


class Plumbing(nn.Module):
    """What sliced networks are made of: gathers, scatter-adds, slices, pads, concatenations, ATen calls."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.register_buffer("read", torch.tensor([0, 2, 3, 7]))
        self.register_buffer("written", torch.tensor([0, 2, 3, 5, 6, 7]))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        a = torch.ops.aten.relu.default(self.wide(x))
        b = torch.ops.aten.hardtanh.default(self.narrow(torch.ops.aten.index_select.default(a, 1, self.read)), 0.0, 6.0)
        c = a.index_add(1, self.written, b)
        d = torch.cat([c[:, :2] + b[:, :2], c[:, 2:]], 1) + F.pad(b, (0, 0, 0, 0, 0, 2))
        return d, {"pooled": F.silu(d).mean((2, 3))}


def randomised(module: nn.Module) -> nn.Module:
    """Give BatchNorms statistics that a wrong fold would show."""
    generator = torch.Generator().manual_seed(1)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor, low, high in (
            (norm.weight, 0.5, 2),
            (norm.bias, -1, 1),
            (norm.running_mean, -1, 1),
            (norm.running_var, 0.5, 2),
        ):
            tensor.data.uniform_(low, high, generator=generator)
    return module


def census(path: Path) -> dict[str, int]:
    return dict(collections.Counter(node.op_type for node in onnx.load(path).graph.node))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Small())


@pytest.fixture(scope="module")
def small_file(small: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    export_onnx(small, (3, 16, 16), path, metadata={"budget": "4x", "plan": "abc"})
    return path


def test_one_file_with_a_free_batch_and_metadata(small: nn.Module, small_file: Path) -> None:
    model = onnx.load(small_file, load_external_data=False)
    assert [p.name for p in small_file.parent.iterdir()] == [small_file.name]  # no external data, nothing temporary
    shapes = [
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output)
    ]
    assert shapes == [["batch", 3, 16, 16], ["batch", 5]]
    assert (model.opset_import[0].version, model.ir_version) == (OPSETS["onnx"], IR_VERSION)
    assert {p.key: p.value for p in model.metadata_props} == {"budget": "4x", "plan": "abc", "input_layout": "NCHW"}
    for batch in (1, 3):
        assert cpu_session(small_file).run(None, {"input": np.zeros((batch, 3, 16, 16), np.float32)})[0].shape == (
            batch,
            5,
        )
    assert small.training, "export must leave the user's module in its mode"


def test_batchnorm_folds_where_it_can_and_nothing_chases_shapes(small_file: Path) -> None:
    # bn1 follows a convolution and folds; bn2 follows an addition and cannot
    assert census(small_file) == {
        "Conv": 2, "Relu": 2, "Add": 1, "BatchNormalization": 1, "ReduceMean": 1, "Reshape": 1, "Gemm": 1,
    }  # fmt: skip


def test_parity_sees_equal_and_unequal(small: nn.Module, small_file: Path) -> None:
    images = torch.randn(70, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    assert parity_onnx(small, small_file, images) <= TOLERANCE
    other = randomised(Small())
    other.load_state_dict(small.state_dict())
    other.head.bias.data[3] += 0.05
    wrong = parity_onnx(other, small_file, images, chunk=8)
    with torch.no_grad():
        largest = other.eval()(images).abs().max().item()
    assert wrong == pytest.approx(0.05 / largest, rel=1e-3)  # max|a-b| / max|a| over all chunks, as defined
    other.head.bias.data[3] = float("nan")
    assert parity_onnx(other, small_file, images) == float("inf")


def test_same_bytes_again_in_another_process(small: nn.Module, small_file: Path, tmp_path: Path) -> None:
    torch.save(small.state_dict(), tmp_path / "weights.pt")
    script = f"""
import sys, torch
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_export import Small
from bar_edge.targets.onnx.file import export_onnx
module = Small()
module.load_state_dict(torch.load({str(tmp_path / "weights.pt")!r}, weights_only=True))
export_onnx(module, (3, 16, 16), Path({str(tmp_path / "again.onnx")!r}), metadata={{"plan": "abc", "budget": "4x"}})
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == "", "the exporter's chatter reached the user"
    assert (tmp_path / "again.onnx").read_bytes() == small_file.read_bytes()


def test_no_trace_of_this_machine_in_the_file(small_file: Path) -> None:
    content = small_file.read_bytes()
    for word in (
        str(Path(__file__).parent),
        str(Path(torch.__file__).parent),
        "site-packages",
        ".py",
        os.uname().nodename,
    ):
        assert word.encode() not in content, word
    model = onnx.load(small_file)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_cleaning_reaches_every_level(small_file: Path) -> None:
    model = onnx.load(small_file)
    wanted = model.SerializeToString(deterministic=True)
    graph = model.graph
    for message in (model, graph, graph.node[0], graph.input[0], graph.initializer[0], graph.node[0].attribute[0]):
        message.doc_string = "/home/user/model.py"
    for message in (model, graph, graph.node[-1], graph.output[0], graph.initializer[-1]):
        message.metadata_props.add(key="stack_trace", value="/home/user/model.py, line 3")
    model.producer_version = "2.13.0+local"
    _clean(model, {"plan": "abc", "budget": "4x", "input_layout": "NCHW"})
    assert model.SerializeToString(deterministic=True) == wanted


def test_preprocessing_goes_into_the_graph(small: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "raw.onnx"
    export_onnx(small, (3, 16, 16), path, preprocessing=NORMALISATION)
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    assert cpu_session(path).get_inputs()[0].type == "tensor(uint8)"
    assert parity_onnx(small, path, images, preprocessing=NORMALISATION) <= TOLERANCE
    # spelled out here once more, so that both sides cannot share a mistake
    mean, std = (torch.tensor(v)[:, None, None] for v in (NORMALISATION.mean, NORMALISATION.std))
    with torch.no_grad():
        expected = small.eval()((images / 255 - mean) / std)
    small.train()
    got = cpu_session(path).run(None, {"input": images.numpy()})[0]
    assert np.abs(got - expected.numpy()).max() <= TOLERANCE * expected.abs().max().item()


def test_plumbing_and_structured_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Plumbing()
    path = tmp_path / "plumbing.onnx"
    export_onnx(module, (3, 8, 8), path)
    assert [o.name for o in cpu_session(path).get_outputs()] == ["output_0", "output_1"]
    assert {"Gather", "ScatterND", "Slice", "Concat", "Pad"} <= set(census(path))
    assert not SHAPE_CHASERS & set(census(path))
    assert parity_onnx(module, path, torch.randn(5, 3, 8, 8)) <= TOLERANCE


class Reordered(nn.Module):
    """All channels in another order, which is not its own inverse, before layers of few and of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.mix = nn.Conv2d(5, 5, 3, groups=5), nn.Conv2d(5, 4, 1)
        self.register_buffer("order", torch.tensor([1, 2, 3, 4, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.filter(x.index_select(1, self.order)))


def test_channels_in_another_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, path, images = Reordered(), tmp_path / "reordered.onnx", torch.randn(2, 5, 6, 6)
    export_onnx(module, (5, 6, 6), path)
    assert parity_onnx(module, path, images) <= TOLERANCE
    gathers = [node for node in onnx.load(path).graph.node if node.op_type == "Gather"]
    assert [onnx.helper.get_node_attr_value(node, "axis") for node in gathers] == [-3]
    openvino = pytest.importorskip("openvino")  # takes the order for its inverse where the axis is positive
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (got,) = compiled([images.numpy()]).values()
    assert np.abs(got - module(images).detach().numpy()).max() <= TOLERANCE


def test_float64_and_several_inputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 3), nn.Linear(4, 2)

        def forward(self, image: Tensor, vector: Tensor) -> Tensor:
            return self.a(image).mean((2, 3)) + self.b(vector)

    module, path = Two().double(), tmp_path / "two.onnx"
    export_onnx(module, ((1, 6, 6), (4,)), path)
    assert [i.name for i in cpu_session(path).get_inputs()] == ["input_0", "input_1"]
    assert parity_onnx(module, path, (torch.randn(3, 1, 6, 6), torch.randn(3, 4))) <= TOLERANCE
    assert next(module.parameters()).dtype == torch.float64


@pytest.mark.parametrize(("name", "norms"), [("resnet20", 0), ("wrn-10-2", 3)])
def test_zoo_networks_are_clean(name: str, norms: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = trace(randomised(build(name, input_shape=(3, 32, 32), classes=10)), torch.randn(2, 3, 32, 32))
    path = tmp_path / "zoo.onnx"
    export_onnx(network, network.input_shapes, path)
    found = census(path)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in network.modules())
    assert found["Conv"] == convolutions and found["Gemm"] == 1
    assert found.get("BatchNormalization", 0) == norms  # pre-activation: one after the stem's addition per stage
    assert not SHAPE_CHASERS & set(found) and "Gather" not in found
    assert parity_onnx(network, path, torch.randn(4, 3, 32, 32)) <= TOLERANCE


@pytest.mark.parametrize("form", ["paper", "slices", "zero-filled", "regular"])
def test_sliced_network_in_every_lowering(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = trace(randomised(build("wrn-10-1", input_shape=(3, 16, 16), classes=10)), torch.randn(2, 3, 16, 16))
    generator = torch.Generator().manual_seed(5)
    kept = {}
    for name in (name for name, reason in prunable(dense).items() if not reason):
        channels = dense.body.get_submodule(name).out_channels
        kept[name] = tuple(sorted(torch.randperm(channels, generator=generator)[: channels // 2].tolist()))
    sliced = slice_network(dense, ChannelPlan(network=dense.fingerprint, kept=kept))
    path = tmp_path / "sliced.onnx"
    export_onnx(lower(sliced, Lowering.parse(form)), sliced.input_shapes, path)
    assert parity_onnx(sliced, path, torch.randn(8, 3, 16, 16)) <= TOLERANCE
    assert not SHAPE_CHASERS & set(census(path))
    assert ("ScatterND" in census(path)) == (form == "paper")


def randomly_sliced(name: str, seed: int) -> tuple[Network, tuple[int, ...]]:
    """Return a network of half its channels, more or less, and the shape of its input."""
    torch.manual_seed(seed)
    makes: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "resnet20": (lambda: build("resnet20", input_shape=(3, 16, 16), classes=5), (3, 16, 16)),
        "wrn": (lambda: build("wrn-10-1", input_shape=(3, 16, 16), classes=5), (3, 16, 16)),
        "densenet": (lambda: nn.Sequential(DenseBlock(8, 4, 2), DenseBlock(16, 4, 2)), (8, 8, 8)),
        "unet": (lambda: UNet(0.0625), (3, 16, 16)),
        "plain": (lambda: nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 5, 3)), (3, 8, 8)),
    }
    make, shape = makes[name]
    dense = trace(randomised(make()), torch.randn(2, *shape))
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for layer in (layer for layer, reason in prunable(dense).items() if not reason):
        channels = dense.body.get_submodule(layer).out_channels
        chosen = torch.randperm(channels, generator=generator)[: max(1, channels // 2)]
        kept[layer] = tuple(sorted(chosen.tolist()))
    return slice_network(dense, ChannelPlan(network=dense.fingerprint, kept=kept)), shape


@pytest.mark.parametrize("name", ["resnet20", "wrn", "densenet", "unet", "plain"])
def test_no_file_scatters_unless_it_is_asked_to(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for seed in (0, 1):
        network, shape = randomly_sliced(name, seed)
        inside = nn.Sequential(network, nn.Identity()) if seed else network
        assert bar_edge.export(inside, torch.randn(2, *shape), path) <= 1e-4
        assert not {"ScatterND", "ScatterElements", "Transpose"} & set(census(path))


@pytest.mark.parametrize("name", TARGETS)
def test_no_form_that_a_target_begins_with_scatters(name: str, tmp_path: Path) -> None:
    """These are what the command line writes without being asked for another."""
    path, target = tmp_path / "model.onnx", TARGETS[name]
    network, shape = randomly_sliced("wrn", 2)
    for lowering in {*target.unmeasured.values(), *(forms.candidates[0] for forms in target.forms.values())}:
        export_onnx(lower(network, lowering), shape, path)
        assert not {"ScatterND", "ScatterElements"} & set(census(path)), lowering


def test_a_scatter_that_is_asked_for_is_written(tmp_path: Path) -> None:
    network, shape = randomly_sliced("wrn", 0)
    path, images = tmp_path / "model.onnx", torch.randn(2, *shape)
    assert bar_edge.export(network, images, path, lowering="scatter") <= 1e-4
    assert "ScatterND" in census(path)
    assert bar_edge.export(network, images, path, lowering="slices") <= 1e-4
    assert "ScatterND" not in census(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="a lowering"):
        bar_edge.export(network, images, path, lowering="slcies")
    assert path.read_bytes() == before


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(x) + y


def test_several_inputs_are_a_tuple(tmp_path: Path) -> None:
    path = tmp_path / "two.onnx"
    assert bar_edge.export(TwoInputs(), (torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)), path) <= TOLERANCE
    assert [value.name for value in onnx.load(path).graph.input] == ["input_0", "input_1"]


class FixesTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


class SwallowsTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0)


class NoOnnxForm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0e(x)


@pytest.mark.parametrize("module", [FixesTheBatch(), SwallowsTheBatch(), NoOnnxForm()], ids=lambda m: type(m).__name__)
def test_what_has_no_onnx_form_is_refused_and_the_old_file_stays(
    module: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.onnx"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match="free batch size") as caught:
        export_onnx(module, (3, 4, 4), path)
    assert len(str(caught.value)) < 1000 and caught.value.got
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    assert capfd.readouterr() == ("", "")


def test_wrong_normalisation_and_unwritable_place_are_refused(small: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 means"):
        export_onnx(small, (3, 16, 16), tmp_path / "x.onnx", preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)))
    with pytest.raises(InputError, match="place to write"):
        export_onnx(nn.Conv2d(3, 2, 1), (3, 4, 4), tmp_path / "missing" / "x.onnx")


def test_the_package_is_the_function_of_the_contract(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small.onnx"
    assert bar_edge.export(small, torch.randn(1, 3, 16, 16), str(path)) <= TOLERANCE
    before = path.read_bytes()
    monkeypatch.setattr("bar_edge.targets.onnx.module.parity_onnx", lambda *_: float("nan"))
    with pytest.raises(BarEdgeError, match="was not written"):
        bar_edge.export(small, torch.randn(1, 3, 16, 16), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
