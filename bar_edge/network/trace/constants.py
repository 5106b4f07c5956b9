"""What is computed of parameters, buffers and numbers alone is computed once: weight norms, frozen BatchNorm, masks."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bar_edge.network.movement import COPIES, MOVEMENTS
from bar_edge.network.trace.refusals import is_free
from bar_edge.network.trace.regions import CASTS

aten = torch.ops.aten

#: of these only type and device of the first argument count
_LIKE: set[object] = {
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
}
#: of these training makes something else than the trace
_BY_MODE: set[object] = {
    aten.batch_norm.default,
    aten.instance_norm.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
}
#: what only moves the elements of a weight stays an operator: the weight keeps its name and its size
_MOVES = MOVEMENTS | COPIES | {aten.lift_fresh_copy.default}


@dataclasses.dataclass(frozen=True, slots=True)
class Constants:
    """What the operators of an exported graph make that depends on weights and numbers alone.

    values: their results, one tensor for equal computations, a Parameter if anything in it trains.
    moved: those that stay operators, as they only move a weight that something else reads.
    """

    values: dict[fx.Node, Any]
    moved: set[fx.Node]


def constants(graph: fx.Graph, weights: dict[fx.Node, Tensor], is_layer: Callable[[fx.Node], bool]) -> Constants:
    """Compute every constant of a graph.

    weights: the tensors of its placeholders. is_layer: whether an operator becomes a module that takes its weights.
    """
    fixed = _fixed(graph, set(weights))
    computed = [node for node in graph.nodes if node in fixed and node not in weights]
    values = _values(computed, weights, {memory(node) for node in graph.nodes if writes(node)})
    moves: set[fx.Node] = set()
    for node in computed:
        source = node.args[0] if node.args else None
        if node.target in _MOVES and (source in weights or source in moves):
            moves.add(node)
    read: set[fx.Node] = set()
    for node in reversed(computed):
        if any(_reads(user, node, fixed, is_layer) or user in read for user in node.users):
            read.add(node) if node in moves else None
    return Constants(values, moves & read)


def _reads(user: fx.Node, node: fx.Node, fixed: set[fx.Node], is_layer: Callable[[fx.Node], bool]) -> bool:
    return user not in fixed and not (is_layer(user) and node is not user.args[0])


def memory(node: Any) -> int | None:
    """Return what identifies the memory that a tensor of an exported graph lies in, None of another value."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def writes(node: fx.Node) -> bool:
    """Tell whether an operator writes into its first argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _fixed(graph: fx.Graph, weights: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes that depend on weights and numbers alone.

    Memory that anything else is written into, that is written to after it was read, or that is a weight's, is not.
    """
    places = {node: memory(node) for node in graph.nodes}
    order = {node: i for i, node in enumerate(graph.nodes)}
    members: dict[int | None, list[fx.Node]] = {}
    for node, place in places.items():
        members.setdefault(place, []).append(node)
    writers = [node for node in graph.nodes if writes(node)]
    written: set[int | None] = set()
    while True:
        fixed = {node for node in weights if places[node] not in written}
        for node in graph.nodes:
            if node not in weights and places[node] not in written and _is_fixed(node, fixed):
                fixed.add(node)
        more = set()
        for node in writers:
            own = memory(node.args[0])
            readers = [user for member in members[own] for user in member.users if user not in fixed]
            late = node in fixed and any(order[reader] < order[node] for reader in readers)
            if node not in fixed or late or any(member in weights for member in members[own]):
                more.add(own)
        if more <= written:
            return fixed
        written |= more


def _is_fixed(node: fx.Node, fixed: set[fx.Node]) -> bool:
    if node.op != "call_function" or (node.target in _BY_MODE and not _of_its_own_batch(node)):
        return False
    if node.target is not operator.getitem and not isinstance(node.target, torch._ops.OpOverload):
        return False
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    made = [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
    if not made or any(is_free(size) for value in made for size in value.shape):
        return False
    inputs = node.all_input_nodes
    return all(source in fixed for source in (inputs[1:] if node.target in _LIKE else inputs))


def _of_its_own_batch(node: fx.Node) -> bool:
    """Tell whether a batch norm takes the statistics of what it reads in both modes, as weight standardisation does."""
    return node.target is aten.batch_norm.default and node.args[3:6] == (None, None, True)


def _values(computed: list[fx.Node], weights: dict[fx.Node, Tensor], written: set[int | None]) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = {}
    known: dict[fx.Node, Any] = dict(weights)
    names = {node: f"weight {id(weight)}" for node, weight in weights.items()}
    first: dict[str, fx.Node] = {}
    learns = {node for node, weight in weights.items() if isinstance(weight, nn.Parameter) and weight.requires_grad}
    for node in computed:
        text = fx.map_arg((node.args, node.kwargs), lambda n: names.get(n, str(n.meta["val"])))
        names[node] = f"{node.target}{text}" if memory(node) not in written else node.name
        first.setdefault(names[node], node)
        if first[names[node]] is node:
            known[node] = _value(node, known)
        else:
            known[node] = known[first[names[node]]]
        if any(source in learns for source in node.all_input_nodes):
            learns |= {node, *(n for n in computed if writes(node) and memory(n) == memory(node))}
    made: dict[int, Any] = {}
    for node in computed:
        value = known[node]
        if isinstance(value, Tensor) and id(value) not in made:
            own = value.detach().clone(memory_format=torch.contiguous_format)
            made[id(value)] = nn.Parameter(own) if node in learns and own.is_floating_point() else own
        values[node] = made.get(id(value), value)
    return values


def _value(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n] if n in known else _stand_in(n))
    if node.target in CASTS and node.args[0].meta["val"].dtype == node.meta["val"].dtype:  # type: ignore[union-attr]
        return args[0]
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _stand_in(node: fx.Node) -> Tensor:
    """Return a tensor of the same type, and size where it is known, for an operator that asks for no more."""
    value = node.meta["val"]
    return torch.zeros([1 if is_free(size) else size for size in value.shape], dtype=value.dtype, device=value.device)
