"""What is said about a network before any training, and networks that cannot be read."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bar_edge.errors import InputError
from bar_edge.methods import BAR, GateLayout
from bar_edge.network import trace
from bar_edge.network.modes import modes_apart
from bar_edge.pipeline import export_run, inspect_model
from bar_edge.requests import ExportRequest
from bar_edge.runs.inspection import preflight

NETWORK = """
import torch
from torch import nn

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = self.b(torch.relu(self.a(x)))
        x = x.softmax(1)
        if self.training:
            x = x * 2
        return self.fc(x.mean((2, 3)))

def factory():
    return Mixed()
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mixed_network.py"
    path.write_text(NETWORK)
    return f"{path}:factory"


def test_operators_without_a_rule_are_named_with_their_line(file: str) -> None:
    answer = inspect_model(file, input_shape=(3, 12, 12))
    (softmax,) = answer["without_rule"]
    assert softmax["operator"] == "aten.softmax.int"
    assert softmax["line"] == "mixed_network.py:13: x = x.softmax(1)"
    assert [name.rpartition(".")[2] for name in answer["traced_in_eval_form"]] == ["Mixed"]
    assert any("self.training" in warning for warning in answer["warnings"])
    json.dumps(answer)


def test_layers_that_are_kept_say_so(file: str) -> None:
    answer = inspect_model(file, input_shape=(3, 12, 12), keep=("b",), round_to=4)
    reasons = {layer["name"]: layer["reason"] for layer in answer["layers"]}
    assert reasons == {"a": "", "b": "kept by --keep", "fc": "its channels are the network's output"}
    free = inspect_model(file, input_shape=(3, 12, 12))
    assert answer["costs"]["volume"]["smallest"] > free["costs"]["volume"]["smallest"]


def test_a_warning_when_less_than_half_can_be_pruned() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 64, 3), nn.Flatten(2))
    answer = preflight(GateLayout(trace(module, torch.zeros(2, 3, 12, 12))), [])
    assert answer["costs"]["volume"]["prunable_share"] < 0.5
    assert sum("can be pruned" in warning for warning in answer["warnings"]) >= 1


def test_torchs_own_modules_are_vouched_for() -> None:
    assert modes_apart(nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3))) == []


@pytest.mark.parametrize("pattern", ["nothing.*", "b=", "b=-1", "a=x"])
def test_a_pattern_that_fits_nothing_is_refused(file: str, pattern: str) -> None:
    with pytest.raises(InputError, match="--keep"):
        inspect_model(file, input_shape=(3, 12, 12), keep=(pattern,))


class Ends(nn.Module):
    """A convolution and a function of its output."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 4, 3), end

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.end == "control flow":
            if y.sum() > 0:
                y = y * 2
            return y
        if self.end == "mean over the batch":
            return y - y.mean(0, keepdim=True)
        if self.end == "mean over everything":
            return y / y.mean()
        if self.end == "flattened batch":
            return y.flatten()
        return torch.fft.fft2(y).abs()


class Squares(nn.Module):
    """Nothing that could be pruned."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square()


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("control flow", "if y.sum() > 0"),
        ("mean over the batch", "y.mean(0, keepdim=True)"),
        ("mean over everything", "y / y.mean()"),
        ("flattened batch", "y.flatten()"),
        ("complex numbers", "torch.fft.fft2(y)"),
    ],
)
def test_networks_that_cannot_be_read_quote_the_line(end: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        trace(Ends(end), torch.zeros(2, 3, 8, 8))
    assert said in str(error.value) and "test_preflight.py:" in str(error.value)


def test_a_network_without_convolutions_is_refused() -> None:
    with pytest.raises(InputError, match="convolution.*\\n.*1: its channels are the network's output"):
        BAR(nn.Sequential(nn.Flatten(1), nn.Linear(48, 10)), torch.zeros(2, 3, 4, 4), budget="2x", steps=10)
    with pytest.raises(InputError, match="no convolution.* only aten.square.default at test_preflight.py:.*x.square()"):
        BAR(Squares(), torch.zeros(2, 3, 4, 4), budget="2x", steps=10)
    with pytest.raises(InputError, match="convolution"):
        mlp = nn.Sequential(nn.Flatten(1), nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 4))
        BAR(mlp, torch.zeros(2, 3, 4, 4), budget="2x", steps=10)


def test_export_refuses_unknown_targets(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="torch"):
        export_run(tmp_path, ExportRequest(target="nothing"))


def test_what_remains_at_half_the_width_stands_beside_the_share() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    through = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(1), nn.Conv2d(8, 8, 3), nn.Softmax(1), nn.Conv2d(8, 4, 3))
    figures = []
    for module in (plain, through):
        answer = preflight(GateLayout(trace(module.eval(), torch.zeros(2, 3, 12, 12))), [])
        figures.append(answer["costs"]["flops"])
    first, second, last = 2 * 100 * 27 * 8, 2 * 64 * 72 * 8, 2 * 36 * 72 * 4
    assert figures[0]["full"] == figures[1]["full"] == first + second + last
    assert figures[0]["at_half_width"] == pytest.approx((first / 2 + second / 4 + last / 2) / figures[0]["full"])
    assert figures[1]["at_half_width"] == pytest.approx((first / 2 + second / 2 + last) / figures[1]["full"])


def test_what_counts_for_nothing_is_named() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).flatten(2)
            return self.fc((y @ y.mT @ y).mean(2))

    answer = preflight(GateLayout(trace(Attends().eval(), torch.zeros(2, 3, 6, 6))), [])
    named = {row["operator"]: row["flops"] for row in answer["uncounted"]}
    assert named == {"aten.matmul.default": 2 * 8 * 8 * 16, "fc": 2 * 8 * 4}
    assert all("test_preflight.py:" in row["line"] for row in answer["uncounted"])
