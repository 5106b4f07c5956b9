"""From the user's module to a Network: torch.export, then every operation with parameters becomes a module."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bar_edge.errors import InputError
from bar_edge.network.batch_independence import mixing_node
from bar_edge.network.channels import numbers_from
from bar_edge.network.graph_json import attach
from bar_edge.network.movement import COPIES, MOVEMENTS, numbered
from bar_edge.network.network import Network, structure_of

aten = torch.ops.aten


def trace(module: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> Network:
    """Return the module as a Network with copies of its weights; the module itself is left as it was.

    example_inputs: one tensor or a tuple, (N, ...) each; only their shapes without N count.
    Raises InputError if torch.export does not accept the module, N cannot be left free, numbers are complex or
    an image's answer depends on the others of its batch.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    program = _export(module, inputs)
    builder = _Builder(module, program)
    body = builder.build()
    shapes = tuple(tuple(x.shape[1:]) for x in inputs)
    spec = program.call_spec.out_spec
    assert spec is not None
    structure = structure_of(pytree.tree_unflatten(range(spec.num_leaves), spec))
    network = Network(body, shapes, structure)
    if _name_pixel_shuffles(network):
        network = Network(body, shapes, structure)
    mixing = mixing_node(network.eval())
    if mixing is not None:
        raise _mixed_batch(f"{mixing.target} over the batch at {source_line(mixing)}")
    return network.train(module.training)


def _export(module: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Run torch.export in eval mode with a free batch of 2, quietly."""
    device = next((p.device for p in module.parameters()), inputs[0].device)
    pair = tuple(x[:1].to(device).expand(2, *x.shape[1:]).clone() for x in inputs)
    modes = {m: m.training for m in module.modules()}
    module.eval()
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._dynamo", "torch.fx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            free: tuple[Any, ...] = tuple({0: torch.export.Dim.AUTO} for _ in pair)
            kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
            named = [*kinds, inspect.Parameter.VAR_POSITIONAL].index(inspect.Parameter.VAR_POSITIONAL)
            if named < min(len(kinds), len(free)):
                free = (*free[:named], free[named:])
            program = torch.export.export(module, pair, dynamic_shapes=free, strict=False)
    except Exception as error:  # torch.export raises many kinds; all mean that this module cannot be traced
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise InputError(
            "a module that torch.export accepts for any batch size",
            got=f"{_users_line(error)}{type(error).__name__}: {' | '.join(lines[:2])}",
            consequence="the network cannot be read",
            remedy="remove data-dependent control flow from forward, or wrap the part that can be traced",
        ) from error
    finally:
        for m, training in modes.items():
            m.training = training
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    for name in program.graph_signature.user_inputs:
        node = next(n for n in program.graph.nodes if n.name == name)
        size = node.meta["val"].shape[0]
        if not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols:
            raise InputError(
                "a network that takes any batch size",
                got=f"a forward that fixes the batch of input '{name}' to {size}",
                consequence="it could not be trained or exported with another batch",
                remedy="replace the literal batch size in view/reshape by x.size(0) or -1",
            )
    for node in program.graph.nodes:
        _check_node(node)
    _check_outputs(program)
    return program


def _check_outputs(program: torch.export.ExportedProgram) -> None:
    """Raise InputError if an output's first axis is something else than the batch, made of it."""
    nodes = {node.name: node for node in program.graph.nodes}
    batch = nodes[program.graph_signature.user_inputs[0]].meta["val"].shape[0]
    for name in program.graph_signature.user_outputs:
        value = nodes[name].meta.get("val") if name in nodes else None
        if isinstance(value, Tensor) and any(_is_free(n) for n in value.shape) and str(value.shape[0]) != str(batch):
            raise _mixed_batch(f"an output of shape {tuple(value.shape)}, made at {source_line(nodes[name])}")


def _mixed_batch(got: str) -> InputError:
    return InputError(
        "a network that treats every image of a batch alone",
        got=got,
        consequence="its answer for an image would depend on the others, or be lost among theirs",
        remedy="keep the batch as the first axis (x.flatten(1)) and reduce over the others (x.mean((1, 2, 3)))",
    )


def _users_line(error: BaseException) -> str:
    """Return the last line of the user's own code in an error's traceback."""
    ours = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*ours, "<"))]
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line}: " if frames else ""


