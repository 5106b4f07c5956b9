"""A network as readable Python: model.py and model.safetensors, for a colleague who has torch but not bar-edge."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import inspect
import keyword
import math
import operator
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import fx, nn

from bar_edge.errors import InputError
from bar_edge.network import Network, leaves
from bar_edge.network.graph_json import _check_name, check_target, describe

_TOP = '''"""A network in plain PyTorch, written by bar-edge with torch {torch}.

    from model import load

    net = load()  # in eval mode; net.train() to go on training it

Model needs torch alone; load() reads model.safetensors through the package safetensors.
The names in the state dict are those of the original network.
"""

from __future__ import annotations

'''
_IMPORTS = """\
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
"""
_PARTS = '''
class Parts(nn.Module):
    """Modules and weights under the names that they had in the original network; parts[0] is the one named "0"."""

    def __getitem__(self, name):
        return getattr(self, str(name))

    def __setitem__(self, name, part):
        setattr(self, str(name), part)

'''
_LOAD = '''
def load(path: str | Path = Path(__file__).with_name("model.safetensors")) -> Model:
    """Return the network with its weights, in eval mode, on the CPU; needs the package safetensors."""
    from safetensors.torch import load_file

    model = Model()
    model.load_state_dict(load_file(path))
    return model.eval()
'''
_WIDTH = 120
#: modules that surgery puts between those of the user
_BETWEEN = (leaves.MixedAdd, leaves.Expand)
#: names that the generated code uses itself
_RESERVED = {"self", "torch", "nn", "F", "Path", "Tensor", "device", "float", "slice"}

# The tables: aten operator -> Python that computes exactly the same. Arguments have the schema's order and names there.

_INFIX = {
    "add.Tensor": "+", "sub.Tensor": "-", "mul.Tensor": "*", "div.Tensor": "/", "add.Scalar": "+", "sub.Scalar": "-",
    "mul.Scalar": "*", "div.Scalar": "/", "pow.Tensor_Scalar": "**", "matmul.default": "@", "gt.Scalar": ">",
    "ge.Scalar": ">=", "lt.Scalar": "<", "le.Scalar": "<=", "gt.Tensor": ">", "ge.Tensor": ">=", "lt.Tensor": "<",
    "le.Tensor": "<=",
}  # fmt: skip
_PYTHON = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//"}
#: x.mean((2, 3), keepdim=True)
_METHODS = {
    "all", "amax", "amin", "any", "argmax", "argmin", "chunk", "clamp", "clone", "contiguous", "cumsum", "detach",
    "expand_as", "flatten", "flip", "index_select", "masked_fill", "mean", "narrow", "new_ones", "new_zeros", "prod",
    "repeat_interleave", "roll", "split", "split_with_sizes", "squeeze", "std", "sum", "transpose", "unbind",
    "unflatten", "unsqueeze", "var",
}  # fmt: skip
#: x.view(batch, -1): the one list is written without parentheses
_SPREAD = {"expand", "permute", "repeat", "reshape", "view"}
#: torch.cat([a, b], 1)
_TORCH = {
    "abs", "add", "addmm", "arange", "baddbmm", "batch_norm", "bmm", "cat", "channel_shuffle", "clamp_max", "clamp_min",
    "cos", "div", "dropout", "embedding", "erf", "exp", "floor", "full", "full_like", "gather", "group_norm",
    "index_add", "instance_norm", "layer_norm", "log", "log1p", "log_softmax", "matmul", "max", "maximum", "min",
    "minimum", "mul", "ones", "ones_like", "pow", "prelu", "reciprocal", "round", "rsqrt", "rsub", "sigmoid", "sign",
    "sin", "softmax", "sqrt", "square", "stack", "sub", "tanh", "topk", "tril", "triu", "where", "zeros", "zeros_like",
}  # fmt: skip
#: F.max_pool2d(x, 2): one number for several equal ones
_FUNCTIONAL = {
    name: name
    for name in (
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
        "celu", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "gelu", "glu",
        "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "linear", "max_pool1d", "max_pool2d", "max_pool3d",
        "mish", "pad", "pixel_shuffle", "pixel_unshuffle", "relu", "relu6", "scaled_dot_product_attention", "selu",
        "silu", "softplus",
    )
} | {"log_sigmoid": "logsigmoid"}  # fmt: skip
#: the end of a slice that has none, and what follows the start of a slice to the end
_END = 2**63 - 1
_TO_THE_END = ((), (None,), (_END,), (None, 1), (_END, 1))
_NO_DEFAULT = object()
_PER_AXIS = {"kernel_size", "stride", "padding", "output_padding", "dilation", "output_size"}


def write_torch_source(network: Network, folder: Path) -> Path:
    """Write model.py and model.safetensors, which need bar-edge no more, and return the path of model.py.

    There, `load()` returns an nn.Module with the network's state dict names, outputs and training. Raises
    InputError for operators that torch alone does not have.
    """
    source = _Source(network)
    text = source.text()
    folder.mkdir(parents=True, exist_ok=True)
    path, weights = folder / "model.py", folder / "model.safetensors"
    temporary = folder / f".model.{os.getpid()}.tmp"
    state = network.body.state_dict()
    save_file({name: state[name].detach().cpu().contiguous().clone() for name in source.state}, temporary)
    temporary.replace(weights)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


class _Source:
    """The parts of model.py; every name in it is a checked identifier, every string a repr."""

    def __init__(self, network: Network) -> None:
        self.network, self.body = network, network.body
        data = describe(network.body, network.input_shapes, network.out_spec)
        self.modules: dict[str, dict[str, Any]] = data["modules"]
        self.tensors: dict[str, dict[str, Any]] = data["tensors"]
        for name in (*self.modules, *self.tensors):
            check_target(name)
        #: what the constructors of the modules make
        self.own = {f"{name}.{leaf}" for name in self.modules for leaf in self._fresh(name).state_dict()}
        everything = self.own | set(self.tensors)
        #: the names in Model's state dict
        self.state = [name for name in self.body.state_dict() if name in everything]
        self.aliases = {a: b for a, b in data["aliases"].items() if a in everything and b in everything}
        self.nodes, self.itself = _statements(network)
        self.names = _name_variables(network, self.nodes, self.itself)
        self.uses_device = False

    def _kind(self, module: str) -> type[nn.Module]:
        return type(self.body.get_submodule(module))

    def _settings(self, module: str) -> dict[str, Any]:
        settings = {name: value for name, value in self.modules[module].items() if name != "type"}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}

    def _fresh(self, module: str) -> nn.Module:
        with torch.device("meta"):
            return self._kind(module)(**self._settings(module))

    # ------------------------------------------------------------------------------------ the file

    def text(self) -> str:
        """Return the whole of model.py."""
        init, forward = list(self._init()), list(self._forward())
        inputs = ", ".join(
            f"{self.names[node]}: (N, {', '.join(str(int(n)) for n in shape)})"
            for node, shape in zip(self._placeholders(), self.network.input_shapes, strict=False)
        )
        imports, leaves = _our_leaves({self._kind(name) for name in self.modules})
        lines = [
            f"class Model({'Parts' if any('self[' in line for line in (*init, *forward)) else 'nn.Module'}):",
            f'    """The network; {inputs}."""',
            "",
            "    def __init__(self) -> None:",
            *(f"        {line}" for line in ("super().__init__()", *init)),
            "",
            f"    {forward[0]}",
            *(f"        {line}" for line in forward[1:]),
        ]
        model = "\n".join(_wrapped(line.rstrip()) for line in lines)
        top = _TOP.format(torch=torch.__version__.partition("+")[0])
        parts = [_PARTS] if "Parts" in model else []
        return "\n\n\n".join(part.strip() for part in (top + _IMPORTS + imports, *leaves, *parts, model, _LOAD)) + "\n"

    def _placeholders(self) -> list[fx.Node]:
        return [node for node in self.network.nodes if node.op == "placeholder"]

    def _init(self) -> Iterator[str]:
        """Declare modules and tensors in the order in which they are used."""
        state = self.body.state_dict()
        floating = {name: state[name].dtype for name in self.state if state[name].is_floating_point()}
        kinds = set(floating.values())
        declared = {""}

        def cast_of(module: str) -> str:
            found = {floating[n] for n in self.own & floating.keys() if n.rpartition(".")[0] == module}
            if len(found) > 1:
                raise InputError("modules that hold numbers of one type", got=f"{module}: {found}")
            return f".to({next(iter(found))})" if len(kinds) > 1 and found - {torch.float32} else ""

        def zeros(name: str) -> str:
            dtype = torch.float32 if name in floating and len(kinds) == 1 else state[name].dtype
            return f"torch.zeros({tuple(state[name].shape)}{'' if dtype == torch.float32 else f', dtype={dtype}'})"

        def declare(name: str) -> Iterator[str]:
            if name in declared:
                return
            declared.add(name)
            parent, _, leaf = name.rpartition(".")
            yield from declare(parent)
            if name in self.modules:
                yield f"{_path(name)} = {self._constructor(name)}{cast_of(name)}"
            elif name not in self.tensors:
                yield f"{_path(name)} = Parts()"
            elif name not in self.own and self.tensors[name]["parameter"]:
                fixed = "" if name in floating else ", requires_grad=False"
                yield f"{_path(name)} = nn.Parameter({zeros(name)}{fixed})"
            elif name not in self.own:
                yield f"{_path(parent)}.register_buffer({self.value(leaf)}, {zeros(name)})"

        block: str | None = None
        for node in self.network.nodes:
            if node.op in ("call_module", "get_attr"):
                lines = list(declare(str(node.target)))
                here = self._block(node, block) if lines else block
                yield from [""] if block not in (None, here) else []
                yield from lines
                block = here
        for name, source in self.aliases.items():
            yield f"{_path(name)} = {_path(source)}  # one tensor under two names"
        if len(kinds) == 1 and kinds != {torch.float32}:
            yield f"self.to({next(iter(kinds))})"

    def _constructor(self, module: str) -> str:
        """Return the call that makes a module: what has no default first, the rest by name where it differs."""
        kind, settings = self._kind(module), self._settings(module)
        is_conv = isinstance(self.body.get_submodule(module), nn.modules.conv._ConvNd)
        arguments = []
        for name, parameter in inspect.signature(kind).parameters.items():
            if name not in settings:
                continue
            value = _one_number(settings[name]) if is_conv and name in _PER_AXIS else settings[name]
            if parameter.default is inspect.Parameter.empty:
                text = _short_tuple(value) if isinstance(value, tuple) else repr(value)
                arguments.append(f"{name}={text}" if isinstance(value, bool) else text)
            elif value != parameter.default:
                arguments.append(f"{name}={value!r}")
        library = "" if kind.__module__ == leaves.__name__ else "nn."
        return f"{library}{kind.__name__}({', '.join(arguments)})"

    def _forward(self) -> Iterator[str]:
        """Write one statement per operation."""
        output = self.nodes[-1].args[0]
        assert isinstance(output, tuple | list)
        body: list[str] = []
        block: str | None = None
        for node in self.nodes:
            if node.op == "call_module":
                here = self._block(node, block)
                body += [""] if block not in (None, here) else []
                block = here
                text = f"{_path(str(node.target))}({self._listed(node.args, node.kwargs)})"
            elif node.op == "call_function":
                text = self._call(node)
            else:
                continue
            body.append(f"{self.names[node]} = {text}" if node.users else text)
        inputs = [self.names[node] for node in self._placeholders()]
        spec = self.network.out_spec
        returned = "Tensor" if isinstance(spec, int) else next(iter(spec))
        yield f"def forward(self, {', '.join(f'{name}: Tensor' for name in inputs)}) -> {returned}:"
        if self.uses_device:
            yield f"device = {inputs[0]}.device"
        yield from body
        yield f"return {self._structure(spec, list(output))}"

    def _block(self, node: fx.Node, before: str | None) -> str | None:
        """Return the block that a module or weight belongs to; what surgery put between belongs where it stands."""
        return before if isinstance(self.network.module_of(node), _BETWEEN) else _block_of(str(node.target))

    def _structure(self, spec: Any, flat: list[Any]) -> str:
        if isinstance(spec, int):
            return self.value(flat[spec])
        ((kind, parts),) = spec.items()
        if kind == "dict":
            return "{" + ", ".join(f"{self.value(str(k))}: {self._structure(v, flat)}" for k, v in parts.items()) + "}"
        texts = [self._structure(part, flat) for part in parts]
        return f"[{', '.join(texts)}]" if kind == "list" else _tuple(texts)

    # ------------------------------------------------------------------------------ one operation

    def _call(self, node: fx.Node) -> str:
        """Return a call of a function as Python: from the tables, or by the operator's own name."""
        target = node.target
        if target is operator.getitem:
            return f"{self.value(node.args[0])}[{self.value(node.args[1])}]"
        if target in _PYTHON:
            return f"{self.value(node.args[0])} {_PYTHON[target]} {self.value(node.args[1])}"
        assert isinstance(target, torch._ops.OpOverload)
        packet, overload = target._schema.name.removeprefix("aten::"), target._overloadname
        if target.namespace != "aten":
            raise InputError("a network of operators that torch alone has", got=f"{target}")
        given = _given(node)
        key = f"{packet}.{overload}"
        special = _SPECIAL[key](self, given) if key in _SPECIAL else None
        if special is not None:
            return special
        values = list(given.values())
        if key in _INFIX and len(values) == 2:
            return f"{self.value(values[0])} {_INFIX[key]} {self.value(values[1])}"
        if packet in _SPREAD and len(values) == 2 and isinstance(values[1], list | tuple) and values[1]:
            return f"{self.value(values[0])}.{packet}({', '.join(self.value(v) for v in values[1])})"
        if packet in _METHODS:
            return f"{self.value(values[0])}.{packet}({', '.join(self._arguments(node, given)[1:])})"
        if packet in _TORCH:
            return f"torch.{packet}({', '.join(self._arguments(node, given))})"
        if packet in _FUNCTIONAL:
            given = {name: _one_number(v) if name in _PER_AXIS else v for name, v in given.items()}
            return f"F.{_FUNCTIONAL[packet]}({', '.join(self._arguments(node, given))})"
        _check_name(packet)
        _check_name(overload)
        return f"torch.ops.aten.{packet}.{overload}({self._listed(node.args, node.kwargs)})"

    def _arguments(self, node: fx.Node, given: dict[str, Any]) -> list[str]:
        """Write arguments by place as far as that goes, flags and what follows a default by name."""
        assert isinstance(node.target, torch._ops.OpOverload)
        texts, by_place = [], True
        for argument in node.target._schema.arguments:
            if argument.name not in given:
                by_place = False
                continue
            value = given[argument.name]
            if argument.name == "pin_memory" and not value:
                continue
            if argument.name in ("dim", "dims") and isinstance(value, list | tuple) and len(value) == 1:
                value = value[0]
            by_place = by_place and not argument.kwarg_only and not isinstance(value, bool | torch.dtype)
            texts.append(self.value(value) if by_place else f"{argument.name}={self.value(value)}")
        return texts

    def _listed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        for name in kwargs:
            _check_name(name)
        return ", ".join([*map(self.value, args), *(f"{name}={self.value(value)}" for name, value in kwargs.items())])

    def value(self, value: Any) -> str:
        """Return an argument as Python."""
        match value:
            case fx.Node():
                value = self.itself.get(value, value)
                return _path(str(value.target)) if value.op == "get_attr" else self.names[value]
            case list() | tuple():
                texts = [self.value(v) for v in value]
                tensors = any(v is None or isinstance(v, fx.Node) and v.name in self.network.shapes for v in value)
                return f"[{', '.join(texts)}]" if tensors else _tuple(texts)
            case slice():
                return f"slice({self.value(value.start)}, {self.value(value.stop)}, {self.value(value.step)})"
            case torch.dtype() | torch.memory_format() | torch.layout():
                return str(value)
            case torch.device():  # the one of the trace: wherever the network is now
                self.uses_device = True
                return "device"
            case float() if not math.isfinite(value):
                return f'float("{value}")'
            case str():
                return f'"{value}"' if re.fullmatch(r"\w*", value, re.ASCII) else repr(value)
            case None | bool() | int() | float():
                return repr(value)
        raise TypeError(f"cannot write {type(value).__name__}")


