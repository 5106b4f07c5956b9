"""The proof: masked = sliced, and the widths are the plan's."""

from __future__ import annotations

import math
import random
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bar_edge.network import Network, count, prunable, trace
from bar_edge.network.counted_cost import count_executed
from bar_edge.network.cross_check import uncounted_flops
from bar_edge.records import ChannelPlan
from bar_edge.surgery import slice_network
from tests.meaning import CONVOLUTIONS, masked_run
from tests.network.random_networks.case import Case, Failure, Finding
from tests.network.random_networks.grower import random_case
from tests.network.random_networks.steps import PerChannel, RandomNetwork
from tests.reference import contrasting, difference, randomise, torch_flops, visible

FLOAT64 = 1e-9  # the issue's; sums in another order differ by about 1e-16 per layer
ATTEMPTS = 6  # at weights and masks that let the inputs be seen


@torch.no_grad()
def enliven(module: nn.Module, seed: int, removed: float = 0.0) -> nn.Module:
    """Give every parameter and running statistic values that hide nothing and keep the signal; returns the module."""
    randomise(module, seed, removed)
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> None:
        like.copy_(torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    for part in module.modules():
        if isinstance(part, (nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            taps = part.weight[0, 0].numel() / (1 if isinstance(part, nn.Conv3d) else math.prod(part.stride))
            bound = (6 / max(1.0, taps * part.in_channels / part.groups * (1 - removed))) ** 0.5
            uniform(part.weight, -bound, bound)
            if part.bias is not None:
                uniform(part.bias, -0.5, 0.5)
        elif isinstance(part, (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)):
            if part.weight is not None:
                uniform(part.weight, 0.4, 1.4)
                uniform(part.bias, -0.6, 0.6)
            if getattr(part, "running_mean", None) is not None:
                uniform(part.running_mean, -0.5, 0.5)
                uniform(part.running_var, 0.5, 2.0)
        elif isinstance(part, nn.PReLU):
            uniform(part.weight, 0.05, 0.5)
        elif isinstance(part, PerChannel):
            uniform(part.values, 0.4, 1.4)
    return module


def random_plan(network: Network, case: Case, attempt: int) -> dict[str, tuple[int, ...]]:
    """Return kept channels of every prunable layer; a layer's choice depends on its name and width, not on others."""
    kept = {}
    for name, reason in prunable(network).items():
        if reason:
            continue
        layer, r = network.body.get_submodule(name), random.Random(f"{case.seed} {attempt} {name}")
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        left = max(1, round((1 - case.removed) * width)) if r.random() >= case.dead else 0
        kept[name] = tuple(sorted(r.sample(range(width), left)))
    return kept


def inputs_of(case: Case) -> tuple[Tensor, ...]:
    return tuple(contrasting(3, *shape, seed=case.seed + i) for i, shape in enumerate(case.shapes))


def executed(network: Network, inputs: tuple[Tensor, ...]) -> tuple[int, int, int]:
    """Return volume and FLOPs that a network executes for one image, measured by hooks, and all its parameters."""
    volume = flops = 0

    def hook(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        nonlocal volume, flops
        if isinstance(layer, nn.Linear) and made.ndim == 2:
            return  # a classifier's features are no activation volume
        volume += made[0].numel()
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        flops += 2 * (given[0] if transposed else made)[0].numel() * layer.weight[0].numel()  # type: ignore[operator]

    layers = [m for m in network.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
    handles = [m.register_forward_hook(hook) for m in layers]
    with torch.no_grad():
        network(*inputs)
    for handle in handles:
        handle.remove()
    return volume, flops, sum(p.numel() for p in network.parameters())


def masked_and_visible(
    module: nn.Module, network: Network, case: Case, inputs: tuple[Tensor, ...]
) -> tuple[dict[str, tuple[int, ...]], list[Tensor], dict[str, int]]:
    """Return kept channels, answers and existing channels, with weights and masks that let the inputs be seen.

    A constant would hide every error: weights and masks are drawn again until an answer depends on the inputs.
    """
    for attempt in range(ATTEMPTS):
        enliven(module, case.seed + 1000003 * attempt, case.removed)
        network.body.load_state_dict(module.state_dict(), strict=False)  # parameters have the user's names
        kept = random_plan(network, case, attempt)
        answers, widths = masked_run(module, kept, *inputs)
        if any(map(visible, pytree.tree_leaves(answers))):
            break
    return kept, pytree.tree_leaves(answers), widths


def examine(case: Case, files: bool = False) -> Finding:
    """Trace, plan, slice and compare one case; files: save and load the sliced network too."""
    module, inputs = enliven(RandomNetwork(case), case.seed, case.removed), inputs_of(case)
    operators, opaque, stage = Counter[str](), Counter[str](), "trace"

    def failed(kind: str, detail: object) -> Finding:
        return Finding(Failure(kind, str(detail), case), False, operators, +opaque)

    try:
        network = trace(module, inputs)
        for node, passage in network.channels.items():
            if node.op != "placeholder":
                part = network.module_of(node)
                name = str(node.target) if part is None else type(part).__name__
                operators[name] += 1
                opaque[name] += passage.kind == "opaque"
        stage = "meaning"
        kept, wanted, widths = masked_and_visible(module, network, case, inputs)
        stage = "slice"
        plan = ChannelPlan(network=network.fingerprint, kept=kept)
        sliced = slice_network(network, plan)
        got = pytree.tree_leaves(sliced(*inputs))
        costs, counted = count(network, plan), count(sliced)
    except Exception as error:  # whatever it is, it is a finding
        return failed(stage, f"{type(error).__name__}: {error}")
    error = max(difference(a, b) for a, b in zip(wanted, got, strict=True))
    if not error <= FLOAT64:
        return failed("answer", f"differs by {error:.1e}")
    # channels that nobody reads run in the dense network, and count for nothing
    flops = count_executed(network).flops + sum(uncounted_flops(network).values())
    by_torch = torch_flops(network, *inputs)[1]
    if flops != by_torch:
        return failed("count", f"{flops} FLOPs counted and named as uncounted, {by_torch} by torch")
    measured = executed(sliced, inputs)
    own = (costs.volume, costs.flops, costs.params)
    # groups are filled up to one width, a layer that is called twice reads what either call needs: zeros are executed
    filled = any(getattr(m, "groups", 1) > 1 for m in sliced.modules()) or any(s.kind == "again" for s in case.steps)
    fits = all(m >= c for m, c in zip(measured, own, strict=True)) if filled else measured == own
    if costs != counted or not fits:
        return failed("count", f"plan {costs}, sliced {counted}, measured {measured}")
    wide = [name for name, number in widths.items() if _width(sliced, name) > number]  # none in groups: they are filled
    if wide:
        return failed("width", f"{wide[0]} has {_width(sliced, wide[0])} channels, {widths[wide[0]]} exist")
    if files and (problem := _reload(sliced, inputs, got)):
        return failed("file", problem)
    return Finding(None, not any(map(visible, wanted)), operators, +opaque)


def _width(network: Network, name: str) -> int:
    """Return the output channels of a layer, 0 if it is gone or in groups."""
    layer = dict(network.body.named_modules()).get(name)
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, CONVOLUTIONS) and layer.groups == 1 else 0


def _reload(network: Network, inputs: tuple[Tensor, ...], answers: list[Tensor]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            network.save(Path(folder))
            again = Network.load(Path(folder)).eval()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    with torch.no_grad():
        same = map(torch.equal, answers, pytree.tree_leaves(again(*inputs)))
        return "" if all(same) else "the loaded network answers differently"


def check(seed: int, removed: float, blocks: int | None = None) -> Failure | None:
    """Return what is wrong with the random network of a seed when a share of its channels is removed."""
    return examine(random_case(seed, removed, blocks), files=seed % 10 == 0).failure