def source_line(node: fx.Node) -> str:
    """Return where the user's code calls an operator, as `file.py:12: x = x.mean()`, else the module, as `'0.3'`."""
    if "source" in node.meta:
        return str(node.meta["source"])
    lines = (node.meta.get("stack_trace") or "").splitlines()
    places = [i for i, line in enumerate(lines) if line.strip().startswith('File "') and "/torch/nn/" not in line]
    if not places:
        stack = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
        return f"'{stack[-1]}'" if stack else ""
    file, number, *_ = lines[places[-1]].strip().removeprefix('File "').replace('", line', ",").split(",")
    code = lines[places[-1] + 1].strip() if places[-1] + 1 < len(lines) else ""
    return f"{os.path.basename(file)}:{number.strip()}: {code}"


def _check_node(node: fx.Node) -> None:
    """Raise InputError for complex numbers and for operators across the images of a batch."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.is_complex():
        raise InputError(
            "a network of real numbers",
            got=f"{node.target} makes {value.dtype} at {source_line(node)}",
            consequence="the network cannot be pruned or exported",
            remedy="write the transform with real tensors, or leave it out of the module",
        )
    source = node.args[0] if node.args else None
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    batched = isinstance(before, Tensor) and before.ndim > 1 and _is_free(before.shape[0])
    if node.op == "call_function" and batched and _across_batch(node, before.ndim):  # type: ignore[union-attr]
        raise _mixed_batch(f"{node.target} over the batch at {source_line(node)}")


def _is_free(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def _name_pixel_shuffles(network: Network) -> bool:
    """Replace views and permutations that make a pixel shuffle by that one operator; tell whether there were any.

    Proven on the elements' numbers: the views of a space-to-depth in another order stay as they are.
    """
    replaced = False
    for node in network.nodes:
        shape, base = network.shapes.get(node.name, ()), _before_views(network, node)
        before = network.shapes[base.name] if base is not None else ()
        if base is None or len(shape) != 4 or len(before) != 4 or shape[0] != before[0]:
            continue
        up = shape[2] > before[2]
        factor = shape[2] // before[2] if up else before[2] // max(1, shape[2])
        operator_ = aten.pixel_shuffle.default if up else aten.pixel_unshuffle.default
        sizes = shape[1] * factor**2 == before[1] if up else before[1] * factor**2 == shape[1]
        if factor < 2 or not sizes or before[2:] == shape[2:]:
            continue
        if torch.equal(operator_(numbered(before), factor), numbers_from(network, base, node)):
            with network.body.graph.inserting_before(node):
                named = network.body.graph.call_function(operator_, (base, factor))
            named.meta |= node.meta
            node.replace_all_uses_with(named)
            replaced = True
    network.body.graph.eliminate_dead_code()
    network.body.recompile()
    return replaced


def _before_views(network: Network, node: fx.Node) -> fx.Node | None:
    """Return the tensor with four axes that a chain of views and permutations with more axes starts from."""
    while node.target in MOVEMENTS | COPIES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if len(network.shapes.get(node.name, ())) <= 4:
            return node if node.name in network.shapes and node.op != "get_attr" else None
    return None


def _across_batch(node: fx.Node, rank: int) -> bool:
    """Tell whether an operator mixes the entries of the first axis."""
    if node.target in _OVER_ALL:
        return True
    if node.target not in _ALONG_AXES:
        return False
    dims = next((a for name, a in _arguments(node).items() if name in ("dim", "dims")), None)
    listed = [dims] if isinstance(dims, int) else list(dims or range(rank))
    return any(int(d) % rank == 0 for d in listed)


_OVER_ALL = {
    aten.mean.default,
    aten.sum.default,
    aten.max.default,
    aten.min.default,
    aten.std.default,
    aten.var.default,
}
_ALONG_AXES = {
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
    aten.max.dim,
    aten.min.dim,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.cumsum.default,
    aten.std.dim,
    aten.var.dim,
    aten.std.correction,
    aten.var.correction,
    aten.sort.default,
    aten.flip.default,
    aten.roll.default,
}


class _Builder:
    """Copies an exported graph, turning placeholders of weights into modules and attributes."""

    def __init__(self, original: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.original, self.program = original, program
        self.root, self.graph = nn.Module(), fx.Graph()
        self.nodes: dict[fx.Node, Any] = {}
        self.copies: dict[int, Tensor] = {}
        signature = program.graph_signature
        self.weights = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.inputs = set(signature.user_inputs)
        self.mutated = len(signature.buffers_to_mutate) + len(signature.user_inputs_to_mutate)

    def build(self) -> fx.GraphModule:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in self.inputs:
                    self.nodes[node] = self.graph.placeholder(node.name)
            elif node.op == "output":
                self.graph.output(tuple(self._map(arg) for arg in node.args[0][self.mutated :]))
            elif node.op == "call_function":
                called = self._call(node)
                if called is not None:
                    self.nodes[node] = called
                    called.meta["source"] = source_line(node)
            else:
                raise InputError("a forward without control flow on data", got=f"{node.op} {node.target}")
        try:
            body = fx.GraphModule(self.root, self.graph)
        except SyntaxError as error:  # fx writes names into Python source
            raise InputError(
                "module names that are no words of Python", got=str(error.text).strip(), remedy="rename the module"
            ) from error
        body.graph.eliminate_dead_code()
        body.recompile()
        body.delete_all_unused_submodules()
        return body

    def _call(self, node: fx.Node) -> fx.Node | None:
        if node.target in _PIECES and all(user.target is operator.getitem for user in node.users):
            return None  # what reads the pieces cuts them out itself
        piece = _piece(node)
        if piece is not None:
            target, *rest = piece
            whole = node.args[0].args[0]  # type: ignore[union-attr]
            if target is aten.select.int:
                return self._select(self._map(whole), whole.meta["val"].shape, *rest)  # type: ignore[union-attr]
            return self.graph.call_function(target, (self._map(whole), *rest))
        target, in_place = _out_of_place(node.target)
        result = self._as_module(node, target) or self._as_function(node, target)
        if in_place:
            self._rewrite(node, result)
        return result

    def _as_module(self, node: fx.Node, target: Any) -> fx.Node | None:
        """Call a module that holds the weights of an operation, None if it has none of its own."""
        made = MODULE_BUILDERS.get(target, _no_module)(self, node)
        if made is None:
            return None
        name, module = made
        try:
            existing = self.root.get_submodule(name)
        except AttributeError:
            attach(self.root, name, module)
            existing = module
        same = repr(existing) == repr(module) and _same_tensors(existing, module)
        return self.graph.call_module(name, (self._map(node.args[0]),)) if same else None

    def _as_function(self, node: fx.Node, target: Any) -> fx.Node:
        if target is aten.stack.default:
            dim, shape = int(_arguments(node)["dim"]), node.meta["val"].shape
            parts = [self.graph.call_function(aten.unsqueeze.default, (self._map(p), dim)) for p in node.args[0]]  # type: ignore[union-attr]
            return self.graph.call_function(aten.cat.default, (parts, dim % len(shape)))
        if target is aten.lift_fresh_copy.default or _is_whole_slice(node):
            return self._node(node.args[0])  # type: ignore[arg-type]
        if target is aten.select.int:
            return self._select(self._map(node.args[0]), node.args[0].meta["val"].shape, node.args[1], node.args[2])  # type: ignore[union-attr]
        if _is_flatten(node):
            return self.graph.call_function(aten.flatten.using_ints, (self._map(node.args[0]), 1))
        if target in _AS:
            before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
            fits = len(before) == len(after) or target is not aten.expand_as.default
            if fits and all(isinstance(n, int) for n in after[1:]):
                return self.graph.call_function(_AS[target], (self._map(node.args[0]), [-1, *after[1:]]))
        return self.graph.call_function(target, self._map(node.args), self._map(node.kwargs))

    def _select(self, x: fx.Node, shape: tuple[Any, ...], dim: Any, index: Any) -> fx.Node:
        """Take one index of an axis: a slice of one, without the axis."""
        if not isinstance(shape[dim], int):
            return self.graph.call_function(aten.select.int, (x, dim, index))
        first = index % shape[dim]
        piece = self.graph.call_function(aten.slice.Tensor, (x, dim, first, first + 1))
        return self.graph.call_function(aten.squeeze.dim, (piece, dim))

    def _rewrite(self, node: fx.Node, result: fx.Node) -> None:
        """Let every name of the tensor that `node` writes to mean the result from here on.

        Raises InputError if a view of it, or what it is a view of, is read afterwards.
        """
        nodes = list(self.program.graph.nodes)
        now = nodes.index(node)
        tensor: dict[Any, fx.Node] = {}  # names of one tensor
        memory: dict[Any, fx.Node] = {}  # names of one piece of memory
        for other in nodes[:now]:
            source = other.args[0] if other.args and isinstance(other.args[0], fx.Node) else None
            tensor[other] = tensor[source] if source is not None and _out_of_place(other.target)[1] else other
            memory[other] = memory[source] if source is not None and _returns_alias(other) else other
        names = {n for n in tensor if tensor[n] is tensor[node.args[0]]}
        views = {n for n in memory if memory[n] is memory[node.args[0]]} - names
        for later in nodes[now + 1 :]:
            for seen in views & set(later.all_input_nodes):
                raise InputError(
                    "a forward that writes in place only into tensors that nothing else shares memory with",
                    got=f"{node.target} on '{node.args[0]}', seen again through '{seen}'",
                    consequence="the network cannot be read as a graph of values",
                    remedy="write the result to a new tensor: y = relu(x[:, :2]) instead of x[:, :2].relu_()",
                )
        self.nodes |= dict.fromkeys(names, result)

    def _map(self, value: Any) -> Any:
        return fx.map_arg(value, self._node)

    def _node(self, node: fx.Node) -> fx.Node:
        if node not in self.nodes:  # a weight that no module owns
            name = self.weights[node.name]
            if not _has(self.root, name):
                attach(self.root, name, self.tensor(node))
            self.nodes[node] = self.graph.get_attr(name)
        result = self.nodes[node]
        assert isinstance(result, fx.Node)
        return result

    def is_weight(self, value: object) -> bool:
        """Tell whether an argument is a parameter, buffer or constant of the original module."""
        return isinstance(value, fx.Node) and value.op == "placeholder" and value.name in self.weights

    def is_module(self, weight: object, bias: object) -> bool:
        """Tell whether weight and bias (or None) are the original's and belong to one module there."""
        if not self.is_weight(weight) or bias is None:
            return self.is_weight(weight)
        assert isinstance(weight, fx.Node)
        parents = {self.weights[n.name].rpartition(".")[0] for n in (weight, bias) if isinstance(n, fx.Node)}
        return self.is_weight(bias) and len(parents) == 1

    def tensor(self, node: fx.Node) -> Tensor:
        """Return our copy of a weight, one per original tensor; parameters stay parameters."""
        name = self.weights[node.name]
        source = self.program.state_dict.get(name, self.program.constants.get(name))
        assert isinstance(source, Tensor)
        if id(source) not in self.copies:
            copy = source.detach().clone()
            is_parameter = isinstance(source, nn.Parameter)
            self.copies[id(source)] = nn.Parameter(copy, requires_grad=source.requires_grad) if is_parameter else copy
        return self.copies[id(source)]

    def owner(self, node: fx.Node, default_leaf: str = "weight") -> tuple[str, nn.Module | None]:
        """Return the dotted module name that a weight belongs to, and that module in the original."""
        name = self.weights[node.name]
        parent, _, leaf = name.rpartition(".")
        if leaf != default_leaf or not parent:
            return f"{name.replace('.', '_')}_op", None
        try:
            return parent, self.original.get_submodule(parent)
        except AttributeError:
            return parent, None


