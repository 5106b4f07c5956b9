"""A network as JSON: whitelisted operators and modules, no pickle, no code."""

from __future__ import annotations

import keyword
import math
import operator
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from bar_edge.network.leaves import Expand, MixedAdd, PartialNorm

Shapes = tuple[tuple[int, ...], ...]

#: module types a network is built of, with the constructor arguments that describe them
MODULES: dict[type[nn.Module], tuple[str, ...]] = {
    kind: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
}
MODULES |= {
    kind: ("num_features", "eps", "momentum", "affine", "track_running_stats")
    for kind in (
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
    )
}
MODULES |= {
    kind: (*MODULES[nn.Conv2d], "output_padding")
    for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}
MODULES |= {
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.PReLU: ("num_parameters",),
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.Dropout: ("p",),
    nn.Dropout1d: ("p",),
    nn.Dropout2d: ("p",),
    nn.Dropout3d: ("p",),
    MixedAdd: ("width", "positions_a", "positions_b"),
    Expand: ("axis", "width", "positions"),
    PartialNorm: ("axis", "group_width", "membership", "eps", "affine", "bias"),
}
_MODULES_BY_NAME = {kind.__name__: kind for kind in MODULES}
_PYTHON_CALLS: dict[str, Callable[..., Any]] = {
    f"operator.{f.__name__}": f for f in (operator.getitem, operator.add, operator.mul, operator.floordiv, operator.sub)
}
#: operators that make a tensor out of numbers
_CREATORS = {"aten.zeros.default", "aten.ones.default", "aten.full.default", "aten.arange.default", "aten.arange.start"}
FORMAT = 1
#: numbers that a network may have beyond those in its weights' file, as buffers that are not stored
_SMALL = 1_000_000


def describe(body: fx.GraphModule, input_shapes: Shapes, out_spec: Any) -> dict[str, Any]:
    """Return a graph as JSON data: nodes with encoded arguments, modules with their settings."""
    called = sorted({str(node.target) for node in body.graph.nodes if node.op == "call_module"})
    tensors = sorted({str(node.target) for node in body.graph.nodes if node.op == "get_attr"})
    state = body.state_dict()
    return {
        "format": FORMAT,
        "input_shapes": [list(shape) for shape in input_shapes],
        "out_spec": out_spec,
        "modules": {name: _describe_module(body.get_submodule(name)) for name in called},
        "tensors": {name: _describe_tensor(body, name) for name in tensors},
        "dtypes": {name: _dtype_name(body.get_submodule(name)) for name in called},
        "aliases": {name: source for name, source in _aliases(state).items() if name != source},
        "frozen": sorted(name for name, p in body.named_parameters() if not p.requires_grad),
        "nodes": [
            {
                "name": node.name,
                "op": node.op,
                "target": _target_name(node),
                "args": _encode(node.args),
                "kwargs": _encode(dict(node.kwargs)),
            }
            for node in body.graph.nodes
        ],
    }


def _describe_module(module: nn.Module) -> dict[str, Any]:
    settings = {}
    for name in MODULES[type(module)]:
        value = getattr(module, name)
        settings[name] = value is not None if name == "bias" else list(value) if isinstance(value, tuple) else value
    return {"type": type(module).__name__, **settings}


def _dtype_name(module: nn.Module) -> str:
    floating = (t.dtype for t in [*module.parameters(), *module.buffers()] if t.is_floating_point())
    return str(next(floating, torch.float32))


def _describe_tensor(body: nn.Module, name: str) -> dict[str, Any]:
    value = operator.attrgetter(name)(body)
    return {"shape": list(value.shape), "dtype": str(value.dtype), "parameter": isinstance(value, nn.Parameter)}


def _aliases(state: dict[str, Tensor]) -> dict[str, str]:
    """Map every name to the first name whose tensor shares its storage (safetensors stores it once)."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    return {
        name: first.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name) if tensor.numel() else name
        for name, tensor in state.items()
    }


def without_aliases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a state, each piece of memory once: safetensors refuses shared storage."""
    return {name: state[name] for name, source in _aliases(state).items() if name == source}


def _target_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    name = f"operator.{getattr(node.target, '__name__', '')}"
    assert name in _PYTHON_CALLS, f"unexpected call {node.target}"
    return name


def _resolve(name: str) -> Callable[..., Any]:
    """Return the function behind a stored name: pure ATen operators on tensors and a few Python ones."""
    if name in _PYTHON_CALLS:
        return _PYTHON_CALLS[name]
    namespace, packet, overload = name.split(".")
    if namespace != "aten":
        raise ValueError(f"operator {name} is not allowed in a network file")
    function: torch._ops.OpOverload = getattr(getattr(torch.ops.aten, packet), overload)
    takes_tensor = any("Tensor" in str(argument.type) for argument in function._schema.arguments)
    if function._schema.is_mutable or not (takes_tensor or name in _CREATORS):
        raise ValueError(f"operator {name} is not allowed in a network file")
    return function


