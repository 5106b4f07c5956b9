"""One operation, or one value, as Python."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
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
        call = _Call(self, target, given)
        key = f"{packet}.{overload}"
        special = _SPECIAL[key](call) if key in _SPECIAL else None
        if special is not None:
            return special
        values = list(given.values())
        if key in INFIX and len(values) == 2:
            return f"{self.value(values[0])} {INFIX[key]} {self.value(values[1])}"
        if packet in SPREAD and len(values) == 2 and isinstance(values[1], list | tuple) and values[1]:
            return f"{self.value(values[0])}.{packet}({', '.join(self.value(v) for v in values[1])})"
        if packet in METHODS:
            return f"{self.value(values[0])}.{packet}({', '.join(call.arguments()[1:])})"
        if packet in TORCH:
            return f"torch.{packet}({', '.join(call.arguments())})"
        if packet in FUNCTIONAL:
            given = {name: one_number(v) if name in PER_AXIS else v for name, v in given.items()}
            return f"F.{FUNCTIONAL[packet]}({', '.join(_Call(self, target, given).arguments())})"
        _check_name(packet)
        _check_name(overload)
        return f"torch.ops.aten.{packet}.{overload}({self.listed(node.args, node.kwargs)})"

    def listed(self, args: Iterable[object], kwargs: Mapping[str, object]) -> str:
        """Write the arguments of a call."""
        for name in kwargs:
            _check_name(name)
        return ", ".join([*map(self.value, args), *(f"{name}={self.value(value)}" for name, value in kwargs.items())])

    def value(self, value: object) -> str:
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """A call of an operator, with the ways of writing that only some have; these return None in the other cases."""

    source: Expressions
    target: torch._ops.OpOverload
    #: by the names of the schema, without those that have their default
    given: dict[str, Any]

    def arguments(self) -> list[str]:
        """Write arguments by place as far as that goes, flags and what follows a default by name."""
        texts, by_place = [], True
        for argument in self.target._schema.arguments:
            if argument.name not in self.given:
                by_place = False
                continue
            value = self.given[argument.name]
            if argument.name == "pin_memory" and not value:
                continue
            if argument.name in ("dim", "dims") and isinstance(value, list | tuple) and len(value) == 1:
                value = value[0]
            by_place = by_place and not argument.kwarg_only and not isinstance(value, bool | torch.dtype)
            text = self.source.value(value)
            texts.append(text if by_place else f"{argument.name}={text}")
        return texts

    def text(self, name: str) -> str:
        """Return an argument as Python."""
        return self.source.value(self.given[name])

    def size(self) -> str:
        return f"{self.text('self')}.shape[{self.text('dim')}]"

    def slice(self) -> str | None:
        start, end, step = self.given.get("start"), self.given.get("end"), self.given.get("step", 1)
        texts = (
            "" if start in (None, 0) else self.source.value(start),
            "" if end in (None, END) else self.source.value(end),
            "" if step == 1 else self.source.value(step),
        )
        return self._at_axis(self.given.get("dim", 0), colon(*texts))

    def select(self) -> str | None:
        return self._at_axis(self.given["dim"], self.text("index"))

    def _at_axis(self, axis: int, index: str) -> str | None:
        x = self.text("self")
        return f"{x}[{':, ' * axis}{index}]" if axis >= 0 else f"{x}[..., {index}]" if axis == -1 else None

    def index(self) -> str | None:
        indices = self.given["indices"]
        if not all(v is None or len(self.source.network.shapes.get(v.name, ())) for v in indices):
            return None  # an index without axes would be read as a number
        return f"{self.text('self')}[{', '.join(':' if v is None else self.source.value(v) for v in indices)}]"

    def negate(self) -> str:
        return f"-{self.text('self')}"

    def subtract_from(self) -> str | None:
        return f"{self.text('other')} - {self.text('self')}" if "alpha" not in self.given else None

    def hardtanh(self) -> str | None:
        limits = self.given.get("min_val"), self.given.get("max_val")
        return f"F.relu6({self.text('self')})" if limits == (0, 6) else None

    def elu(self) -> str | None:
        names = list(self.given)
        return f"F.elu({', '.join(map(self.text, names))})" if names in (["self"], ["self", "alpha"]) else None

    def constant_pad(self) -> str:
        value = f", value={self.text('value')}" if "value" in self.given else ""
        return f"F.pad({self.text('self')}, {self.text('pad')}{value})"

    def cast(self) -> str | None:
        return f"{self.text('self')}.to({self.text('dtype')})" if list(self.given) == ["self", "dtype"] else None

    def interpolate(self, mode: str) -> str:
        size, factors = self.given.get("output_size"), self.given.get("scale_factors")
        by = f"size={self.source.value(size)}"
        if size is None:
            by = f"scale_factor={self.source.value(one_number(factors))}"
        corners = ", align_corners=True" if self.given.get("align_corners") else ""
        return f"F.interpolate({self.text('input')}, {by}, mode={self.source.value(mode)}{corners})"


def _interpolate(mode: str) -> Callable[[_Call], str]:
    return lambda call: call.interpolate(mode)


_SPECIAL: dict[str, Callable[[_Call], str | None]] = {
    "sym_size.int": _Call.size,
    "slice.Tensor": _Call.slice,
    "select.int": _Call.select,
    "index.Tensor": _Call.index,
    "neg.default": _Call.negate,
    "rsub.Scalar": _Call.subtract_from,
    "hardtanh.default": _Call.hardtanh,
    "elu.default": _Call.elu,
    "constant_pad_nd.default": _Call.constant_pad,
    "to.dtype": _Call.cast,
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