Made = tuple[str, nn.Module] | None


def _no_module(builder: _Builder, node: fx.Node) -> Made:
    return None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return a call's arguments by their schema names, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    values |= {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)}
    return values | dict(node.kwargs)


def _returns_alias(node: fx.Node) -> bool:
    """Tell whether what an operator returns shares memory with its first argument (views and in-place operators)."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    returned = node.target._schema.returns
    return bool(returned) and returned[0].alias_info is not None


def _has(root: nn.Module, name: str) -> bool:
    try:
        operator.attrgetter(name)(root)
    except AttributeError:
        return False
    return True


def _same_tensors(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip([*a.parameters(), *a.buffers()], [*b.parameters(), *b.buffers()], strict=True)
    return all(x is y or not x.is_floating_point() for x, y in pairs)


def _fill(builder: _Builder, module: nn.Module, weights: dict[str, Any]) -> nn.Module:
    for name, node in weights.items():
        if node is not None:
            setattr(module, name, builder.tensor(node))
    return module


def _conv(builder: _Builder, node: fx.Node) -> Made:
    a = _arguments(node)
    if not builder.is_module(a["weight"], a["bias"]):
        return None
    weight = builder.tensor(a["weight"])
    kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
    dims = weight.ndim - 2

    def spread(value: Any) -> Any:
        return value if isinstance(value, str) else tuple(value) * (dims if len(value) == 1 else 1)

    module = kind(
        weight.shape[1] * a["groups"],
        weight.shape[0],
        tuple(weight.shape[2:]),  # type: ignore[arg-type]
        spread(a["stride"]),
        spread(a["padding"]),
        spread(a["dilation"]),
        a["groups"],
        a["bias"] is not None,
        device="meta",  # the user's tensors take its place: nothing is drawn
    )
    return builder.owner(a["weight"])[0], _fill(builder, module, {"weight": a["weight"], "bias": a["bias"]})


def _batch_norm(builder: _Builder, node: fx.Node) -> Made:
    a = _arguments(node)
    tensors = {name: a[name] for name in ("weight", "bias", "running_mean", "running_var")}
    if tensors["running_mean"] is None or not all(v is None or builder.is_weight(v) for v in tensors.values()):
        return None
    name, original = builder.owner(tensors["running_mean"], "running_mean")
    momentum = original.momentum if isinstance(original, nn.modules.batchnorm._BatchNorm) else a["momentum"]
    width = builder.tensor(tensors["running_mean"]).shape[0]
    kind = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(node.meta["val"].ndim, nn.BatchNorm1d)
    module = kind(width, a["eps"], momentum, affine=tensors["weight"] is not None)
    if isinstance(original, nn.modules.batchnorm._BatchNorm) and original.num_batches_tracked is not None:
        module.num_batches_tracked = original.num_batches_tracked.detach().clone()
    return name, _fill(builder, module, tensors)


def _linear(builder: _Builder, node: fx.Node) -> Made:
    a = _arguments(node)
    if not builder.is_module(a["weight"], a["bias"]):
        return None
    out_features, in_features = builder.tensor(a["weight"]).shape
    module = nn.Linear(in_features, out_features, bias=a["bias"] is not None, device="meta")
    return builder.owner(a["weight"])[0], _fill(builder, module, {"weight": a["weight"], "bias": a["bias"]})


def _prelu(builder: _Builder, node: fx.Node) -> Made:
    a = _arguments(node)
    if not builder.is_weight(a["weight"]):
        return None
    module = nn.PReLU(builder.tensor(a["weight"]).numel())
    return builder.owner(a["weight"])[0], _fill(builder, module, {"weight": a["weight"]})


def _group_norm(builder: _Builder, node: fx.Node) -> Made:
    a = _arguments(node)
    width = node.meta["val"].shape[1]
    return _norm(builder, node, nn.GroupNorm(a["num_groups"], width, a["eps"], affine=a["weight"] is not None))


def _layer_norm(builder: _Builder, node: fx.Node) -> Made:
    a = _arguments(node)
    shape, affine, bias = tuple(a["normalized_shape"]), a["weight"] is not None, a["bias"] is not None
    return _norm(builder, node, nn.LayerNorm(shape, a["eps"], elementwise_affine=affine, bias=bias))


def _instance_norm(builder: _Builder, node: fx.Node) -> Made:
    a = _arguments(node)
    kinds = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
    kind, width = kinds.get(node.meta["val"].ndim), node.meta["val"].shape[1]
    if kind is None:
        return None
    affine, tracked = a["weight"] is not None, a["running_mean"] is not None
    return _norm(builder, node, kind(width, a["eps"], a["momentum"], affine=affine, track_running_stats=tracked))


def _norm(builder: _Builder, node: fx.Node, module: nn.Module) -> Made:
    """Name a norm after its weight, or after the module that called it if it has none."""
    a = _arguments(node)
    weights = {name: a.get(name) for name in ("weight", "bias", "running_mean", "running_var")}
    if not all(v is None or builder.is_weight(v) for v in weights.values()):
        return None
    if weights["running_mean"] is not None:
        return builder.owner(weights["running_mean"], "running_mean")[0], _fill(builder, module, weights)
    if weights["weight"] is None:
        if weights["bias"] is not None:
            return None
        stack = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
        return f"{stack[-1] if stack and stack[-1] else 'functional'}_{node.name}".replace(".", "_"), module
    return builder.owner(weights["weight"])[0], _fill(builder, module, weights)


def _dropout(builder: _Builder, node: fx.Node) -> Made:
    stack = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
    owner, a = stack[-1] if stack and stack[-1] else "functional", _arguments(node)
    if a["train"]:  # on in eval mode too: the user wants noise always
        return None
    kinds = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}
    channels = node.target in (aten.feature_dropout.default, aten.feature_dropout_.default)
    kind = kinds.get(node.meta["val"].ndim) if channels else nn.Dropout
    return (f"{owner}_{node.name}".replace(".", "_"), kind(a["p"])) if kind is not None else None


def _conv_transpose(builder: _Builder, node: fx.Node) -> Made:
    a = _arguments(node)
    if not builder.is_module(a["weight"], a["bias"]):
        return None
    weight = builder.tensor(a["weight"])
    kind = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}[weight.ndim]
    dims = weight.ndim - 2
    spread: dict[str, Any] = {
        name: tuple(a[name]) * (dims if len(a[name]) == 1 else 1)
        for name in ("stride", "padding", "output_padding", "dilation")
    }
    channels, kernel = (weight.shape[0], weight.shape[1] * a["groups"]), tuple(weight.shape[2:])
    module = kind(*channels, kernel, groups=a["groups"], bias=a["bias"] is not None, **spread)  # type: ignore[arg-type]
    return builder.owner(a["weight"])[0], _fill(builder, module, {"weight": a["weight"], "bias": a["bias"]})


MODULE_BUILDERS: dict[object, Callable[[_Builder, fx.Node], Made]] = {
    aten.conv1d.default: _conv,
    aten.conv1d.padding: _conv,
    aten.conv2d.default: _conv,
    aten.conv2d.padding: _conv,
    aten.conv3d.default: _conv,
    aten.conv3d.padding: _conv,
    aten.batch_norm.default: _batch_norm,
    aten.linear.default: _linear,
    aten.prelu.default: _prelu,
    aten.group_norm.default: _group_norm,
    aten.layer_norm.default: _layer_norm,
    aten.instance_norm.default: _instance_norm,
    aten.dropout.default: _dropout,
    aten.feature_dropout.default: _dropout,
    aten.conv_transpose1d.default: _conv_transpose,
    aten.conv_transpose2d.input: _conv_transpose,
    aten.conv_transpose3d.input: _conv_transpose,
}


def _out_of_place(target: Any) -> tuple[Any, bool]:
    """Return the pure twin of an in-place operator (relu_ -> relu) and whether it was one."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return target, False
    packet, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    twin = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
    if not packet.endswith("_") or twin is None:
        raise InputError("a network without operators that write into their input", got=str(target))
    return twin, True