# special forms; None: not in this case


def _size(source: _Source, given: dict[str, Any]) -> str:
    return f"{source.value(given['self'])}.shape[{source.value(given['dim'])}]"


def _slice(source: _Source, given: dict[str, Any]) -> str | None:
    start, end, step = given.get("start"), given.get("end"), given.get("step", 1)
    texts = (
        "" if start in (None, 0) else source.value(start),
        "" if end in (None, _END) else source.value(end),
        "" if step == 1 else source.value(step),
    )
    return _at_axis(source.value(given["self"]), given.get("dim", 0), _colon(*texts))


def _select(source: _Source, given: dict[str, Any]) -> str | None:
    return _at_axis(source.value(given["self"]), given["dim"], source.value(given["index"]))


def _index(source: _Source, given: dict[str, Any]) -> str | None:
    indices = given["indices"]
    if not all(v is None or len(source.network.shapes.get(v.name, ())) for v in indices):
        return None  # an index without axes would be read as a number
    return f"{source.value(given['self'])}[{', '.join(':' if v is None else source.value(v) for v in indices)}]"


def _at_axis(x: str, axis: int, index: str) -> str | None:
    return f"{x}[{':, ' * axis}{index}]" if axis >= 0 else f"{x}[..., {index}]" if axis == -1 else None


