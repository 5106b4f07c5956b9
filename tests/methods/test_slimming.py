"""Network Slimming: its penalty, its scores, and every kind of network within budget."""

import pytest
import torch
from torch import Tensor, nn

from bar_edge.methods import METHODS
from bar_edge.methods.gating.projection import plan_within
from bar_edge.methods.slimming import SparseScales, scale_scores, scales
from bar_edge.network import Network, count, trace
from bar_edge.surgery import masked_outputs, relative_difference, slice_network
from tests.methods.test_fisher import context_of
from tests.methods.test_gates import NETS
from tests.reference import contrasting, randomise


class Scaled(nn.Module):
    """A convolution with BatchNorm and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)
        self.head = nn.Linear(3, 2)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([0.1, -0.4, 0.2, 0.3]))
            self.b.weight.copy_(torch.tensor([2.0, 1.0, 3.0])[:, None, None, None].expand_as(self.b.weight))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.norm(self.a(x)).relu()).relu()
        return self.head(y.mean((2, 3)))


def scaled() -> Network:
    return trace(Scaled().eval(), torch.zeros(2, 3, 4, 4))


def test_the_scores_are_the_scales_and_their_quantiles_by_filters() -> None:
    network = scaled()
    context = context_of(network, "2x", torch.randn(5, 3, 4, 4))
    assert list(scales(network, context.layout)) == ["a"]
    found = scale_scores(network, context.layout)
    assert found[:4].tolist() == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert found[4:].argsort().tolist() == [1, 0, 2] and found[4:].min() >= 0.1 and found[4:].max() <= 0.4


def test_the_penalty_and_its_subgradient() -> None:
    network = scaled()
    context = context_of(network, "2x", torch.randn(5, 3, 4, 4))
    pruner = SparseScales(network, context)
    images = torch.randn(2, 3, 4, 4)
    total = pruner.loss(torch.tensor(3.0), images, network(images))
    assert float(total.detach()) == pytest.approx(3.0 + 1e-4 * 1.0)
    total.backward()
    gradient = scales(network, context.layout)["a"].grad
    assert gradient is not None and gradient.tolist() == pytest.approx([1e-4, -1e-4, 1e-4, 1e-4])
    assert pruner.stats()["sparsity"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_network_is_pruned_exactly_and_within_budget(name: str) -> None:
    torch.manual_seed(0)
    module = randomise(NETS[name]().double(), seed=1, removed=0.3).eval()
    network = trace(module, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    images = contrasting(2, 3, 8, 8)
    context = context_of(network, "2x:flops", images, train=lambda *_: None)
    found = METHODS["slimming"].score(network, context)
    plan, _ = plan_within(context.layout, found, "flops", context.limit)
    sliced = slice_network(network, plan)
    with torch.no_grad():
        assert relative_difference(masked_outputs(network, plan, images), sliced(images)) < 1e-9
    assert count(sliced).flops <= context.limit
