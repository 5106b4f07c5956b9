"""model.py and model.safetensors: the network bit for bit in a process that has no bar-edge, in code worth reading."""

import copy
import functools
import json
import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bar_edge.errors import InputError
from bar_edge.models import build
from bar_edge.network import Expand, MixedAdd, Network, leaves, trace
from bar_edge.network.graph_json import attach
from bar_edge.records import ChannelPlan
from bar_edge.surgery import slice_network
from bar_edge.targets.torch_source import operators
from bar_edge.targets.torch_source.source import write_torch_source
from tests.reference import random_kept, randomise

#: what the colleague does with each folder: no bar-edge to import, the folder itself the working directory
COLLEAGUE = """
import importlib, json, os, sys

class NoBarEdge:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].startswith("bar_edge"):
            raise ImportError("bar-edge is not installed here")

sys.meta_path.insert(0, NoBarEdge())
import torch
from torch.utils import _pytree as pytree

torch.set_num_threads(int(sys.argv[1]))
for folder in sys.argv[2:]:
    os.chdir(folder)
    importlib.invalidate_caches()
    from model import Model, load

    inputs = torch.load("../inputs.pt")[os.path.basename(folder)]
    fresh, net = Model(), load()
    assert isinstance(net, torch.nn.Module) and not net.training and fresh.training
    with torch.no_grad():
        answers = [net(*(x[:n] for x in inputs)) for n in (len(inputs[0]), 1)]
    elsewhere = load().to("meta")(*(x.to("meta") for x in inputs))
    out = {"answers": [pytree.tree_leaves(a) for a in answers], "structure": str(pytree.tree_structure(answers[0])),
           "keys": list(net.state_dict()), "devices": {str(t.device) for t in pytree.tree_leaves(elsewhere)}}
    net.train()
    torch.manual_seed(0)
    sum(t.square().sum() for t in pytree.tree_leaves(net(*inputs)) if t.requires_grad).backward()
    out["gradients"] = {name: p.grad for name, p in net.named_parameters()}
    out["buffers"] = dict(net.named_buffers())
    torch.save(out, "out.pt")
    del sys.modules["model"]
assert not [name for name in sys.modules if name.startswith("bar_edge")]
"""  # fmt: skip


def ask_colleague(networks: dict[str, Network], folder: Path) -> dict[str, dict[str, Any]]:
    """Write all networks and return what another process gets from them."""
    inputs = {
        name: [
            torch.randn(3, *shape, generator=torch.Generator().manual_seed(i), dtype=dtype_of(network))
            for i, shape in enumerate(network.input_shapes)
        ]
        for name, network in networks.items()
    }
    for name, network in networks.items():
        assert write_torch_source(network, folder / name) == folder / name / "model.py"
        assert sorted(p.name for p in (folder / name).iterdir()) == ["model.py", "model.safetensors"]
    torch.save(inputs, folder / "inputs.pt")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [sys.executable, "-B", "-c", COLLEAGUE, str(torch.get_num_threads())]
    done = subprocess.run(
        [*command, *(str(folder / name) for name in networks)],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name: {"inputs": inputs[name]} | torch.load(folder / name / "out.pt") for name in networks}


def dtype_of(network: Network) -> torch.dtype:
    return next((p.dtype for p in network.parameters()), torch.float32)