def _negate(source: _Source, given: dict[str, Any]) -> str:
    return f"-{source.value(given['self'])}"


def _subtract_from(source: _Source, given: dict[str, Any]) -> str | None:
    return f"{source.value(given['other'])} - {source.value(given['self'])}" if "alpha" not in given else None


def _hardtanh(source: _Source, given: dict[str, Any]) -> str | None:
    limits = given.get("min_val"), given.get("max_val")
    return f"F.relu6({source.value(given['self'])})" if limits == (0, 6) else None


def _elu(source: _Source, given: dict[str, Any]) -> str | None:
    texts = [source.value(value) for value in given.values()]
    return f"F.elu({', '.join(texts)})" if list(given) in (["self"], ["self", "alpha"]) else None


def _constant_pad(source: _Source, given: dict[str, Any]) -> str:
    value = f", value={source.value(given['value'])}" if "value" in given else ""
    return f"F.pad({source.value(given['self'])}, {source.value(given['pad'])}{value})"


def _cast(source: _Source, given: dict[str, Any]) -> str | None:
    if list(given) != ["self", "dtype"]:
        return None
    return f"{source.value(given['self'])}.to({source.value(given['dtype'])})"


def _interpolate(mode: str) -> Callable[[_Source, dict[str, Any]], str]:
    def call(source: _Source, given: dict[str, Any]) -> str:
        size, factors = given.get("output_size"), given.get("scale_factors")
        by = f"scale_factor={source.value(_one_number(factors))}" if size is None else f"size={source.value(size)}"
        corners = ", align_corners=True" if given.get("align_corners") else ""
        return f"F.interpolate({source.value(given['input'])}, {by}, mode={source.value(mode)}{corners})"

    return call


