"""Fisher pruning: its vectors, its signal against masks of each image, and every kind of network within budget."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from bar_edge.methods import METHODS, GateLayout, budget_limit
from bar_edge.methods.distillation import soft_cross_entropy
from bar_edge.methods.fisher import channel_signals, signal
from bar_edge.methods.gating.projection import plan_within
from bar_edge.methods.method import Context, Pruner
from bar_edge.network import Network, count, trace
from bar_edge.records import Budget
from bar_edge.requests import PruneRequest
from bar_edge.surgery import masked_outputs, relative_difference, slice_network
from tests.methods.test_gates import NETS
from tests.reference import contrasting, randomise


def untouched(*_: object) -> None:
    raise AssertionError("nothing is trained")


def context_of(
    network: Network,
    budget: str,
    images: Tensor,
    sizes: tuple[int, ...] = (3, 2),
    train: Callable[[nn.Module, Pruner], None] = untouched,
) -> Context:
    layout, parsed = GateLayout(network), Budget.parse(budget)

    def batches(_: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for part in images.split(list(sizes)):
            yield part, torch.arange(len(part)) % 2

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(2).mean(2) if outputs.ndim > 2 else outputs, targets)

    return Context(
        config=PruneRequest(model="of the test", budget=budget, method="fisher"),
        layout=layout,
        budget=parsed,
        limit=budget_limit(layout, parsed),
        steps=0,
        teacher=None,
        soft_loss=soft_cross_entropy,
        loss=loss,
        train=train,
        batches=batches,
    )


def test_the_printed_example() -> None:
    """methods.md 4: two images, two maps; coupled maps add up before they are squared."""
    slopes = torch.tensor([[0.3, -0.3], [-0.6, 0.2]])
    assert signal(slopes).tolist() == pytest.approx([0.1125, 0.0325])
    assert signal(slopes.sum(1, keepdim=True)).tolist() == pytest.approx([0.04])


class Two(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu()).relu()
        return self.head(y.mean((2, 3)))


def test_the_signal_is_half_the_mean_square_of_the_slope_along_a_mask() -> None:
    torch.manual_seed(0)
    module, images = Two().double().eval(), torch.randn(5, 3, 6, 6, dtype=torch.float64)
    network = trace(module, torch.zeros(2, 3, 6, 6, dtype=torch.float64))
    context = context_of(network, "2x", images)
    found = channel_signals(network, context)
    expected = []
    for image, target in zip(images, [0, 1, 0, 0, 1], strict=True):  # as `batches` gives them
        masks = [torch.ones(n, 1, 1, dtype=torch.float64, requires_grad=True) for n in (3, 4)]
        y = (module.b((module.a(image[None]) * masks[0]).relu()) * masks[1]).relu().mean((2, 3))
        loss = nn.functional.cross_entropy(module.head(y), torch.tensor([target]))
        expected.append(torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, masks)]))
    assert torch.allclose(found, torch.stack(expected).square().mean(0) / 2, rtol=1e-9)


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_network_is_pruned_exactly_and_within_budget(name: str) -> None:
    torch.manual_seed(0)
    module = randomise(NETS[name]().double(), seed=1, removed=0.3).eval()
    network = trace(module, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    images = contrasting(5, 3, 8, 8)
    context = context_of(network, "2x:flops", images)
    found = METHODS["fisher"].score(network, context)
    plan, forced = plan_within(context.layout, found, "flops", context.limit)
    sliced = slice_network(network, plan)
    assert forced == 0
    with torch.no_grad():
        assert relative_difference(masked_outputs(network, plan, images), sliced(images)) < 1e-9
    assert count(sliced).flops <= context.limit
