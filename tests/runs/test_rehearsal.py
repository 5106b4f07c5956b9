"""What would fail after the training fails before it, with exit 2, and nothing is written or changed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bar_edge.config import TrainConfig
from bar_edge.data import load_data
from bar_edge.errors import InputError
from bar_edge.methods import GateLayout
from bar_edge.network import Network, trace
from bar_edge.runs import rehearsal
from bar_edge.runs.rehearsal import rehearse, rehearse_task, two
from bar_edge.training import load_task
from bar_edge_cli.main import main

FILE = """
import torch
from torch import nn

class Data:
    def __init__(self, target, images=40):
        self.target, self.images = target, images
    def __len__(self):
        return self.images
    def __getitem__(self, index):
        image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(index))
        return image, self.target(index)

def both(target):
    return Data(target), Data(target)

def fine(): return both(lambda i: i % 10)
def twelve(): return both(lambda i: i % 12)
def masks(): return both(lambda i: torch.full((8, 8), i % 3))
def minus_one(): return both(lambda i: torch.full((8, 8), -1 if i == 30 else i % 3))
def minus_hundred(): return both(lambda i: torch.full((8, 8), -100 if i == 1 else i % 3))
def many_labels(): return both(lambda i: torch.tensor([0.0, 1.0, float(i % 2)]))
def regression(): return both(lambda i: 0.5 * i)
def one_each(): return Data(lambda i: i, 10), Data(lambda i: i, 10)

class Net(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.a, self.b, self.end = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 10, 1), end
    def forward(self, x):
        x = torch.relu(self.a(x))
        if self.end == "bessel":
            x = torch.special.bessel_j0(x)
        y = self.b(x)
        if self.end == "two":
            return {"out": y, "aux": y}
        return y if self.end == "maps" else y.mean((2, 3))

def plain(): return Net("")
def bessel(): return Net("bessel")
def maps(): return Net("maps")
def two(): return Net("two")
"""


@pytest.mark.parametrize(
    ("model", "data", "task", "said"),
    [
        ("plain", "twelve", "classification", "labels from 0 to 9"),
        ("maps", "minus_one", "segmentation", "write 255"),
        ("maps", "minus_hundred", "segmentation", "write 255"),
        ("two", "masks", "segmentation", "outputs['out']"),
        ("plain", "many_labels", "classification", "--task package.module:Task"),
        ("plain", "regression", "classification", "--task package.module:Task"),
        ("plain", "masks", "classification", "one class per image"),
        ("maps", "fine", "classification", "outputs (N, classes)"),
        ("plain", "fine", "segmentation", "outputs (N, classes, H, W)"),
        ("plain", "one_each", "classification", "held-out"),
        ("bessel", "fine", "classification", "bessel_j0"),
    ],
)
def test_what_would_fail_at_the_end_fails_at_the_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    model: str,
    data: str,
    task: str,
    said: str,
) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    command = f"prune --model mine.py:{model} --data mine.py:{data} --task {task} --budget 1.5x --device cpu --out run"
    assert main(command.split()) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


class Small(nn.Module):
    """Two convolutions and a dropout, which draws random numbers in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 10, 3), nn.BatchNorm2d(8)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.b(torch.relu(self.norm(self.a(x))))).mean((2, 3))


def test_a_rehearsal_leaves_network_and_random_numbers_as_they_were() -> None:
    network, data = trace(Small().train(), torch.zeros(2, 1, 8, 8)), load_data("digits")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    layout = GateLayout(network)
    rehearse_task(network, load_task("classification"), data, TrainConfig(device="cpu"))
    rehearse(layout, "volume", 0.5 * layout.cost({}, "volume"), two(data.held_out)[0])
    assert torch.equal(torch.get_rng_state(), state) and network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("part", ["slice_network", "masked_outputs", "export_onnx"])
def test_an_error_of_any_part_says_what_and_where(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(
            "view size is not compatible\n\nWhile executing %relu_default : call_function[target=aten.relu]"
        )

    network = trace(Small(), torch.zeros(2, 1, 8, 8))
    monkeypatch.setattr(rehearsal, part, broken)
    layout = GateLayout(network)
    with pytest.raises(InputError, match="nothing was started") as error:
        rehearse(layout, "volume", 0.5 * layout.cost({}, "volume"), torch.rand(2, 1, 8, 8))
    assert "view size" in error.value.got and "test_rehearsal.py" in error.value.got


class Branches(nn.Module):
    """Blocks that sum branches: convolutions of several sizes, and a norm or the input itself as a shortcut."""

    def __init__(self, sizes: tuple[int, ...], norm: bool, grouped: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            groups = 32 if grouped else 1
            parts = [nn.Conv2d(32, 32, k, padding=k // 2, groups=groups, bias=False) for k in sizes]
            branches = [nn.Sequential(part, nn.BatchNorm2d(32)) for part in parts]
            block = [*branches, nn.BatchNorm2d(32) if norm else nn.Identity()]
            self.blocks.append(nn.ModuleList([*block, nn.Conv2d(32, 32, 1)] if grouped else block))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleList)
            x = torch.relu(sum(branch(x) for branch in block))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(Branches((3, 1), norm=True), id="RepVGG"),
        pytest.param(Branches((3, 3, 1), norm=True), id="MobileOne"),
        pytest.param(Branches((3,), norm=False), id="ResNet"),
        pytest.param(Branches((3, 5), norm=True, grouped=True), id="depthwise"),
    ],
)
def test_a_rehearsal_exports_no_more_than_the_network_has(monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> None:
    """A random plan's slices were hundreds of operators for one addition, and the exporter took minutes."""
    network, exported = trace(module, torch.zeros(2, 3, 8, 8)), list[Network]()
    monkeypatch.setattr(rehearsal, "export_onnx", lambda lowered, *_: exported.append(lowered))
    monkeypatch.setattr(rehearsal, "parity_onnx", lambda *_: 0.0)
    layout = GateLayout(network)
    rehearse(layout, "volume", 0.5 * layout.cost({}, "volume"), torch.rand(2, 3, 8, 8))
    assert len(exported[0].nodes) <= len(network.nodes)