_SPECIAL: dict[str, Callable[[_Source, dict[str, Any]], str | None]] = {
    "sym_size.int": _size,
    "slice.Tensor": _slice,
    "select.int": _select,
    "index.Tensor": _index,
    "neg.default": _negate,
    "rsub.Scalar": _subtract_from,
    "hardtanh.default": _hardtanh,
    "elu.default": _elu,
    "constant_pad_nd.default": _constant_pad,
    "to.dtype": _cast,
    "upsample_nearest1d.vec": _interpolate("nearest"),
    "upsample_nearest2d.vec": _interpolate("nearest"),
    "upsample_nearest3d.vec": _interpolate("nearest"),
    "upsample_linear1d.vec": _interpolate("linear"),
    "upsample_bilinear2d.vec": _interpolate("bilinear"),
    "upsample_trilinear3d.vec": _interpolate("trilinear"),
    "upsample_bicubic2d.vec": _interpolate("bicubic"),
}


def _given(node: fx.Node) -> dict[str, Any]:
    """Return a call's arguments by their schema names, without those that have their default."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = {argument.name: argument for argument in node.target._schema.arguments}
    given = dict(zip(arguments, node.args, strict=False)) | dict(node.kwargs)

    def is_default(name: str, value: Any) -> bool:
        argument = arguments[name]
        default = argument.default_value if argument.has_default_value() else _NO_DEFAULT
        return value == default and (isinstance(value, list | tuple) or type(value) is type(default))

    return {name: given[name] for name in arguments if name in given and not is_default(name, given[name])}


# statements and variables


def _statements(network: Network) -> tuple[list[fx.Node], dict[fx.Node, fx.Node]]:
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


def _name_variables(network: Network, nodes: list[fx.Node], itself: dict[fx.Node, fx.Node]) -> dict[fx.Node, str]:
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
        taken = {v.name for v in variables if v.name and v.end > variable.start} | _RESERVED
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
    modules = [str(node.target) for node in called if not isinstance(network.module_of(node), _BETWEEN)]
    if modules:  # what their names have in common, or where the first one lies: its last word and numbers behind that
        common = os.path.commonprefix([tuple(name.split(".")) for name in modules])
        common = common or tuple(_block_of(modules[0]).split("."))
        words = [i for i, part in enumerate(common) if part and not part.isdigit()]
        return _identifier("_".join(common[words[-1] :])) if words else "y"
    if first.op == "call_module":
        return type(network.module_of(first)).__name__.lower()
    if first.target is operator.getitem and isinstance(first.args[1], int):
        return _identifier(f"part{first.args[1]}")
    if first.name not in network.shapes:
        of_batch = first.target is torch.ops.aten.sym_size.int and first.args[1] == 0
        is_tuple = any(user.target is operator.getitem and user.args[0] is first for user in first.users)
        return "batch" if of_batch else "parts" if is_tuple else "size"
    assert isinstance(first.target, torch._ops.OpOverload)
    operation = first.target._schema.name.removeprefix("aten::").strip("_")
    return _identifier(next((short for short, long in _SHORT.items() if re.fullmatch(long, operation)), operation))


_SHORT = {
    "pool": r"(adaptive_)?(avg|max)_pool\dd",
    "upsample": r"upsample_.*",
    "part": r"slice|select|index|index_select|narrow",
    "norm": r"linalg_vector_norm|native_.*_norm",
    "attention": r"scaled_dot_product_attention",
}


def _identifier(text: str) -> str:
    name = re.sub(r"\W", "_", text, flags=re.ASCII)
    name = f"y_{name}" if not name.isidentifier() else name
    return "y" if hasattr(builtins, name) else name


# texts


def _path(name: str) -> str:
    """Return how self's part of a dotted name is written: layer1.0.conv1 -> self.layer1[0].conv1."""
    text = "self"
    for part in name.split(".") if name else []:
        if part.isdigit() and str(int(part)) == part:
            text += f"[{part}]"
        elif part.isidentifier() and not keyword.iskeyword(part) and not part.startswith("__"):
            text += f".{part}"
        else:
            text += f"[{part!r}]"
    return text