#: operators that take a shape from another tensor, and those that are told it
_AS: dict[object, Any] = {
    aten.view_as.default: aten.reshape.default,
    aten.reshape_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}
_PIECES: set[object] = {
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.unbind.int,
    aten.unsafe_chunk.default,
    aten.unsafe_split.Tensor,
}


def _piece(node: fx.Node) -> tuple[Any, ...] | None:
    """Return operator and arguments of one piece of a chunk, split or unbind: a slice or an index, None if no such."""
    if node.target is not operator.getitem:
        return None
    cut, which = node.args
    assert isinstance(cut, fx.Node) and isinstance(which, int)
    if cut.target not in _PIECES:
        return None
    dim = int(_arguments(cut)["dim"])
    if cut.target is aten.unbind.int:
        return aten.select.int, dim, which
    lengths = [value.shape[dim] for value in cut.meta["val"]]
    which %= len(lengths)
    if not all(isinstance(length, int) for length in lengths):
        raise InputError("a forward that splits no batch", got=str(cut.target), remedy="split along another axis")
    return aten.slice.Tensor, dim, sum(lengths[:which]), sum(lengths[: which + 1])


def _is_whole_slice(node: fx.Node) -> bool:
    """Tell whether an operator is the slice of everything that x[:, i] makes of its first axis."""
    a = _arguments(node) if node.target is aten.slice.Tensor else {}
    return bool(a) and a["start"] in (None, 0) and a["end"] in (None, 2**63 - 1) and a["step"] == 1


def _is_flatten(node: fx.Node) -> bool:
    """Tell whether a view or reshape only merges all axes after the batch."""
    if node.target not in (aten.view.default, aten.reshape.default):
        return False
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    return (
        len(after) == 2 and len(before) > 2 and isinstance(after[0], torch.SymInt) and str(after[0]) == str(before[0])
    )
