"""A user may call things what fx, Python or we call something: all of it traces, trains, slices and is written."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bar_edge.errors import InputError
from bar_edge.methods import BAR, GateLayout
from bar_edge.network import Network, trace
from bar_edge.surgery import relative_difference
from bar_edge.targets.torch_source.source import write_torch_source


class Parts(nn.Module):
    """Two layers and a tensor under names of the user's."""

    def __init__(self, first: str, second: str, tensor: str) -> None:
        super().__init__()
        self.names = first, second, tensor
        self.add_module(first, nn.Conv2d(3, 8, 3, padding=1))
        self.add_module(second, nn.Conv2d(8, 8, 3, padding=1))
        self.register_buffer(tensor, torch.rand(8, 1, 1))
        self.end = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second, tensor = self.names
        y = torch.relu(self.get_submodule(first)(x))
        return self.end(y + self.get_submodule(second)(y) * self.get_buffer(tensor)).mean((2, 3))


def with_input(name: str) -> nn.Module:
    """Return a module whose forward calls its input so, and has infinity, a type and odd layers in its graph."""
    lines = [
        "class Module(nn.Module):",
        "    def __init__(this):",
        "        super().__init__()",
        "        this.layers = nn.ModuleDict({'3x3': nn.Conv2d(3, 8, 3), 'out': nn.Conv2d(8, 4, 1)})",
        f"    def forward(this, {name}):",
        f"        y = this.layers['3x3']({name})[:, :, 1:, 1:]",
        "        return this.layers['out'](y.masked_fill(y < float('-inf'), float('inf')).relu()).mean((2, 3))",
    ]
    made: dict[str, Any] = {"nn": nn}
    exec("\n".join(lines), made)
    module = made["Module"]()
    assert isinstance(module, nn.Module)
    return module


def goes_all_the_way(module: nn.Module, folder: Path) -> None:
    """Trace, train a step, slice, save and load, write as source: the same answers everywhere."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 8, 8)
    pruner = BAR(module.eval(), images, budget="1.5x", steps=1)
    assert relative_difference(module(images), pruner.dense(images)) < 1e-5
    outputs = pruner.network(images)
    pruner.loss(outputs.square().mean(), images, outputs).backward()
    pruner.step()
    small = pruner.slice().eval()
    small.save(folder / "network")
    spec = importlib.util.spec_from_file_location("model", write_torch_source(small, folder / "source"))
    assert spec is not None and spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    for other in (Network.load(folder / "network"), source.load()):
        assert relative_difference(small(images), other.eval()(images)) < 1e-5


@pytest.mark.parametrize(
    ("first", "second", "tensor"),
    [
        ("bar_gates", "bar_scaled", "bar_gates_"),
        ("bar_scaled", "class", "bar_gates"),
        ("class", "class_", "lambda"),
        ("conv 3x3", "conv-3x3", "a b"),
        ("ä", "日本", "γ"),
        ("graph", "code", "meta"),
        ("torch", "device", "inf"),
    ],
)
def test_names_of_layers_and_tensors(first: str, second: str, tensor: str, tmp_path: Path) -> None:
    goes_all_the_way(Parts(first, second, tensor), tmp_path)


@pytest.mark.parametrize("name", ["torch", "getattr", "inf", "nan", "device", "slice", "class_", "input", "ä"])
def test_names_of_inputs(name: str, tmp_path: Path) -> None:
    goes_all_the_way(with_input(name), tmp_path)


@pytest.mark.parametrize("name", ["class", "lambda", "graph", "ﬁ"])
def test_keep_takes_the_users_own_name(name: str) -> None:
    network = trace(Parts(name, "second", "t"), torch.zeros(2, 3, 8, 8))
    assert len(GateLayout(network, keep=(name,)).offsets) == len(GateLayout(network).offsets) - 1
    with pytest.raises(InputError, match="--keep PATTERN"):
        GateLayout(network, keep=(f"{name}x",))