def _block_of(name: str) -> str:
    """Return the block that a dotted name lies in, up to its first numbers: stages.0.1.body.2 -> stages.0.1."""
    parents = name.split(".")[:-1]
    end = next((i for i, part in enumerate(parents) if part.isdigit()), len(parents))
    while end < len(parents) and parents[end].isdigit():
        end += 1
    return ".".join(parents[:end])


def _one_number(value: Any) -> Any:
    """Return the one number that all axes share, else the value itself."""
    if isinstance(value, list | tuple) and value and all(type(v) in (int, float) and v == value[0] for v in value):
        return value[0]
    return value


def _short_tuple(value: tuple[Any, ...]) -> str:
    if len(value) > 3 and len(set(value)) == 1:
        return f"({value[0]!r},) * {len(value)}"
    return f"tuple(range({len(value)}))" if len(value) > 3 and value == tuple(range(len(value))) else repr(value)


def _tuple(texts: list[str]) -> str:
    return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"


def _colon(start: str, stop: str, step: str) -> str:
    return f"{start}:{stop}" + (f":{step}" if step else "")


def _wrapped(line: str) -> str:
    """Break a long line at commas, unless it holds strings."""
    if len(line) <= _WIDTH or "'" in line or '"' in line or "(" not in line:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    head, inner = line[: line.index("(") + 1], line[line.index("(") + 1 : line.rindex(")")]
    lines = [indent]
    for piece in inner.split(", "):
        if len(lines[-1]) + len(piece) + 2 > _WIDTH:
            lines[-1] = lines[-1].rstrip()
            lines.append(indent)
        lines[-1] += f"{piece}, "
    lines[-1] = lines[-1].removesuffix(", ")
    return "\n".join([head, *lines, f"{indent[4:]}{line[line.rindex(')') :]}"])


def _our_leaves(kinds: set[type[nn.Module]]) -> tuple[str, list[str]]:
    """Return further imports, and the source of our own modules among `kinds` and of what they use of their file."""
    wanted: list[Any] = [kind for kind in kinds if kind.__module__ == leaves.__name__]
    found: dict[Any, str] = {}
    while wanted:
        thing = wanted.pop()
        found[thing] = inspect.getsource(thing)
        used = {node.id for node in ast.walk(ast.parse(found[thing])) if isinstance(node, ast.Name)}
        ours = [
            vars(leaves)[name] for name in used if getattr(vars(leaves).get(name), "__module__", "") == leaves.__name__
        ]
        wanted += [other for other in ours if other not in found]
    statements = ast.parse(inspect.getsource(leaves)).body if found else []
    imports = [ast.unparse(s) for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
    known = {*_IMPORTS.splitlines(), "from __future__ import annotations"}
    further = "".join(f"{line}\n" for line in imports if line not in known and "bar_edge" not in line)
    ordered = sorted(found, key=lambda thing: inspect.getsourcelines(thing)[1])
    return further, [f"\n{found[thing]}" for thing in ordered]
