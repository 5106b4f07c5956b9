"""The latency table: what a device takes for the operations of a network, over the widths of their tensors."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from bar_edge.errors import InputError
from bar_edge.files import read_json, write_json
from bar_edge.records.lowering import Lowering

_KIND = re.compile(
    r"(?P<op>[a-z]+)(?: (?P<kernel>\d+(?:x\d+)*))?(?: /(?P<stride>\d+))?(?: d(?P<dilation>\d+))?"
    r"(?: g(?P<groups>\d+))? @(?P<shape>\d+(?:x\d+)*)?"
)
#: operation -> the tensors whose widths it is priced by
WIDTHS = {
    "conv": ("in", "out"),
    "transposed": ("in", "out"),
    "linear": ("in", "out"),
    "depthwise": ("channels",),
    "clip": ("channels",),
    "norm": ("channels",),
    "each": ("channels",),
    "handover": ("channels",),
    "add": ("addend", "sum"),
    "sum": ("channels",),
    "pad": ("channels",),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of operation, all of it but the widths, written as in `conv 3x3 /2 @32x32`.

    conv, transposed, linear, depthwise   the layers, with a Relu behind them
    clip      another activation behind a layer, as ReLU6
    norm      a BatchNorm that no convolution swallows, with its activation
    each      anything else that goes over a tensor once: activations, pooling, concatenation
    handover  from one convolution to the next: what the layout of narrow tensors costs
    add       an addition of a convolution's output to a stream that has more channels
    sum       an addition of the same channels, behind one that was not; in a stream without any it costs nothing
    pad       channels of zeros put behind those of a tensor
    """

    op: str
    kernel: tuple[int, ...] = ()
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    #: of the input's map
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [self.op]
        parts += ["x".join(map(str, self.kernel))] if self.kernel else []
        parts += [f"{sign}{n}" for sign, n in (("/", self.stride), ("d", self.dilation), ("g", self.groups)) if n > 1]
        return " ".join([*parts, "@" + "x".join(map(str, self.shape))])

    @staticmethod
    def parse(text: str) -> Kind:
        """Read what `str` wrote; raises ValueError for anything else."""
        found = _KIND.fullmatch(text)
        if found is None or found["op"] not in WIDTHS:
            raise ValueError(f"no kind of operation: {text!r}")
        sizes = {name: tuple(map(int, (found[name] or "").split("x"))) if found[name] else () for name in _SIZES}
        numbers = {name: int(found[name] or 1) for name in ("stride", "dilation", "groups")}
        return Kind(op=found["op"], kernel=sizes["kernel"], shape=sizes["shape"], **numbers)


_SIZES = ("kernel", "shape")


#: no tensor has more channels
_WIDEST = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """Milliseconds over a grid of widths, the last axis fastest; without channels nothing is done, in no time."""

    widths: tuple[tuple[int, ...], ...]
    ms: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LatencyTable:
    """Prices of one device and runtime, and how they add up to the latency of a whole network in ms."""

    #: form in which networks are exported for it, and to multiples of what that rounds their widths
    lowering: Lowering
    rounding: int
    #: widths above it cost as rounded up to multiples of it: the hardware's steps
    step: int
    prices: dict[str, Prices]
    #: whole network = constant_ms + layer_scale * layers + rest_scale * all else
    layer_scale: float = 1.0
    rest_scale: float = 1.0
    constant_ms: float = 0.0
    #: whole networks that it was fitted to: predicted without them, and measured, in ms
    checks: tuple[tuple[float, float], ...] = ()
    #: ms over fine widths, by which the steps were found: {"kind", "axis", "widths", "ms"}
    lines: tuple[dict[str, Any], ...] = ()
    model: str = ""
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)

    def stepped(self, width: int) -> int:
        """Return the width that a tensor costs like."""
        filled = -(-width // self.rounding) * self.rounding
        return filled if filled <= self.step else -(-filled // self.step) * self.step

    @property
    def typical_error(self) -> float | None:
        """Return the median relative error of the checks, None without any."""
        errors = sorted(abs(predicted / measured - 1) for predicted, measured in self.checks)
        return errors[len(errors) // 2] if errors else None

    def save(self, path: Path) -> None:
        """Write the table as JSON (schema 1)."""
        write_json(path, {"schema": 1, **dataclasses.asdict(self), "lowering": str(self.lowering)})

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read a table; raises InputError if the file is not one."""
        data = read_json(path)
        try:
            if data.pop("schema") != 1:
                raise ValueError("another schema")
            for text in data["prices"]:
                Kind.parse(text)
            prices = {
                text: Prices(widths=tuple(map(tuple, found["widths"])), ms=tuple(map(float, found["ms"])))
                for text, found in data.pop("prices").items()
            }
            checks = tuple((float(a), float(b)) for a, b in data.pop("checks"))
            lowering, lines = Lowering.parse(data.pop("lowering")), tuple(data.pop("lines"))
            table = cls(lowering=lowering, prices=prices, checks=checks, lines=lines, **data)
            _check(table)
            return table
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(
                "a latency table that `bar-edge profile` wrote", got=f"{path.name}: {type(error).__name__}: {error}"
            ) from error


def knots(largest: int, multiple: int = 1) -> tuple[int, ...]:
    """Return the widths that are measured, up to the largest; dense where narrow layers change their nature."""
    steps = [4, 16, 32, *(4**i for i in range(3, 8))]
    return (*(n for n in steps if n < largest and n % multiple == 0), largest)


def _check(table: LatencyTable) -> None:
    """Raise ValueError for numbers by which nothing can be priced: the file may be anybody's."""
    for prices in table.prices.values():
        for axis in prices.widths:
            rises = list(axis) == sorted(set(axis)) and all(type(n) is int and 0 <= n < _WIDEST for n in axis)
            if not axis or not rises:
                raise ValueError("widths that do not rise from 0 on")
        points = math.prod(map(len, prices.widths))
        if len(prices.ms) != points or not all(0 <= ms < math.inf for ms in prices.ms):
            raise ValueError("prices that are no times, or not one for each point")
    if not all(type(n) is int and 0 < n < _WIDEST for n in (table.rounding, table.step)):
        raise ValueError(f"rounding {table.rounding}, step {table.step}")
    numbers = [table.layer_scale, table.rest_scale, table.constant_ms, *(ms for pair in table.checks for ms in pair)]
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        raise ValueError("scales, a constant or checks that are no numbers")
    if not isinstance(table.environment, dict) or not isinstance(table.model, str):
        raise ValueError("an environment or a model of another type")
