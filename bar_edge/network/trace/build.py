"""From an exported program to a graph whose operations with parameters are modules and nothing is written in place."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from bar_edge.errors import InputError
from bar_edge.network.graph_json import attach, safe_name
from bar_edge.network.trace.constants import constants, writes
from bar_edge.network.trace.modules import MODULE_BUILDERS, is_frozen_norm, no_module
from bar_edge.network.trace.refusals import arguments, calling_module, is_free, source_line
from bar_edge.network.trace.regions import CASTS, is_float, is_no_cast, without_literals
from bar_edge.network.trace.simpler import AS, PIECES, is_flatten, is_whole_slice, piece
from bar_edge.network.trace.writes import Writes

aten = torch.ops.aten

#: names in the source that fx writes of a graph
_WRITTEN = {"torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "getattr", "slice"}
#: operators that make a tensor of one number
_UNIFORM: dict[object, int | None] = {aten.zeros.default: 0, aten.ones.default: 1, aten.full.default: None}


class GraphBuilder:
    """Copies an exported graph, turning placeholders of weights into modules and attributes.

    baked: what was computed of parameters in forward and is a parameter from here on.
    """

    def __init__(self, original: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.original, self.program = original, program
        self.root, self.graph = nn.Module(), fx.Graph()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.baked: dict[str, str] = {}
        signature = program.graph_signature
        names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.inputs = set(signature.user_inputs)
        self.weights = {n: names[n.name] for n in program.graph.nodes if n.op == "placeholder" and n.name in names}
        self.copies: dict[int, Tensor] = {}
        self.frozen: dict[int, nn.Parameter] = {}
        self.attributes: dict[int, str] = {}  # names of computed tensors: equal ones have one
        self.uniform: dict[tuple[Any, ...], Tensor] = {}
        own = {node: self._original(node) for node in self.weights}
        self.constants = constants(program.graph, own, lambda node: node.target in MODULE_BUILDERS)
        self.writes = Writes(self, program.graph)

    def build(self) -> fx.GraphModule:
        """Return the graph with its modules."""
        mutated = self.program.graph_signature
        skipped = len(mutated.buffers_to_mutate) + len(mutated.user_inputs_to_mutate)
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in self.inputs:
                    self.nodes[node] = self.graph.placeholder(self._input_name(node.name))
            elif node.op == "output":
                self.graph.output(tuple(self._map(arg) for arg in node.args[0][skipped:]))
            elif node.op == "call_function":
                self._call(node)
            else:
                raise InputError("a forward without control flow on data", got=f"{node.op} {node.target}")
        body = fx.GraphModule(self.root, self.graph)
        body.graph.eliminate_dead_code()
        body.recompile()
        body.delete_all_unused_submodules()
        return body

    def _input_name(self, name: str) -> str:
        """Return the user's name of an input, changed if it would hide what fx writes into the source of a graph."""
        new = name
        while new in _WRITTEN or (new != name and new in self.inputs):
            new += "_"
        return new

    def _call(self, node: fx.Node) -> None:
        if node in self.constants.values and node not in self.constants.moved:
            return  # what reads it asks for its value
        if node.target in PIECES and all(user.target is operator.getitem for user in node.users):
            return  # what reads the pieces cuts them out itself
        if writes(node):
            self.writes.write(node)
        else:
            self.nodes[node] = self.call(node, node.target)
            self.writes.stale.discard(node)
        self.nodes[self.writes.first(node)].meta["source"] = source_line(node)

    def call(self, node: fx.Node, target: Any) -> fx.Node:
        """Call in the new graph what a node of the exported one calls, with another operator."""
        cut = piece(node)
        if cut is not None:
            target, *rest = cut
            whole = node.args[0].args[0]  # type: ignore[union-attr]
            if target is aten.select.int:
                return self._select(self._map(whole), whole.meta["val"].shape, *rest)  # type: ignore[union-attr]
            return self.graph.call_function(target, (self._map(whole), *rest))
        return self._as_module(node, target) or self._as_function(node, target)

    def _as_module(self, node: fx.Node, target: Any) -> fx.Node | None:
        """Call a module that holds the weights of an operation, None if it has none of its own."""
        made = MODULE_BUILDERS.get(target, no_module)(self, node)
        if made is None:
            return None
        name, module = safe_name(made[0]), made[1]
        while (existing := _submodule(self.root, name)) is not None and not _same(existing, module):
            name += "_op" if type(existing) is nn.Module else "_again"
        if existing is None:
            attach(self.root, name, module)
        computed = [arg for arg in node.all_input_nodes[1:] if self._is_learnt(arg)]
        if computed:
            self.baked[name] = source_line(computed[0])
        return self.graph.call_module(name, (self._map(node.args[0]),))

    def _as_function(self, node: fx.Node, target: Any) -> fx.Node:
        if target is aten.stack.default:
            dim, shape = int(arguments(node)["dim"]), node.meta["val"].shape
            parts = [self.graph.call_function(aten.unsqueeze.default, (self._map(p), dim)) for p in node.args[0]]  # type: ignore[union-attr]
            return self.graph.call_function(aten.cat.default, (parts, dim % len(shape)))
        if target is aten.lift_fresh_copy.default or is_whole_slice(node):
            return self.node(node.args[0])  # type: ignore[arg-type]
        if target is aten.select.int:
            return self._select(self._map(node.args[0]), node.args[0].meta["val"].shape, node.args[1], node.args[2])  # type: ignore[union-attr]
        if is_flatten(node):
            return self.graph.call_function(aten.flatten.using_ints, (self._map(node.args[0]), 1))
        if target in AS:
            before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
            fits = len(before) == len(after) or target is not aten.expand_as.default
            if fits and all(isinstance(n, int) for n in after[1:]):
                return self.graph.call_function(AS[target], (self._map(node.args[0]), [-1, *after[1:]]))
        if target in CASTS:
            return self._cast(node)
        if target is aten.batch_norm.default and is_frozen_norm(self, node):
            return self._frozen_norm(node)
        if target in _UNIFORM and node.all_input_nodes:
            number = _UNIFORM[target] if _UNIFORM[target] is not None else node.args[1]
            return self._uniform(number, node.meta["val"], self._map(node.args[0]))
        args, kwargs = without_literals(node) if node.all_input_nodes else (node.args, node.kwargs)
        return self.graph.call_function(target, self._map(args), self._map(kwargs))

    def _frozen_norm(self, node: fx.Node) -> fx.Node:
        """Say a norm of constants alone as one scale and one shift per channel."""
        a, shape = arguments(node), [-1, *[1] * (node.meta["val"].ndim - 2)]
        weight, bias, mean, var = (self.tensor(a[n]) for n in ("weight", "bias", "running_mean", "running_var"))
        scale = weight * (var + a["eps"]).rsqrt()
        name = f"{calling_module(node) or 'frozen'}_{node.name}".replace(".", "_")
        scaled = self._attribute(scale.view(shape).clone(), f"{name}_scale")
        shift = self._attribute((bias - mean * scale).view(shape), f"{name}_shift")
        product = self.graph.call_function(aten.mul.Tensor, (self.node(node.args[0]), scaled))  # type: ignore[arg-type]
        return self.graph.call_function(aten.add.Tensor, (product, shift))

    def _cast(self, node: fx.Node) -> fx.Node:
        """Cast to integers or truth values as written, to floats as the network's input is: in float64, bf16 too."""
        x = self.node(node.args[0])  # type: ignore[arg-type]
        if is_no_cast(node):
            return x
        like = next((n for n in self.program.graph.nodes if n.name in self.inputs and is_float(n)), None)
        if is_float(node) and like is not None:
            return self.graph.call_function(aten.type_as.default, (x, self.nodes[like]))
        return self.graph.call_function(aten.to.dtype, (x, node.meta["val"].dtype))

    def _uniform(self, number: Any, value: Tensor, sizes: Any) -> fx.Node:
        """Return a tensor of one number, of the network's type and device."""
        key = (number, value.ndim, value.dtype)
        if key not in self.uniform:
            self.uniform[key] = torch.full([1] * value.ndim, number, dtype=value.dtype, device=value.device)
        one = self._attribute(self.uniform[key], f"all_{number}".replace(".", "_").replace("-", "minus_"))
        return self.graph.call_function(aten.expand.default, (one, sizes))

    def expanded(self, value: Any, like: fx.Node) -> fx.Node:
        """Return a number, or a tensor that broadcasts, in the shape of a node of the exported graph."""
        wanted = like.meta["val"]
        if isinstance(value, fx.Node) and tuple(map(str, value.meta["val"].shape)) == tuple(map(str, wanted.shape)):
            same = value.meta["val"].dtype == wanted.dtype or (is_float(value) and is_float(like))
            x = self.node(value)
            return x if same else self.graph.call_function(aten.type_as.default, (x, self.node(like.args[0])))  # type: ignore[arg-type]
        sizes = [
            self.graph.call_function(aten.sym_size.int, (self.node(like.args[0]), i)) if is_free(size) else size  # type: ignore[arg-type]
            for i, size in enumerate(wanted.shape)
        ]
        if not isinstance(value, fx.Node):
            return self._uniform(value, wanted, sizes)
        return self.graph.call_function(aten.expand.default, (self.node(value), sizes))

    def _select(self, x: fx.Node, shape: tuple[Any, ...], dim: Any, index: Any) -> fx.Node:
        """Take one index of an axis: a slice of one, without the axis."""
        if not isinstance(shape[dim], int):
            return self.graph.call_function(aten.select.int, (x, dim, index))
        first = index % shape[dim]
        cut = self.graph.call_function(aten.slice.Tensor, (x, dim, first, first + 1))
        return self.graph.call_function(aten.squeeze.dim, (cut, dim))

    def _map(self, value: Any) -> Any:
        return fx.map_arg(value, self.node)

    def node(self, node: fx.Node) -> fx.Node:
        """Return what a node of the exported graph is in the new one."""
        node = self.writes.first(node)
        self.writes.renew(node)
        if node not in self.nodes:  # a weight that no module owns, or what is computed of such
            own = f"{calling_module(node) or 'computed'}_{node.name}".replace(".", "_")
            name = self.weights.get(node) or self.attributes.setdefault(id(self.tensor(node)), own)
            self.nodes[node] = self._attribute(self.tensor(node), safe_name(name))
            if self._is_learnt(node):
                self.baked[name] = source_line(node)
        return self.nodes[node]

    def _attribute(self, value: Tensor, name: str) -> fx.Node:
        """Read a tensor that no module owns, under its name."""
        while _has(self.root, name) and operator.attrgetter(name)(self.root) is not value:
            name += "_"
        if not _has(self.root, name):
            attach(self.root, name, value)
        return self.graph.get_attr(name)

    def _is_learnt(self, node: fx.Node) -> bool:
        """Tell whether a node is computed of parameters that train."""
        return node not in self.weights and isinstance(self.constants.values.get(node), nn.Parameter)

    def is_weight(self, value: object) -> bool:
        """Tell whether an argument is a parameter, a buffer or computed of such alone."""
        if not isinstance(value, fx.Node) or value in self.nodes and self.nodes[value].op != "get_attr":
            return isinstance(value, fx.Node) and value in self.constants.moved
        return value in self.weights or isinstance(self.constants.values.get(value), Tensor)

    def _original(self, node: fx.Node) -> Tensor:
        name = self.weights[node]
        source = self.program.state_dict.get(name, self.program.constants.get(name))
        assert isinstance(source, Tensor)
        return source

    def tensor(self, node: fx.Node) -> Tensor:
        """Return our copy of a weight, one per original tensor; parameters stay parameters."""
        if node not in self.weights:
            value = self.constants.values[node]
            assert isinstance(value, Tensor)
            return value
        source = self._original(node)
        if id(source) not in self.copies:
            copy = source.detach().clone()
            is_parameter = isinstance(source, nn.Parameter)
            self.copies[id(source)] = nn.Parameter(copy, requires_grad=source.requires_grad) if is_parameter else copy
        return self.copies[id(source)]

    def parameter(self, node: fx.Node) -> nn.Parameter:
        """Return that copy as a parameter, a frozen one of what is none in the original."""
        tensor = self.tensor(node)
        if isinstance(tensor, nn.Parameter):
            return tensor
        return self.frozen.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))

    def owner(self, call: fx.Node, weight: fx.Node, leaf: str = "weight") -> tuple[str, nn.Module | None]:
        """Return the dotted module name that a weight of a call belongs to, and that module in the original."""
        if weight not in self.weights:
            name = calling_module(call)
            module = self.original.get_submodule(name) if name else None
            if name and module is not None and {n for n, _ in module.named_children()} <= {"parametrizations"}:
                return name, module
            sources = _sources(weight) & set(self.weights)
            largest = max(sources, key=lambda n: (n.meta["val"].numel(), n.name), default=None)
            made_of = self.weights[largest] if largest is not None else f"{name or 'made'}_{weight.name}"
            return f"{made_of.replace('.', '_')}_op", None
        name = self.weights[weight]
        parent, _, last = name.rpartition(".")
        if last != leaf or not parent:
            return f"{name.replace('.', '_')}_op", None
        return parent, _submodule(self.original, parent)


def _sources(node: fx.Node) -> set[fx.Node]:
    """Return a node and all that it is made of."""
    found, pending = {node}, [node]
    while pending:
        new = set(pending.pop().all_input_nodes) - found
        found |= new
        pending += new
    return found


def _has(root: nn.Module, name: str) -> bool:
    try:
        operator.attrgetter(name)(root)
    except AttributeError:
        return False
    return True


def _submodule(root: nn.Module, name: str) -> nn.Module | None:
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None


def _same(a: nn.Module, b: nn.Module) -> bool:
    """Tell whether two modules do the same with the same tensors."""
    ours, theirs = [*a.parameters(), *a.buffers()], [*b.parameters(), *b.buffers()]
    alike = repr(a) == repr(b) and len(ours) == len(theirs)
    return alike and all(x is y or not x.is_floating_point() for x, y in zip(ours, theirs, strict=True))
