"""Measures what the operations of a network cost: chains of equal operations, many in turn, one process at a time."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bar_edge.bench.protocol import Measurement, bench_onnx
from bar_edge.bench.statistics import median_ms
from bar_edge.files import read_json, write_json
from bar_edge.records.latency_table import Kind, Prices, knots

#: a price is the difference of a short and a long chain, per operation: what both have in common falls out
SHORT, LONG = 2, 8
#: files per process besides the yardstick's, and how long each is measured
FILES, SECONDS = 24, 0.1
#: what is measured in every process besides, to see what else the device does at the time
YARDSTICK = (Kind(op="conv", kernel=(3, 3), shape=(16, 16)), (32, 32))
#: from how much above its median on the others are measured again, and how often they are at most
DISTURBED, TRIES = 1.1, 3
#: which widths may cost alike
STEPS = (32, 16, 8, 4)
#: up to what a line between two steps is flat, as a share of its largest price
FLAT = 0.02
#: prices by which the steps are told apart
LINE_WIDTHS = tuple(range(4, 69, 4))

Point = tuple[Kind, tuple[int, ...]]


class Prober:
    """Measures chains on one runtime and remembers them in a file, so that a stopped profile goes on.

    options: of bench_onnx. environment: of the last measurement. known: ms of an operation by its name, over those of
    the yardstick in the same process; yardsticks: its ms in each of them.
    """

    def __init__(self, memory: Path, step: Callable[[int], None], **options: Any) -> None:
        self.memory, self.step, self.options = memory, step, options
        self.environment: dict[str, Any] = {}
        self.known: dict[str, float] = {}
        self.yardsticks: list[float] = []
        if memory.is_file():
            data = read_json(memory)
            if data["options"] == options and "yardsticks" in data:
                self.known, self.yardsticks, self.environment = data["known"], data["yardsticks"], data["environment"]

    def measure(self, points: Iterable[Point]) -> None:
        """Measure what the prices of these points rest on."""
        needed = [point for one in points for point in (one, *_reference(*one))]
        missing = [(k, w) for k, w in dict.fromkeys(needed) if _name(k, w) not in self.known]
        for start in range(0, len(missing), FILES // 2):
            batch = missing[start : start + FILES // 2]
            tried = [self._together(batch)]
            usual = statistics.median(self.yardsticks or [tried[0][0]])
            while min(tried)[0] > DISTURBED * usual and len(tried) < TRIES:
                tried.append(self._together(batch))
            yardstick, found = min(tried)
            self.yardsticks.append(yardstick)
            for point, ms in zip(batch, found, strict=True):
                self.known[_name(*point)] = ms / yardstick
            self.save()
            self.step(len(self.known))

    def _together(self, batch: list[Point]) -> tuple[float, list[float]]:
        """Return the ms of the yardstick and of each operation, measured in turn in one process."""
        with tempfile.TemporaryDirectory() as folder:
            files: list[Path] = []
            for (kind, widths), depth in itertools.product([YARDSTICK, *batch], (SHORT, LONG)):
                files.append(Path(folder) / f"{len(files)}.onnx")
                files[-1].write_bytes(chain(kind, widths, depth))
            found = bench_onnx(files, seconds=SECONDS, **self.options)
        self.environment = found[0].environment
        pairs = zip(found[::2], found[1::2], strict=True)
        yardstick, *others = [(undisturbed_ms(long) - undisturbed_ms(short)) / (LONG - SHORT) for short, long in pairs]
        return yardstick, others

    def save(self) -> None:
        """Write down what is known."""
        found = {"options": self.options, "environment": self.environment}
        write_json(self.memory, found | {"known": self.known, "yardsticks": self.yardsticks})

    def price(self, kind: Kind, widths: tuple[int, ...]) -> float:
        """Return the ms of one operation, at least 0, without those that the chain needs around it."""
        around = sum(self.known[_name(*point)] for point in _reference(kind, widths))
        return max(0.0, self.known[_name(kind, widths)] - around) * statistics.median(self.yardsticks)

    def line(self, kind: Kind, axis: int, other: int) -> dict[str, Any]:
        """Measure prices over fine widths of one axis of a convolution."""
        points = [(kind, (n, other) if axis == 0 else (other, n)) for n in LINE_WIDTHS]
        self.measure(points)
        prices = [self.price(*point) for point in points]
        return {"kind": str(kind), "axis": axis, "other": other, "widths": list(LINE_WIDTHS), "ms": prices}

    def prices(self, largest: Mapping[Kind, tuple[int, ...]]) -> dict[str, Prices]:
        """Measure every kind over a grid up to its largest widths; monotone."""
        grids = {kind: tuple(knots(n, kind.groups) for n in widths) for kind, widths in largest.items()}
        for kind in largest:
            if kind.op == "add":  # no addend is wider than its sum
                grids[kind] = (grids[kind][1], grids[kind][1])
        points = {kind: list(itertools.product(*axes)) for kind, axes in grids.items()}
        self.measure((kind, widths) for kind, all_ in points.items() for widths in all_)
        found = {}
        for kind, axes in grids.items():
            values = np.array([self.price(kind, widths) for widths in points[kind]]).reshape([len(a) for a in axes])
            padded = np.pad(monotone(values), [(1, 0)] * values.ndim)
            found[str(kind)] = Prices(
                widths=tuple((0, *axis) for axis in axes), ms=tuple(round(float(v), 7) for v in padded.ravel())
            )
        return found


def undisturbed_ms(latency: Measurement) -> float:
    """Return the median run, for one thread on a CPU that of its processor time: what a busy neighbour leaves alone."""
    alone = latency.environment["threads"] == 1 and str(latency.environment["runtime"]).endswith("-cpu")
    return statistics.median(latency.cpu_samples_ms) if alone and latency.cpu_samples_ms else median_ms(latency)


def monotone(values: np.ndarray) -> np.ndarray:
    """Return values that fall along no axis: the middle between the least above and the largest below."""
    for axis in range(values.ndim):
        above = np.maximum.accumulate(values, axis)
        below = np.flip(np.minimum.accumulate(np.flip(values, axis), axis), axis)
        values = (above + below) / 2
    return values


def find_step(lines: Sequence[Mapping[str, Any]]) -> int:
    """Return the largest step that explains the lines: on the way to the next multiple of it nothing gets dearer.

    Judged by the mean over the widths above one step, which noise leaves near 0 and a true slope does not; of each
    line by itself, because what one width does faster must not hide the steps of the other.
    """
    for step in STEPS:
        means = []
        for line in lines:
            by_width = dict(zip(line["widths"], line["ms"], strict=True))
            last = max(n for n in by_width if n % step == 0)
            inside = [n for n in by_width if step < n <= last]
            dearer = [(by_width[-(-n // step) * step] - by_width[n]) / max(line["ms"]) for n in inside]
            means += [statistics.mean(dearer)] if dearer else []
        if max(means, default=0.0) <= FLAT:
            return step
    return STEPS[-1]


# ------------------------------------------------------------------------------------------ chains


def chain(kind: Kind, widths: tuple[int, ...], depth: int) -> bytes:
    """Return an ONNX file with `depth` equal operations; convolutions side by side, their outputs added up."""
    from onnx import TensorProto, helper

    graph = _Graph(kind)
    builders: dict[str, Callable[..., str]] = {
        "conv": graph.convolutions,
        "transposed": graph.convolutions,
        "depthwise": graph.depthwise,
        "linear": graph.linears,
        "norm": graph.norms,
        "each": graph.activations,
        "handover": graph.handovers,
        "clip": graph.bounded,
        "add": graph.additions,
        "sum": graph.sums,
        "pad": graph.pads,
    }
    first = {"add": widths[-1]}.get(kind.op, widths[0])
    output = builders[kind.op](*widths, depth)
    value = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("input", [1, first, *kind.shape]), (output, None))
    ]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "chain", value[:1], value[1:], graph.weights),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    return bytes(model.SerializeToString())


class _Graph:
    def __init__(self, kind: Kind) -> None:
        from onnx import helper, numpy_helper

        self.kind, self._helper, self._numpy = kind, helper, numpy_helper
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.rng = np.random.default_rng(0)

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"y{len(self.nodes)}"
        self.nodes.append(self._helper.make_node(op, inputs, [name], **attributes))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape, np.float32) / max(1, int(np.prod(shape[1:]))) ** 0.5)

    def constant(self, values: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(self._numpy.from_array(values, name))
        return name

    def convolution(self, x: str, n_in: int, n_out: int, groups: int, *, plain: bool = False) -> str:
        kind, transposed = self.kind, self.kind.op == "transposed"
        kernel = tuple(1 for _ in kind.shape) if plain else kind.kernel
        shape = (n_in, n_out // groups) if transposed else (n_out, n_in // groups)
        pads = [kind.dilation * (k - 1) // 2 for k in kernel] * 2
        strides = {"strides": [kind.stride] * len(kernel), "dilations": [kind.dilation] * len(kernel)}
        inputs = (x, self.weight(*shape, *kernel), self.weight(n_out))
        op = "ConvTranspose" if transposed else "Conv"
        attributes: dict[str, Any] = {} if plain else strides
        return self.node(op, *inputs, group=groups, kernel_shape=list(kernel), pads=pads, **attributes)

    def summed(self, parts: Iterator[str]) -> str:
        total = next(parts)
        for part in parts:
            total = self.node("Add", total, part)
        return total

    def convolutions(self, n_in: int, n_out: int, depth: int) -> str:
        return self.summed(self.convolution("input", n_in, n_out, self.kind.groups) for _ in range(depth))

    def depthwise(self, n: int, depth: int) -> str:
        return self.summed(self.convolution("input", n, n, n) for _ in range(depth))

    def linears(self, n_in: int, n_out: int, depth: int) -> str:
        return self.summed(self.node("MatMul", "input", self.weight(n_in, n_out)) for _ in range(depth))

    def norms(self, n: int, depth: int) -> str:
        x = "input"
        for _ in range(depth):
            positive = [np.abs(self.rng.standard_normal(n, np.float32)) + 0.5 for _ in range(4)]
            x = self.node("Relu", self.node("BatchNormalization", x, *map(self.constant, positive)))
        return x

    def activations(self, n: int, depth: int) -> str:
        x = "input"
        for _ in range(depth):
            x = self.node("LeakyRelu", x, alpha=0.5)
        return x

    def handovers(self, n: int, depth: int) -> str:
        x = "input"
        for _ in range(depth):
            x = self.node("Relu", self.convolution(x, n, n, 1, plain=True))
        return x

    def bounded(self, n: int, depth: int) -> str:
        x, bounds = "input", [self.constant(np.array(value, np.float32)) for value in (0, 6)]
        for _ in range(depth):
            x = self.node("Clip", self.convolution(x, n, n, n, plain=True), *bounds)
        return x

    def additions(self, addend: int, width: int, depth: int) -> str:
        """The stream is there as a whole; the addend is put in its places by Gather, from a filter of zeros."""
        x = "input"
        addend = min(addend, width)
        for _ in range(depth):
            b = self.convolution(x, width, addend, 1, plain=True)
            index = self.rng.permutation(np.concatenate([np.arange(addend), np.zeros(width - addend, int)]))
            x = self.node("Add", x, self.node("Gather", b, self.constant(index.astype(np.int64)), axis=1))
        return x

    def sums(self, n: int, depth: int) -> str:
        x = "input"
        for _ in range(depth):
            x = self.node("Add", x, self.convolution(x, n, n, 1, plain=True))
        return x

    def pads(self, n: int, depth: int) -> str:
        """One channel more each time."""
        x, rank = "input", 2 + len(self.kind.shape)
        for _ in range(depth):
            x = self.node("Pad", x, self.constant(np.eye(2 * rank, dtype=np.int64)[rank + 1]))
        return x


def _reference(kind: Kind, widths: tuple[int, ...]) -> list[Point]:
    """Return the operations that are in a chain besides those that it is about, per one of these."""
    plain = Kind(op="conv", kernel=tuple(1 for _ in kind.shape), shape=kind.shape)
    if kind.op in ("handover", "sum"):
        return [(plain, (widths[0], widths[0]))]
    if kind.op == "clip":
        return [(dataclasses.replace(plain, op="depthwise"), widths)]
    return [(plain, (widths[1], min(widths)))] if kind.op == "add" else []


def _name(kind: Kind, widths: tuple[int, ...]) -> str:
    return f"{kind}: {', '.join(map(str, widths))}"