def check(network: Network, got: dict[str, Any]) -> None:
    """The same answers in eval mode, gradients and statistics in training, bit for bit; on another device too."""
    leaves = torch.utils._pytree.tree_leaves
    inputs = got["inputs"]
    network = network.eval()
    with torch.no_grad():
        wanted = [network(*(x[:n] for x in inputs)) for n in (len(inputs[0]), 1)]
    for ours, theirs in zip(wanted, got["answers"], strict=True):
        for a, b in zip(leaves(ours), theirs, strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    assert str(torch.utils._pytree.tree_structure(wanted[0])) == got["structure"]
    assert set(got["keys"]) == set(network.body.state_dict())
    assert got["devices"] == {"meta"}
    network = copy.deepcopy(network).train()
    torch.manual_seed(0)
    sum(t.square().sum() for t in leaves(network(*inputs)) if t.requires_grad).backward()
    parameters, buffers = dict(network.body.named_parameters()), dict(network.body.named_buffers())
    assert got["gradients"].keys() == parameters.keys() and got["buffers"].keys() == buffers.keys()
    for name, p in parameters.items():
        grad = got["gradients"][name]
        assert (p.grad is None and grad is None) or torch.equal(p.grad, grad), name
    assert all(torch.equal(got["buffers"][name], value) for name, value in buffers.items())


def forward_of(path: Path) -> str:
    """Return the text of Model.forward."""
    lines = path.read_text(encoding="utf-8").split("    def forward(self")[-1].split("\n\n\ndef load")[0]
    return f"    def forward(self{lines}"


# ------------------------------------------------------------------------- networks of the zoo, dense and sliced

ZOO = {"resnet20": 0.5, "mobilenetv2": 0.5, "wrn-10-1": 1.0, "vgg16": 0.25}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Network, dict[str, Any], Path]]:
    networks = {}
    for name, width in ZOO.items():
        module = build(name, input_shape=(3, 16, 16), classes=10, model_args=(f"width={width}",)).eval()
        dense = trace(randomise(module), torch.zeros(2, 3, 16, 16))
        networks[f"{name} dense"] = dense
        for seed, removed in enumerate((0.3, 0.6)):
            kept = random_kept(module, removed, seed)
            sliced = slice_network(dense, ChannelPlan(network=dense.fingerprint, kept=kept))
            networks[f"{name} sliced {removed}"] = sliced
    networks["wrn-10-1 float64"] = slice_network(
        networks["wrn-10-1 dense"].double(), ChannelPlan(network=networks["wrn-10-1 dense"].fingerprint, kept={})
    )
    networks["wrn-10-1 dense"].float()
    folder = tmp_path_factory.mktemp("zoo")
    got = ask_colleague(networks, folder)
    return {name: (network, got[name], folder / name) for name, network in networks.items()}


ZOO_CASES = [f"{name} {what}" for name in ZOO for what in ("dense", "sliced 0.3", "sliced 0.6")]


@pytest.mark.parametrize("name", [*ZOO_CASES, "wrn-10-1 float64"])
def test_the_colleague_has_the_same_network(name: str, zoo: dict[str, Any]) -> None:
    network, got, folder = zoo[name]
    check(network, got)
    text = (folder / "model.py").read_text(encoding="utf-8")
    assert "bar_edge" not in text and "import fx" not in text
    assert "torch.ops" not in text  # every operator of the zoo has a readable name
    assert max(map(len, text.splitlines())) <= 120
    has_mixed = any(isinstance(m, MixedAdd) for m in network.modules())
    assert ("class MixedAdd(nn.Module)" in text) == has_mixed
    if name.startswith(("resnet", "wrn")) and "sliced" in name:
        assert has_mixed


def test_the_dense_network_has_the_users_names(zoo: dict[str, Any]) -> None:
    module = build("resnet20", input_shape=(3, 16, 16), classes=10, model_args=("width=0.5",))
    assert set(zoo["resnet20 dense"][1]["keys"]) == set(module.state_dict())


