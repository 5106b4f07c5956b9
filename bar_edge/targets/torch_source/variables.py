"""Which operations are written, and under which names their values go."""

from __future__ import annotations

import dataclasses
import keyword
import operator
import os
import re
from typing import Any

import torch
from torch import fx

from bar_edge.network import Network, leaves
from bar_edge.network.graph_json import _check_name
from bar_edge.targets.torch_source.texts import block_of, identifier

#: modules that surgery puts between those of the user
BETWEEN = (leaves.MixedAdd, leaves.Expand)
#: names that the generated code uses itself
RESERVED = {"self", "torch", "nn", "F", "Path", "Tensor", "device", "float", "slice"}

#: the end of a slice that has none, and what follows the start of a slice to the end
END = 2**63 - 1
_TO_THE_END = ((), (None,), (END,), (None, 1), (END, 1))


def statements(network: Network) -> tuple[list[fx.Node], dict[fx.Node, fx.Node]]:
    """Return the nodes to write, sizes of inputs first, and for those left out the node that has their value.

    Left out: slices of everything and copies of constants, sizes asked for twice, assertions without a result.
    """
    sizes: dict[tuple[Any, ...], fx.Node] = {}
    first: list[fx.Node] = []
    rest: list[fx.Node] = []
    itself: dict[fx.Node, fx.Node] = {}
    for node in network.nodes:
        source = node.args[0] if node.args else None
        source = itself.get(source, source) if isinstance(source, fx.Node) else None
        if node.op == "placeholder":
            first.append(node)
        elif source is not None and _passes_on(node):
            itself[node] = source
        elif node.target is torch.ops.aten.sym_size.int and (source, *node.args[1:]) in sizes:
            itself[node] = sizes[source, *node.args[1:]]
        elif node.target is torch.ops.aten.sym_size.int:
            sizes[source, *node.args[1:]] = node
            (first if source is not None and source.op == "placeholder" else rest).append(node)
        elif node.users or node.op != "call_function" or "_assert" not in str(node.target):
            rest.append(node)
    return first + rest, itself


def _passes_on(node: fx.Node) -> bool:
    """Tell whether an operator returns the values of its argument as they are."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.kwargs:
        return False
    packet, start = node.target._schema.name.removeprefix("aten::"), node.args[2:3]
    whole = packet == "slice" and start in ((), (None,), (0,)) and node.args[3:] in _TO_THE_END
    return whole or packet in ("alias", "lift_fresh_copy")


@dataclasses.dataclass(slots=True)
class _Variable:
    """The values that follow one another under one name."""

    nodes: list[fx.Node]
    #: places in the graph of the first assignment and of the last use
    start: int
    end: int
    name: str = ""


def name_variables(network: Network, nodes: list[fx.Node], itself: dict[fx.Node, fx.Node]) -> dict[fx.Node, str]:
    """Name every value: x = f(x) where x is read for the last time, else after the modules or the operator."""
    sources = {node: [itself.get(source, source) for source in node.all_input_nodes] for node in nodes}
    last = {source: i for i, node in enumerate(nodes) for source in sources[node]}
    variable_of: dict[fx.Node, _Variable] = {}
    variables: list[_Variable] = []
    for i, node in enumerate(nodes):
        if node.op in ("get_attr", "output"):
            continue
        ending = [
            variable_of[source]
            for source in sources[node]
            if source in variable_of and last[source] == i and {source.name, node.name} <= network.shapes.keys()
        ]
        if ending:
            variable = min(ending, key=lambda v: v.start)
        else:
            variable = _Variable([], start=i, end=i)
            variables.append(variable)
        variable.nodes.append(node)
        variable.end = last.get(node, i)
        variable_of[node] = variable
    for variable in variables:
        taken = {v.name for v in variables if v.name and v.end > variable.start} | RESERVED
        name = _variable_name(variable.nodes, network)
        candidates = [name, *(f"{name}_{i}" for i in range(2, len(variables) + 3))]
        variable.name = next(c for c in candidates if c not in taken and not keyword.iskeyword(c))
    return {node: variable.name for node, variable in variable_of.items()}


def _variable_name(nodes: list[fx.Node], network: Network) -> str:
    first = nodes[0]
    if first.op == "placeholder":
        _check_name(str(first.target))
        return str(first.target)
    called = [node for node in nodes if node.op == "call_module"]
    modules = [str(node.target) for node in called if not isinstance(network.module_of(node), BETWEEN)]
    if modules:  # what their names have in common, or where the first one lies: its last word and numbers behind that
        common = os.path.commonprefix([tuple(name.split(".")) for name in modules])
        common = common or tuple(block_of(modules[0]).split("."))
        words = [i for i, part in enumerate(common) if part and not part.isdigit()]
        return identifier("_".join(common[words[-1] :])) if words else "y"
    if first.op == "call_module":
        return type(network.module_of(first)).__name__.lower()
    if first.target is operator.getitem and isinstance(first.args[1], int):
        return identifier(f"part{first.args[1]}")
    if first.name not in network.shapes:
        of_batch = first.target is torch.ops.aten.sym_size.int and first.args[1] == 0
        is_tuple = any(user.target is operator.getitem and user.args[0] is first for user in first.users)
        return "batch" if of_batch else "parts" if is_tuple else "size"
    assert isinstance(first.target, torch._ops.OpOverload)
    operation = first.target._schema.name.removeprefix("aten::").strip("_")
    return identifier(next((short for short, long in _SHORT.items() if re.fullmatch(long, operation)), operation))


_SHORT = {
    "pool": r"(adaptive_)?(avg|max)_pool\dd",
    "upsample": r"upsample_.*",
    "part": r"slice|select|index|index_select|narrow",
    "norm": r"linalg_vector_norm|native_.*_norm",
    "attention": r"scaled_dot_product_attention",
}
