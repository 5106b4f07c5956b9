"""The gated network: the user's graph with a gate on every convolution output channel.

A gate scales the affine map that follows its convolution (BatchNorm's weight and bias, or the filters
themselves), so it costs no activation memory and `fold` is an assignment. A channel of a tensor none of
whose writers is open is 0 wherever it is read: after operators with f(0) != 0 it is masked again.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bar_edge.methods.gating import hard_concrete
from bar_edge.methods.gating.hard_concrete import GateDecision
from bar_edge.methods.gating.layout import GateLayout, Writers
from bar_edge.network import Network
from bar_edge.network.channels import COMPARISONS, TRANSPOSED, called_again, has_pole
from bar_edge.network.graph_json import describe, rebuild
from bar_edge.network.liveness import held_channels
from bar_edge.network.network import unflatten

aten = torch.ops.aten


class ScaledNorm(nn.Module):
    """BatchNorm whose output is multiplied by a scale per channel; x: (N, C, ...), scale: (C,)."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return scale * norm(x)."""
        n = self.norm
        factor = 0.0 if n.momentum is None else n.momentum
        if n.training and n.track_running_stats and n.num_batches_tracked is not None:
            n.num_batches_tracked.add_(1)
            factor = 1.0 / float(n.num_batches_tracked) if n.momentum is None else factor
        weight = scale.to(x.dtype) if n.weight is None else n.weight * scale.to(n.weight.dtype)
        bias = None if n.bias is None else n.bias * scale.to(n.bias.dtype)
        return F.batch_norm(x, n.running_mean, n.running_var, weight, bias, n.training, factor, n.eps)


