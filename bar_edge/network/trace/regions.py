"""What torch.export writes around the operators of forward is taken away: regions, assertions, types, devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

#: `with torch.no_grad():` and `with torch.autocast(...):` in forward
_REGIONS = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}
#: what torch.export asserts of shapes and types: the trace fixes the first, the second may change
_ASSERTIONS: set[object] = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
CASTS: set[object] = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.to.prim_dtype,
    aten._to_copy.default,
    aten.type_as.default,
}


def flatten(program: torch.export.ExportedProgram) -> None:
    """Inline regions of no_grad and autocast, and erase assertions: a network computes in one type, its own."""
    graph, parts = program.graph, program.graph_module
    while regions := [node for node in graph.nodes if _is_region(node)]:
        for node in regions:
            _inline(parts, node)
    for node in reversed(list(graph.nodes)):
        if node.target in _ASSERTIONS and not node.users:
            graph.erase_node(node)


def _is_region(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target._name in _REGIONS


def _inline(parts: fx.GraphModule, node: fx.Node) -> None:
    graph = node.graph
    holder = next(arg for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr")
    body = parts.get_submodule(str(holder.target))
    assert isinstance(body, fx.GraphModule)
    inputs = iter(node.args[node.args.index(holder) + 1 :])
    inner: dict[fx.Node, Any] = {}
    with graph.inserting_before(node):
        for part in body.graph.nodes:
            if part.op == "placeholder":
                inner[part] = next(inputs)
            elif part.op != "output":
                inner[part] = graph.node_copy(part, inner.__getitem__)
                if part.op == "get_attr":  # a region in a region
                    name = f"inner_{inner[part].name}"
                    parts.add_module(name, body.get_submodule(str(part.target)))
                    inner[part].target = name
    results = body.graph.output_node().args[0]
    assert isinstance(results, tuple | list)
    for user in list(node.users):
        made = results[user.args[1]]  # type: ignore[index]
        user.replace_all_uses_with(inner[made])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(node)
    if not holder.users:
        graph.erase_node(holder)


def is_float(node: Any) -> bool:
    """Tell whether a node of an exported graph makes a tensor of floating-point numbers."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_floating_point()


def is_no_cast(node: fx.Node) -> bool:
    """Tell whether a cast changes nothing but one floating-point type for another: a network has one, its own."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    same = source.meta["val"].dtype == node.meta["val"].dtype
    return same or (is_float(source) and is_float(node))


def without_literals(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of an operator on tensors without devices, and without types where it works on floats."""

    def drop(value: Any) -> bool:
        literal = isinstance(value, torch.dtype) and value.is_floating_point and is_float(node.args[0])
        return literal or isinstance(value, torch.device)

    args = tuple(None if drop(arg) else arg for arg in node.args)
    if args and drop(node.args[-1]):
        args = args[:-1]
    return args, {name: value for name, value in node.kwargs.items() if not drop(value)}
