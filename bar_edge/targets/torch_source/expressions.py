"""One operation, or one value, as Python."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bar_edge.errors import InputError
from bar_edge.network import Network
from bar_edge.network.graph_json import _check_name
from bar_edge.targets.torch_source.operators import FUNCTIONAL, INFIX, METHODS, PER_AXIS, PYTHON, SPREAD, TORCH
from bar_edge.targets.torch_source.texts import colon, one_number, path_of, tuple_of
from bar_edge.targets.torch_source.variables import END

_NO_DEFAULT = object()


class Expressions:
    """Writes operations on named values."""

    def __init__(self, network: Network, names: dict[fx.Node, str], itself: dict[fx.Node, fx.Node]) -> None:
        self.network, self.names, self.itself = network, names, itself
        self.uses_device = False

    def call(self, node: fx.Node) -> str:
        """Return a call of a function as Python: from the tables, or by the operator's own name."""
        target = node.target
        if target is operator.getitem:
            return f"{self.value(node.args[0])}[{self.value(node.args[1])}]"
        if target in PYTHON:
            return f"{self.value(node.args[0])} {PYTHON[target]} {self.value(node.args[1])}"
        assert isinstance(target, torch._ops.OpOverload)
        packet, overload = target._schema.name.removeprefix("aten::"), target._overloadname
        if target.namespace != "aten":
            raise InputError("a network of operators that torch alone has", got=f"{target}")
        given = given_to(node)
        key = f"{packet}.{overload}"
        special = _SPECIAL[key](self, given) if key in _SPECIAL else None
        if special is not None:
            return special
        values = list(given.values())
        if key in INFIX and len(values) == 2:
            return f"{self.value(values[0])} {INFIX[key]} {self.value(values[1])}"
        if packet in SPREAD and len(values) == 2 and isinstance(values[1], list | tuple) and values[1]:
            return f"{self.value(values[0])}.{packet}({', '.join(self.value(v) for v in values[1])})"
        if packet in METHODS:
            return f"{self.value(values[0])}.{packet}({', '.join(self._arguments(node, given)[1:])})"
        if packet in TORCH:
            return f"torch.{packet}({', '.join(self._arguments(node, given))})"
        if packet in FUNCTIONAL:
            given = {name: one_number(v) if name in PER_AXIS else v for name, v in given.items()}
            return f"F.{FUNCTIONAL[packet]}({', '.join(self._arguments(node, given))})"
        _check_name(packet)
        _check_name(overload)
        return f"torch.ops.aten.{packet}.{overload}({self.listed(node.args, node.kwargs)})"

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

    def listed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Write the arguments of a call."""
        for name in kwargs:
            _check_name(name)
        return ", ".join([*map(self.value, args), *(f"{name}={self.value(value)}" for name, value in kwargs.items())])

    def value(self, value: Any) -> str:
        """Return an argument as Python."""
        match value:
            case fx.Node():
                value = self.itself.get(value, value)
                return path_of(str(value.target)) if value.op == "get_attr" else self.names[value]
            case list() | tuple():
                texts = [self.value(v) for v in value]
                tensors = any(v is None or isinstance(v, fx.Node) and v.name in self.network.shapes for v in value)
                return f"[{', '.join(texts)}]" if tensors else tuple_of(texts)
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


def _size(source: Expressions, given: dict[str, Any]) -> str:
    return f"{source.value(given['self'])}.shape[{source.value(given['dim'])}]"


def _slice(source: Expressions, given: dict[str, Any]) -> str | None:
    start, end, step = given.get("start"), given.get("end"), given.get("step", 1)
    texts = (
        "" if start in (None, 0) else source.value(start),
        "" if end in (None, END) else source.value(end),
        "" if step == 1 else source.value(step),
    )
    return _at_axis(source.value(given["self"]), given.get("dim", 0), colon(*texts))


def _select(source: Expressions, given: dict[str, Any]) -> str | None:
    return _at_axis(source.value(given["self"]), given["dim"], source.value(given["index"]))


def _index(source: Expressions, given: dict[str, Any]) -> str | None:
    indices = given["indices"]
    if not all(v is None or len(source.network.shapes.get(v.name, ())) for v in indices):
        return None  # an index without axes would be read as a number
    return f"{source.value(given['self'])}[{', '.join(':' if v is None else source.value(v) for v in indices)}]"


def _at_axis(x: str, axis: int, index: str) -> str | None:
    return f"{x}[{':, ' * axis}{index}]" if axis >= 0 else f"{x}[..., {index}]" if axis == -1 else None


def _negate(source: Expressions, given: dict[str, Any]) -> str:
    return f"-{source.value(given['self'])}"


def _subtract_from(source: Expressions, given: dict[str, Any]) -> str | None:
    return f"{source.value(given['other'])} - {source.value(given['self'])}" if "alpha" not in given else None


def _hardtanh(source: Expressions, given: dict[str, Any]) -> str | None:
    limits = given.get("min_val"), given.get("max_val")
    return f"F.relu6({source.value(given['self'])})" if limits == (0, 6) else None


def _elu(source: Expressions, given: dict[str, Any]) -> str | None:
    texts = [source.value(value) for value in given.values()]
    return f"F.elu({', '.join(texts)})" if list(given) in (["self"], ["self", "alpha"]) else None


def _constant_pad(source: Expressions, given: dict[str, Any]) -> str:
    value = f", value={source.value(given['value'])}" if "value" in given else ""
    return f"F.pad({source.value(given['self'])}, {source.value(given['pad'])}{value})"


def _cast(source: Expressions, given: dict[str, Any]) -> str | None:
    if list(given) != ["self", "dtype"]:
        return None
    return f"{source.value(given['self'])}.to({source.value(given['dtype'])})"


def _interpolate(mode: str) -> Callable[[Expressions, dict[str, Any]], str]:
    def call(source: Expressions, given: dict[str, Any]) -> str:
        size, factors = given.get("output_size"), given.get("scale_factors")
        by = f"scale_factor={source.value(one_number(factors))}" if size is None else f"size={source.value(size)}"
        corners = ", align_corners=True" if given.get("align_corners") else ""
        return f"F.interpolate({source.value(given['input'])}, {by}, mode={source.value(mode)}{corners})"

    return call


_SPECIAL: dict[str, Callable[[Expressions, dict[str, Any]], str | None]] = {
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


def given_to(node: fx.Node) -> dict[str, Any]:
    """Return a call's arguments by their schema names, without those that have their default."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = {argument.name: argument for argument in node.target._schema.arguments}
    given = dict(zip(arguments, node.args, strict=False)) | dict(node.kwargs)

    def is_default(name: str, value: Any) -> bool:
        argument = arguments[name]
        default = argument.default_value if argument.has_default_value() else _NO_DEFAULT
        return value == default and (isinstance(value, list | tuple) or type(value) is type(default))

    return {name: given[name] for name in arguments if name in given and not is_default(name, given[name])}