def _encode(value: Any) -> Any:
    match value:
        case fx.Node():
            return {"node": value.name}
        case list() | tuple():
            return [_encode(v) for v in value]
        case dict():
            return {"dict": {k: _encode(v) for k, v in value.items()}}
        case torch.dtype() | torch.memory_format() | torch.layout():
            return {"torch": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": str(value)}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case slice():
            return {"slice": [_encode(value.start), _encode(value.stop), _encode(value.step)]}
        case _:
            assert value is None or isinstance(value, bool | int | float | str), f"cannot store {value!r}"
            return value


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "node":
            return nodes[content]
        case "dict":
            return {k: _decode(v, nodes) for k, v in content.items()}
        case "torch":
            decoded = getattr(torch, content)
            if not isinstance(decoded, torch.dtype | torch.memory_format | torch.layout):
                raise ValueError(f"torch.{content} is not a dtype, memory format or layout")
            return decoded
        case "device":
            return torch.device(content)
        case "float":
            return float(content)
        case "slice":
            return slice(*(_decode(v, nodes) for v in content))
    raise ValueError(f"unknown argument kind {kind}")


def rebuild(data: dict[str, Any]) -> tuple[fx.GraphModule, Shapes, Any]:
    """Return graph, input shapes and output structure from what `describe` wrote, weights not yet loaded.

    Anything else ends in an exception of some kind; nothing that the data say is executed.
    """
    root = nn.Module()
    for name, description in data["modules"].items():
        attach(root, name, _module(description).to(dtype_named(data["dtypes"][name])))
    for name, description in data["tensors"].items():
        value = torch.zeros(description["shape"], dtype=dtype_named(description["dtype"]))
        attach(root, name, value, parameter=description["parameter"])
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for item in data["nodes"]:
        if item["op"] not in ("placeholder", "call_module", "call_function", "get_attr", "output"):
            raise ValueError(f"node kind {item['op']} is not allowed in a network file")
        if item["op"] != "call_function":
            (check_path if item["op"] in ("call_module", "get_attr") else _check_name)(item["target"])
        target = _resolve(item["target"]) if item["op"] == "call_function" else item["target"]
        args, kwargs = tuple(_decode(item["args"], nodes)), _decode(item["kwargs"], nodes)
        for key in kwargs:
            _check_name(key)
        nodes[item["name"]] = graph.create_node(item["op"], target, args, kwargs, name=item["name"])
    shapes = tuple(tuple(shape) for shape in data["input_shapes"])
    return fx.GraphModule(root, graph), shapes, data["out_spec"]


def check_size(data: dict[str, Any], weights_bytes: int) -> None:
    """Raise ValueError if the tensors of a described network are larger than a file of its weights can be."""
    with torch.device("meta"):
        modules = [_module(description) for description in data["modules"].values()]
    elements = sum(t.numel() for module in modules for t in [*module.parameters(), *module.buffers()])
    elements += sum(math.prod(description["shape"]) for description in data["tensors"].values())
    # a tensor of several names is stored once
    if elements > weights_bytes * (1 + len(data["aliases"])) + _SMALL:
        raise ValueError(f"{elements:,} numbers by network.json, and {weights_bytes:,} bytes of weights")


def _module(description: dict[str, Any]) -> nn.Module:
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in description.items() if k != "type"}
    return _MODULES_BY_NAME[description["type"]](**settings)


def dtype_named(name: str) -> torch.dtype:
    """Return the type of a name as "torch.float32"; raises ValueError for any other name."""
    dtype = getattr(torch, name.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is not a dtype")
    return dtype


def _check_name(name: str) -> None:
    """Refuse names that are not names: fx writes them into the Python source that it compiles."""
    if not re.fullmatch(r"\w+", name, re.ASCII) or not name.isidentifier():
        raise ValueError(f"{name!r} is not a name")


def check_path(name: str) -> None:
    """Raise ValueError for a name of a module or tensor that trace would not have written: it could be code."""
    if safe_name(name) != name or not all(name.split(".")):
        raise ValueError(f"{name!r} is not a name")


def safe_name(name: str) -> str:
    """Return a dotted name of the user's as fx can write it into Python source, the same wherever that is possible."""
    words = [unicodedata.normalize("NFKC", re.sub(r'["\\\x00-\x1f]', "_", word)) for word in name.split(".")]
    words = [f"{word}_" if keyword.iskeyword(word) else word for word in words]
    taken = hasattr(fx.GraphModule, words[0]) or words[0] in ("training", "meta")
    return ".".join([f"{words[0]}_" if taken else words[0], *words[1:]])


def attach(root: nn.Module, name: str, value: nn.Module | Tensor, *, parameter: bool = False) -> None:
    """Put a module, parameter or buffer under a dotted name, making empty parents on the way."""
    *path, last = name.split(".")
    parent = root
    for part in path:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    if isinstance(value, nn.Module):
        parent.add_module(last, value)
    elif parameter or isinstance(value, nn.Parameter):
        learns = value.is_floating_point()
        parent.register_parameter(last, value if isinstance(value, nn.Parameter) else nn.Parameter(value, learns))
    else:
        parent.register_buffer(last, value)


def tie(body: nn.Module, name: str, source: str) -> None:
    """Make two names one tensor again, as they were when they were saved."""
    *path, last = name.split(".")
    shared = operator.attrgetter(source)(body)
    setattr(body.get_submodule(".".join(path)), last, shared)