def test_it_is_an_ordinary_module_to_trace_again(zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    network, _, folder = zoo["resnet20 sliced 0.6"]
    monkeypatch.syspath_prepend(folder)
    import model

    net = model.load()
    del sys.modules["model"]
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(trace(net, x)(x), network.eval()(x))


# ---------------------------------------------------------------------------------------------------- operators


class Net(nn.Module):
    """A function of one tensor and the parts given by name."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


#: what stands in model.py -> what the user wrote, x: (N, 4, 8, 8)
WRITTEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "x + 0.5": lambda s, x: x + 0.5,
    "1 - x": lambda s, x: 1 - x,
    "x * x": lambda s, x: x.mul(x),
    "x / 3": lambda s, x: x / 3,
    "-x": lambda s, x: -x,
    "x ** 2": lambda s, x: x**2,
    "x @ x": lambda s, x: x @ x,
    "x > 0": lambda s, x: x > 0,
    "x * self.gain": lambda s, x: x * s.gain,
    "x + self.shift[0]": lambda s, x: x + s.shift[0],
    "torch.add(x, x, alpha=2)": lambda s, x: torch.add(x, x, alpha=2),
    "F.relu(x)": lambda s, x: F.relu(x),
    "F.relu6(x)": lambda s, x: F.hardtanh(x, 0.0, 6.0),
    "F.hardtanh(x, -0.5, 0.5)": lambda s, x: F.hardtanh(x, -0.5, 0.5),
    "F.silu(x)": lambda s, x: F.silu(x),
    "F.gelu(x)": lambda s, x: F.gelu(x),
    'F.gelu(x, approximate="tanh")': lambda s, x: F.gelu(x, approximate="tanh"),
    "F.hardswish(x)": lambda s, x: F.hardswish(x),
    "F.hardsigmoid(x)": lambda s, x: F.hardsigmoid(x),
    "F.leaky_relu(x, 0.1)": lambda s, x: F.leaky_relu(x, 0.1),
    "F.elu(x, 0.5)": lambda s, x: F.elu(x, 0.5),
    "F.selu(x)": lambda s, x: F.selu(x),
    "F.celu(x, 0.7)": lambda s, x: F.celu(x, 0.7),
    "F.softplus(x)": lambda s, x: F.softplus(x),
    "F.mish(x)": lambda s, x: F.mish(x),
    "F.logsigmoid(x)": lambda s, x: F.logsigmoid(x),
    "F.glu(x, 1)": lambda s, x: F.glu(x, 1),
    "torch.sigmoid(x)": lambda s, x: x.sigmoid(),
    "torch.tanh(x)": lambda s, x: x.tanh(),
    "torch.exp(x)": lambda s, x: x.exp(),
    "torch.softmax(x, 1)": lambda s, x: F.softmax(x, 1),
    "torch.log_softmax(x, 1)": lambda s, x: F.log_softmax(x, 1),
    "F.max_pool2d(x, 2, 2)": lambda s, x: F.max_pool2d(x, (2, 2), (2, 2)),
    "F.max_pool2d(x, 3, 2, 1, ceil_mode=True)": lambda s, x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "F.max_pool2d(x, (2, 1))": lambda s, x: F.max_pool2d(x, (2, 1)),
    "F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)": lambda s, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "F.adaptive_avg_pool2d(x, 1)": lambda s, x: F.adaptive_avg_pool2d(x, 1),
    "F.adaptive_avg_pool2d(x, (1, 2))": lambda s, x: F.adaptive_avg_pool2d(x, (1, 2)),
    "x.mean((1, 2, 3))": lambda s, x: x.mean((1, 2, 3)),
    "x.mean((2, 3))": lambda s, x: x.mean((2, 3)),
    "x.mean((2, 3), keepdim=True)": lambda s, x: x.mean((2, 3), True),
    "x.sum(1)": lambda s, x: x.sum(1),
    "x.amax((2, 3))": lambda s, x: x.amax((2, 3)),
    "x.var((2, 3), unbiased=False)": lambda s, x: x.var((2, 3), unbiased=False),
    "x.std(1, correction=0, keepdim=True)": lambda s, x: x.std(1, correction=0, keepdim=True),
    "torch.cat([x, x], 1)": lambda s, x: torch.cat([x, x], 1),
    "x.flatten(1)": lambda s, x: torch.flatten(x, 1),
    "x.flatten(2)": lambda s, x: x.flatten(2),
    "x.view(batch, 2, 2, 64)": lambda s, x: x.view(x.shape[0], 2, 2, 64),
    "x.permute(0, 2, 3, 1)": lambda s, x: x.permute(0, 2, 3, 1),
    "x.transpose(1, 2)": lambda s, x: x.transpose(1, 2),
    "x.unsqueeze(1)": lambda s, x: x.unsqueeze(1),
    "x[:, 1:3]": lambda s, x: x[:, 1:3],
    "x[:, :2]": lambda s, x: x[:, :2],
    "x[:, -2:]": lambda s, x: x[:, -2:],
    "x[:, ::2]": lambda s, x: x[:, ::2],
    "x[:, :, :, 1:]": lambda s, x: x[..., 1:],
    "x[:, self.lifted_tensor_0]": lambda s, x: x[:, [2, 0]],
    "x.unflatten(1, (2, 2))": lambda s, x: x.unflatten(1, (2, 2)),
    "x.repeat(1, 2, 1, 1)": lambda s, x: x.repeat(1, 2, 1, 1),
    "x.flip(1)": lambda s, x: x.flip(1),
    "F.pixel_shuffle(x, 2)": lambda s, x: F.pixel_shuffle(x, 2),
    "F.pad(x, (1, 1, 0, 0))": lambda s, x: F.pad(x, (1, 1, 0, 0)),
    'F.pad(x, (1, 1, 1, 1), "reflect")': lambda s, x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    'F.pad(x, (1, 1), value=float("-inf"))': lambda s, x: F.pad(x, (1, 1), value=-torch.inf),
    'F.interpolate(x, scale_factor=2.0, mode="nearest")': lambda s, x: F.interpolate(x, scale_factor=2),
    'F.interpolate(x, size=(5, 7), mode="nearest")': lambda s, x: F.interpolate(x, (5, 7)),
    'F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)': lambda s, x: F.interpolate(
        x, scale_factor=2, mode="bilinear", align_corners=True
    ),
    'F.interpolate(x, size=(5, 7), mode="bicubic")': lambda s, x: F.interpolate(x, (5, 7), mode="bicubic"),
    "x.clamp(max=1)": lambda s, x: x.clamp(max=1),
    "x.clamp(0, 1)": lambda s, x: x.clamp(0, 1),
    "x.new_zeros((batch, 2))": lambda s, x: x.new_zeros(x.shape[0], 2),
    "F.scaled_dot_product_attention(x, x, x)": lambda s, x: F.scaled_dot_product_attention(x, x, x),
    "torch.ops.aten.logsumexp.default(x, (2, 3))": lambda s, x: x.logsumexp((2, 3)),
    "torch.ops.aten.einsum.default('nchw,ndhw->ncd', [x, x])": lambda s, x: torch.einsum("nchw,ndhw->ncd", x, x),
}  # fmt: skip


def all_operators() -> Network:
    """One network that returns what every function makes of the same tensor."""
    parts = {"c": nn.Conv2d(3, 4, 3), "gain": nn.Parameter(torch.randn(4, 1, 1)),
             "shift": nn.ParameterList([torch.randn(4, 1, 1)])}  # fmt: skip
    net = Net(lambda s, x: (lambda y: [f(s, y) for f in WRITTEN.values()])(s.c(x)), **parts)
    return trace(randomise(net).eval(), torch.zeros(2, 3, 10, 10))


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3)
        self.norm, self.head = nn.BatchNorm2d(4, momentum=None), nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        z = self.norm(self.c(x) + self.d(y))
        return {"sum": z, 'it\'s "two"\n': (z.relu(), [self.head(z.mean((2, 3)))], (x,))}


def tied() -> Network:
    network = by_hand(("c", nn.Conv2d(3, 3, 3)), (torch.ops.aten.relu.default,), ("e", nn.Conv2d(3, 3, 3)))
    network.body.e.weight = network.body.c.weight
    return network


def odd_names() -> nn.Module:
    """Names that Python would change inside a class, numbers that are none, and what is no identifier."""
    net = Net(
        lambda s, x: s.get_submodule("conv-3x3")(
            s.parts.get_submodule("P3/8")(
                getattr(s.parts, "__a")(s.parts.get_submodule("07")(x) + s.get_submodule("7")(x))
            )
        )
    )
    net.add_module("conv-3x3", nn.Conv2d(4, 4, 1))
    net.parts = nn.Module()
    net.parts.add_module("__a", nn.Conv2d(4, 4, 3))
    net.parts.add_module("07", nn.Conv2d(3, 4, 3))
    net.parts.add_module("P3/8", nn.Conv2d(4, 4, 1))
    net.add_module("7", nn.Conv2d(3, 4, 3))
    return net


def random_graph(seed: int) -> Network:
    """Values that live short and long, of names that meet: what a variable may be called is decided by nothing else."""
    generator = torch.Generator().manual_seed(seed)
    root, graph = nn.Module(), fx.Graph()
    values = [graph.placeholder("x"), graph.placeholder("relu")]

    def pick() -> fx.Node:
        recent = values[-8:] if torch.rand(1, generator=generator) < 0.7 else values
        return recent[int(torch.randint(len(recent), (1,), generator=generator))]

    for i in range(60):
        kind = int(torch.randint(4, (1,), generator=generator))
        if kind == 0:
            values.append(graph.call_function(torch.ops.aten.relu.default, (pick(),)))
        elif kind == 1:
            values.append(graph.call_function(torch.ops.aten.sub.Tensor, (pick(), pick())))
        elif kind == 2:
            pair = graph.call_function(torch.ops.aten.chunk.default, (pick(), 2, 1))
            halves = [graph.call_function(operator.getitem, (pair, half)) for half in (1, 0)]
            values.append(graph.call_function(torch.ops.aten.cat.default, (halves, 1)))
        else:
            attach(root, f"part.{i % 7}.{i}", nn.Conv2d(2, 2, 1))
            values.append(graph.call_module(f"part.{i % 7}.{i}", (pick(),)))
    graph.output((pick(), pick(), values[-1]))
    body = fx.GraphModule(root, graph)
    body.graph.eliminate_dead_code()
    body.recompile()
    body.delete_all_unused_submodules()
    return Network(body, ((2, 4, 4), (2, 4, 4)), {"list": [0, {"tuple": [1, 2]}, 0]})


IMAGES = torch.zeros(2, 3, 8, 8)
MADE: dict[str, Callable[[], Network]] = {
    "operators": all_operators,
    "several inputs": lambda: trace(Several().eval(), (IMAGES, torch.zeros(2, 1, 8, 8))),
    "a module twice": lambda: trace(Net(lambda s, x: s.c(F.relu(s.c(x))), c=nn.Conv2d(3, 3, 3)), IMAGES),
    "one weight, two modules": tied,
    "a weight also read": lambda: trace(
        Net(lambda s, x: s.c(x) * s.c.weight.mean(), c=nn.Conv2d(3, 4, 3)), IMAGES
    ),
    "numbered": lambda: trace(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.GroupNorm(2, 6)),
        IMAGES,
    ),
    "one axis": lambda: trace(
        nn.Sequential(nn.Conv1d(3, 4, 3, padding="same"), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(32, 5)).double(),
        torch.zeros(2, 3, 8),
    ),
    "layer norm": lambda: trace(
        Net(lambda s, x: s.n(s.c(x).permute(0, 2, 3, 1)), c=nn.Conv2d(3, 4, 1), n=nn.LayerNorm(4)), IMAGES
    ),
    "dropout": lambda: trace(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout2d(0.3), nn.Flatten(), nn.Dropout(0.2)), IMAGES
    ),
    "odd names": lambda: trace(odd_names(), IMAGES),
    "two number types": lambda: by_hand(
        ("c", nn.Conv2d(3, 4, 3)), (torch.ops.aten.to.dtype, torch.float64), ("d", nn.Conv2d(4, 2, 3).double())
    ),
}  # fmt: skip

MADE |= {f"random graph {seed}": functools.partial(random_graph, seed) for seed in range(6)}

#: our own leaves, as surgery makes them: x has 4 channels
LEAVES: dict[str, Callable[[], nn.Module]] = {
    "Expand": lambda: Expand(1, 9, (0, 3, 4, 8)),
    "MixedAdd plain": lambda: MixedAdd(4, (0, 1, 2, 3), (3, 1, 0, 2)),
    "MixedAdd wide": lambda: MixedAdd(6, (0, 1, 2, 3), (4, 0, 5, 2)),
    "PartialNorm": lambda: leaves.PartialNorm(1, 4, (0, 0, 1, 1), 1e-5, True),
    "PartialNorm last": lambda: leaves.PartialNorm(-1, 9, (0,) * 6, 1e-3, False),
}


def by_hand(*steps: tuple[Any, ...]) -> Network:
    """A chain of modules ("name", module) and of functions (function, *further arguments) on x: (N, 3, 8, 8)."""
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    for first, *rest in steps:
        if isinstance(first, str):
            attach(root, first, rest[0])
            x = graph.call_module(first, (x, x) if isinstance(rest[0], MixedAdd) else (x,))
        else:
            x = graph.call_function(first, (x, *rest))
    graph.output((x,))
    return Network(fx.GraphModule(root, graph), ((3, 8, 8),), 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Network, dict[str, Any], Path]]:
    networks = {name: make() for name, make in MADE.items()}
    networks |= {name: by_hand(("c", nn.Conv2d(3, 4, 3)), ("leaf", make())) for name, make in LEAVES.items()}
    for network in networks.values():
        randomise(network)
    folder = tmp_path_factory.mktemp("made")
    got = ask_colleague(networks, folder)
    return {name: (network, got[name], folder / name) for name, network in networks.items()}


@pytest.mark.parametrize("name", [*MADE, *LEAVES])
def test_every_part_is_the_same_there(name: str, made: dict[str, Any]) -> None:
    network, got, _ = made[name]
    check(network, got)


def test_operators_read_as_the_user_wrote_them(made: dict[str, Any]) -> None:
    text = forward_of(made["operators"][2] / "model.py")
    assert [line for line in WRITTEN if f" = {line}\n" not in text] == []
    assert set(re.findall(r"torch\.ops\.aten\.\w+", text)) == {"torch.ops.aten.logsumexp", "torch.ops.aten.einsum"}
    assert "_assert" not in text and "pin_memory" not in text


def test_all_our_leaves_are_tried() -> None:
    ours = {
        name for name, kind in vars(leaves).items() if isinstance(kind, type) and kind.__module__ == leaves.__name__
    }
    assert ours == {name.split()[0] for name in LEAVES}


def test_names_in_the_tables_exist() -> None:
    assert not [name for name in operators.METHODS | operators.SPREAD if not hasattr(Tensor, name)]
    assert not [name for name in operators.TORCH if not hasattr(torch, name)]
    assert not [name for name in operators.FUNCTIONAL.values() if not hasattr(F, name)]


def test_shared_weights_stay_one(made: dict[str, Any]) -> None:
    _, got, folder = made["one weight, two modules"]
    assert set(got["gradients"]) == {"c.weight", "c.bias", "e.bias"}
    assert set(got["keys"]) == {"c.weight", "c.bias", "e.weight", "e.bias"}
    assert "self.e.weight = self.c.weight" in (folder / "model.py").read_text(encoding="utf-8")


@pytest.mark.cuda
def test_it_runs_on_the_gpu(zoo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    network, _, folder = zoo["resnet20 sliced 0.3"]
    monkeypatch.syspath_prepend(folder)
    import model

    net = model.load().cuda()
    del sys.modules["model"]
    x = torch.randn(2, 3, 16, 16)
    # other kernels than on the CPU, twenty layers deep
    torch.testing.assert_close(net(x.cuda()).cpu(), network.eval()(x), rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------------------------- looks


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.squeeze, self.excite = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        weights = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return x + y * weights * self.scale


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.left, self.right = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, (1, 3), padding=(0, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> dict[str, Any]:
        x = self.blocks(F.relu(self.stem(image - self.mean)))
        a, b = x.chunk(2, 1)
        x = F.max_pool2d(torch.cat([self.left(a), self.right(b)], 1), 2)
        return {"classes": self.head(x.mean((2, 3))), "maps": (x,)}


EXPECTED = '''
class Model(nn.Module):
    """The network; image: (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((3, 1, 1)))
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)

        self.blocks = Parts()
        self.blocks[0] = Parts()
        self.blocks[0].conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.blocks[0].bn = nn.BatchNorm2d(4)
        self.blocks[0].squeeze = nn.Conv2d(4, 2, 1)
        self.blocks[0].excite = nn.Conv2d(2, 4, 1)
        self.blocks[0].scale = nn.Parameter(torch.zeros((4, 1, 1)))

        self.blocks[1] = Parts()
        self.blocks[1].conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.blocks[1].bn = nn.BatchNorm2d(4)
        self.blocks[1].squeeze = nn.Conv2d(4, 2, 1)
        self.blocks[1].excite = nn.Conv2d(2, 4, 1)
        self.blocks[1].scale = nn.Parameter(torch.zeros((4, 1, 1)))

        self.left = nn.Conv2d(2, 4, 1)
        self.right = nn.Conv2d(2, 4, (1, 3), padding=(0, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> dict:
        image = image - self.mean
        image = self.stem(image)
        image = F.relu(image)

        blocks_0 = self.blocks[0].conv(image)
        blocks_0 = self.blocks[0].bn(blocks_0)
        blocks_0 = F.relu(blocks_0)
        blocks_0_2 = F.adaptive_avg_pool2d(blocks_0, 1)
        blocks_0_2 = self.blocks[0].squeeze(blocks_0_2)
        blocks_0_2 = F.relu(blocks_0_2)
        blocks_0_2 = self.blocks[0].excite(blocks_0_2)
        blocks_0_2 = torch.sigmoid(blocks_0_2)
        blocks_0 = blocks_0 * blocks_0_2
        blocks_0 = blocks_0 * self.blocks[0].scale
        image = image + blocks_0

        blocks_1 = self.blocks[1].conv(image)
        blocks_1 = self.blocks[1].bn(blocks_1)
        blocks_1 = F.relu(blocks_1)
        blocks_1_2 = F.adaptive_avg_pool2d(blocks_1, 1)
        blocks_1_2 = self.blocks[1].squeeze(blocks_1_2)
        blocks_1_2 = F.relu(blocks_1_2)
        blocks_1_2 = self.blocks[1].excite(blocks_1_2)
        blocks_1_2 = torch.sigmoid(blocks_1_2)
        blocks_1 = blocks_1 * blocks_1_2
        blocks_1 = blocks_1 * self.blocks[1].scale
        image = image + blocks_1
        left = image[:, :2]
        image = image[:, 2:4]

        left = self.left(left)
        image = self.right(image)
        image = torch.cat([left, image], 1)
        image = F.max_pool2d(image, 2)
        head = image.mean((2, 3))
        head = self.head(head)
        return {"classes": head, "maps": (image,)}
'''


def test_it_reads_like_written_by_hand(tmp_path: Path) -> None:
    path = write_torch_source(trace(Tiny().eval(), torch.zeros(2, 3, 8, 8)), tmp_path)
    text = path.read_text(encoding="utf-8")
    model = "\nclass Model" + text.split("\nclass Model")[1].split("\n\ndef load")[0]
    assert model.rstrip() == EXPECTED.rstrip()


# ------------------------------------------------------------------------------------------- what is not written


def test_no_text_of_a_file_becomes_code(tmp_path: Path) -> None:
    """Strings stay strings; names that are none are refused, whoever made the graph."""
    evil = "x'); import os; os.mkdir('evil'); ('"
    network = by_hand(("c", nn.Conv2d(3, 4, 3)), (torch.ops.aten.to.dtype, torch.float32))
    network.out_spec = {"dict": {f'{evil}\n"""': 0}}
    path = write_torch_source(network, tmp_path)
    compiled = compile(path.read_text(encoding="utf-8"), "model.py", "exec")
    assert repr(f'{evil}\n"""') in path.read_text(encoding="utf-8") and "os" not in compiled.co_names

    named = by_hand(("c", nn.Conv2d(3, 4, 3)))
    for node in named.nodes:
        if node.op == "placeholder":
            node.target = evil
    with pytest.raises(ValueError, match="is not a name"):
        write_torch_source(named, tmp_path / "placeholder")

    root, graph = nn.Module(), fx.Graph()
    root.add_module('a"b', nn.Conv2d(3, 4, 3))
    graph.output((graph.call_module('a"b', (graph.placeholder("x"),)),))
    with pytest.raises((ValueError, SyntaxError)):
        write_torch_source(Network(fx.GraphModule(root, graph), ((3, 8, 8),), 0), tmp_path / "module")
    assert not (tmp_path / "placeholder").exists() and not (tmp_path / "module").exists()


def test_a_saved_file_gives_the_same_source(tmp_path: Path) -> None:
    network = trace(Tiny().eval(), torch.zeros(2, 3, 8, 8))
    network.save(tmp_path / "saved")
    a = write_torch_source(network, tmp_path / "a").read_text(encoding="utf-8")
    b = write_torch_source(Network.load(tmp_path / "saved"), tmp_path / "b").read_text(encoding="utf-8")
    assert a == b
    assert json.loads((tmp_path / "saved/network.json").read_text())  # untouched


def test_an_operator_that_torch_has_not() -> None:
    library = torch.library.Library("bar_edge_tests", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeImplicitAutograd")
    network = by_hand(("c", nn.Conv2d(3, 4, 3)), (torch.ops.bar_edge_tests.twice.default,))
    with pytest.raises(InputError, match="bar_edge_tests.twice"):
        write_torch_source(network, Path("never"))
    assert not Path("never").exists()