class ScaledConv(nn.Module):
    """Convolution or linear layer whose output is multiplied by a scale per channel; scale: (C_out,)."""

    def __init__(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return scale * conv(x)."""
        c = self.conv
        scale = scale.to(c.weight.dtype)
        weight = c.weight * scale.view(-1, *[1] * (c.weight.ndim - 1))
        bias = None if c.bias is None else c.bias * scale
        return F.linear(x, weight, bias) if isinstance(c, nn.Linear) else c._conv_forward(x, weight, bias)


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """Where a factor enters the graph: the gates [first, first + n) themselves, or what the writers of a tensor give.

    soft: the factor behind a BatchNorm is min(1, sum of the writers' gates), so that the data can speak for
    a channel whose scale the BatchNorm takes away; elsewhere it is 1 for a live channel.
    """

    node: fx.Node
    first: int
    n: int
    mask: Writers | None
    soft: bool = False


class Gates(nn.Module):
    """All gates of a network and the factors that they give to the graph.

    log_alpha: (gates,). In training mode noisy gates are sampled, one u per channel and forward pass, from a
    generator seeded by (seed, step, pass); the others are 0 or 1, and the gradient passes them as if they were log
    alpha (straight-through). In eval mode gates are deterministic and dead layers are shut.
    """

    def __init__(
        self, layout: GateLayout, sites: list[Site], decision: GateDecision, seed: int, noise: bool = True
    ) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(layout.size))
        self.layout, self.sites, self.decision, self.seed, self.noise = layout, sites, decision, seed, noise
        self.step, self.passes = 0, 0
        self._eval: tuple[object, list[Tensor]] | None = None

    def forward(self) -> tuple[Tensor, ...]:
        """Return one factor (channels,) per site."""
        if not self.training:
            return tuple(self._deterministic())
        if self.noise:
            z = hard_concrete.sample(self.log_alpha, self._noise())
        else:
            z = self.opened().to(self.log_alpha) + self.log_alpha - self.log_alpha.detach()
        opened = self.layout.extended((z.detach() > 0).to(z.dtype))
        soft = self.layout.extended(z)
        return tuple(
            z[s.first : s.first + s.n] if s.mask is None else s.mask.alive(soft if s.soft else opened)
            for s in self.sites
        )

    def opened(self) -> Tensor:
        """Return which deterministic gates are open, (gates,) bool."""
        return hard_concrete.is_open(self.log_alpha.detach(), self.decision)

    def values(self) -> Tensor:
        """Return the deterministic gates (gates,)."""
        return hard_concrete.deterministic(self.log_alpha.detach(), self.decision)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _noise(self) -> Tensor:
        # hashed, because torch's CPU generator uses the low 32 bits of a seed only
        key = hashlib.blake2b(f"{self.seed}/{self.step}/{self.passes}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        self.passes += 1
        return torch.rand(len(self.log_alpha), generator=generator).to(self.log_alpha.device)

    def factors(self) -> list[Tensor]:
        """Return the deterministic factor (channels,) of every site; what is dead has 0."""
        factors: list[Tensor] = self._deterministic()
        return factors

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _deterministic(self) -> list[Tensor]:
        key = (self.log_alpha._version, self.log_alpha.device, self.log_alpha.data_ptr())
        if self._eval is None or self._eval[0] != key:
            held = held_channels(self.layout.network, self.layout.kept(self.opened()))
            z, device = self.values(), self.log_alpha.device
            factors, living = [], z.clone()
            for name, (first, n) in self.layout.offsets.items():
                calls = torch.stack([held[call] for call in self.layout.calls(name)])
                living[first : first + n] *= calls.any(0).to(device, z.dtype)
            living = self.layout.extended(living)
            for site in self.sites:
                alive = held[site.node].to(device, z.dtype)
                own = z[site.first : site.first + site.n] if site.mask is None else alive
                factors.append(alive * (site.mask.alive(living) if site.mask is not None and site.soft else own))
            self._eval = (key, factors)
        return self._eval[1]

    def __deepcopy__(self, memo: dict[int, object]) -> Gates:
        """Copy the gates; the layout describes the graph and is shared."""
        new = copy.copy(self)
        memo[id(self)] = new
        new._parameters = {"log_alpha": nn.Parameter(self.log_alpha.detach().clone())}
        new._eval = None
        return new


class GatedNetwork(nn.Module):
    """A network with gates inside; it shares the modules, hence the weights, of the layout's Network."""

    def __init__(
        self, layout: GateLayout, *, decision: GateDecision = "louizos", seed: int = 0, noise: bool = True
    ) -> None:
        super().__init__()
        self.layout, network = layout, layout.network
        self.out_spec = network.out_spec
        sites = _sites(self.layout)
        self.gates = Gates(self.layout, sites, decision, seed, noise)
        self.body = _insert(network, self.gates, sites)

    def forward(self, *inputs: Tensor) -> object:
        """Run the gated graph; outputs as the user's module returns them.

        Raises InputError for inputs of another shape than the trace's, the batch aside.
        """
        self.layout.network.check_inputs(*inputs)
        return unflatten(self.body(*inputs), self.out_spec)

    def __deepcopy__(self, memo: dict[int, object]) -> GatedNetwork:
        """Copy modules and gates; the layout is shared."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the graph as `Network.save` writes it, and the numbers: nodes of a graph are not those of its copy."""
        network, gates, layout = self.layout.network, self.gates, self.layout
        graph = describe(network.body, network.input_shapes, network.out_spec)
        options = {"keep": layout.keep, "round_to": layout.round_to, "table": layout.table}
        own = {"decision": gates.decision, "seed": gates.seed, "noise": gates.noise}
        numbers = {"log_alpha": gates.log_alpha.detach(), "step": gates.step, "passes": gates.passes}
        return _unpickled, (graph, network.body.state_dict(), options, own, numbers, self.training)


def _unpickled(
    graph: dict[str, Any],
    weights: dict[str, Tensor],
    options: dict[str, Any],
    own: dict[str, Any],
    numbers: dict[str, Any],
    training: bool,
) -> GatedNetwork:
    """Return what `GatedNetwork.__reduce__` took apart."""
    network = Network(*rebuild(graph))
    network.body.load_state_dict(weights)
    gated = GatedNetwork(GateLayout(network, **options), **own)
    gated.to(numbers["log_alpha"].device)
    with torch.no_grad():
        gated.gates.log_alpha.copy_(numbers["log_alpha"])
    gated.gates.step, gated.gates.passes = numbers["step"], numbers["passes"]
    return gated.train(training)


def _sites(layout: GateLayout) -> list[Site]:
    """Choose where every gate acts, and where channels must be masked again."""
    found = layout.found
    by_name = {str(node.target): node for node in found if node.op == "call_module"}
    sites, taken, again = [], set[fx.Node](), called_again(layout.network)
    for name, (first, n) in layout.offsets.items():
        for target in [by_name[norm] for norm in layout.followers(name)] or layout.calls(name):
            sites.append(Site(target, first, n, None))
            taken.add(target)
    mortal: dict[fx.Node, bool] = {}  # whether final gates can shut it although nobody gates it
    for node, passage in found.items():
        writers = layout.writers[node]
        mortal[node] = any(mortal[link.source] for link in passage.links)
        if passage.kind == "read" and str(node.target) not in layout.offsets:
            source = node.all_input_nodes[0]
            fed = layout.writers[source].always
            groups = passage.groups if len(fed) % passage.groups == 0 else 1
            mortal[node] = mortal[source] or not bool(fed.view(groups, -1).any(1).all())
            if mortal[node]:
                sites.append(Site(node, 0, 0, writers))
        masked = (passage.kind in ("map", "norm", "any") and not passage.keeps_zero) or has_pole(layout.network, node)
        if masked and node not in taken and (mortal[node] or not writers.always.all()):
            norm = isinstance(layout.network.module_of(node), nn.modules.batchnorm._BatchNorm)
            sites.append(Site(node, 0, 0, writers, soft=norm and str(node.target) not in again))
    return sites


def _insert(network: Network, gates: Gates, sites: list[Site]) -> fx.GraphModule:
    """Return a graph on the network's own modules, with a call of the gates in front and a factor at every site."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    where = {site.node: i for i, site in enumerate(sites)}
    ours = _free(network, "bar_gates"), _free(network, "bar_scaled")
    root: dict[str, object] = {ours[0]: gates}
    factors: fx.Node | None = None
    for node in network.nodes:
        if node.op == "placeholder":
            made[node] = graph.node_copy(node)
            continue
        factors = graph.call_module(ours[0]) if factors is None else factors
        module = network.module_of(node)
        if node.op in ("call_module", "get_attr"):
            root[str(node.target)] = (
                module if module is not None else operator.attrgetter(str(node.target))(network.body)
            )
        if node not in where:
            made[node] = graph.node_copy(node, lambda n: made[n])
            continue
        site, factor = sites[where[node]], graph.call_function(operator.getitem, (factors, where[node]))
        scaled = _scaled(module, site)
        if scaled is not None:
            root[f"{ours[1]}.{node.name}"] = scaled
            made[node] = graph.call_module(f"{ours[1]}.{node.name}", (made[node.all_input_nodes[0]], factor))
        else:
            shape = [1] * len(network.shapes[node.name])
            shape[gates.layout.found[node].axis] = -1
            shaped = graph.call_function(aten.reshape.default, (factor, shape))
            given = dict(made)
            if has_pole(network, node):  # 0 * infinity is not 0, and no gradient is: what is absent comes as 1
                source = [n for n in node.args if isinstance(n, fx.Node)][-1]
                there = graph.call_function(aten.gt.Scalar, (shaped, 0))
                given[source] = graph.call_function(aten.where.ScalarOther, (there, made[source], 1))
            times = aten.logical_and.default if node.target in COMPARISONS else aten.mul.Tensor
            made[node] = graph.call_function(times, (graph.node_copy(node, given.__getitem__), shaped))
    return fx.GraphModule(root, graph)


def _free(network: Network, name: str) -> str:
    """Return a name that no part of the user's network has."""
    while hasattr(network.body, name):
        name += "_"
    return name


def _scaled(module: nn.Module | None, site: Site) -> nn.Module | None:
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return ScaledNorm(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):  # a masked depthwise bias is scaled like an own gate
        return ScaledConv(module)
    if isinstance(module, nn.Linear) and site.mask is None:
        return ScaledConv(module)
    return None


def fold(network: Network, gated: GatedNetwork) -> None:
    """Multiply the deterministic gates into the network's own weights, in place: the function stays the same."""
    z, done = gated.gates.values(), set[str]()
    with torch.no_grad():
        for site, live in zip(gated.gates.sites, gated.gates.factors(), strict=True):
            if (site.mask is not None and not site.soft) or str(site.node.target) in done:
                continue
            done.add(str(site.node.target))
            module = network.module_of(_same_node(network, site.node))
            factor = live if site.soft else z[site.first : site.first + site.n]
            assert module is not None
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.affine:
                module.affine = True
                module.weight = nn.Parameter(torch.ones_like(factor))
                module.bias = nn.Parameter(torch.zeros_like(factor))
            weight, bias = module.weight, module.bias
            assert isinstance(weight, Tensor)
            if isinstance(module, TRANSPOSED):  # (in, out per group, ...)
                per_input = factor.view(module.groups, -1).repeat_interleave(len(weight) // module.groups, 0)
                weight.mul_(per_input.to(weight.device).view(*weight.shape[:2], *[1] * (weight.ndim - 2)))
            else:
                weight.mul_(factor.to(weight.device).view(-1, *[1] * (weight.ndim - 1)))
            if isinstance(bias, Tensor):
                bias.mul_(factor.to(bias.device))


def _same_node(network: Network, node: fx.Node) -> fx.Node:
    return next(other for other in network.nodes if other.name == node.name)
