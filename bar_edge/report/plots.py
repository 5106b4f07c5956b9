"""The report's figures, as SVG text that takes its colours and fonts from the page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

#: colours that no figure shows: in the SVG each becomes what the page's theme says
INK, FAINT, ONE, TWO, BAD = "#010101", "#020202", "#030303", "#040404", "#050505"
_CSS = {INK: "currentColor", FAINT: "var(--line)", ONE: "var(--one)", TWO: "var(--two)", BAD: "var(--bad)"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bar-edge",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
#: inches; narrow, so that its text can be read when a phone shows it 350 pixels wide
_WIDTH = 5.2
_MOST_POINTS = 500


@matplotlib.rc_context(_STYLE)
def budget_curve(metrics: Sequence[Mapping[str, Any]], limit: float | None, unit: str) -> str | None:
    """Draw cost V and moving budget b over the steps; None if no line of metrics.jsonl holds a volume."""
    points = _thin([(x, m) for x, m in _with_steps(metrics) if m.get("volume") is not None])
    if not points:
        return None
    figure, axes = _figure(2.9)
    steps = [x for x, _ in points]
    bounds = [(x, m["budget"]) for x, m in points if m.get("budget") is not None]
    if bounds:
        axes.plot(*zip(*bounds, strict=True), color=TWO, linestyle="--", label="budget b")
    axes.plot(steps, [m["volume"] for _, m in points], color=ONE, label="network V", linewidth=1.6)
    if limit is not None:
        axes.axhline(limit, color=BAD, linewidth=1, label="final budget")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="step", ylabel=unit)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(loc="upper right")
    return _svg(figure, f"Cost V of the network and moving budget b, in {unit}, over the pruning steps")


@matplotlib.rc_context(_STYLE)
def metric_curve(metrics: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """Draw the held-out metric over the steps, phases told apart; None if no line holds a metric."""
    points = [(x, m) for x, m in _with_steps(metrics) if m.get("metric") is not None]
    if not points:
        return None
    figure, axes = _figure(2.9)
    axes.plot([x for x, _ in points], [m["metric"] for _, m in points], color=ONE, marker=".", linewidth=1.4)
    spans: dict[str, tuple[float, float]] = {}
    for x, m in _with_steps(metrics):
        first, _ = spans.get(str(m.get("phase")), (x - float(m.get("step") or 0), x))
        spans[str(m.get("phase"))] = (first, x)
    for place, (phase, (first, last)) in enumerate(spans.items()):
        if place:
            axes.axvline(first, color=FAINT, linewidth=1)
        axes.text((first + last) / 2, 1.01, phase, transform=axes.get_xaxis_transform(), ha="center")
    axes.set(xlabel="step", ylabel=name, xlim=(0, max(last for _, last in spans.values())))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return _svg(figure, f"{name} on held-out images over the steps of all phases")


@matplotlib.rc_context(_STYLE)
def widths(layers: Sequence[Mapping[str, Any]]) -> str | None:
    """Draw each convolution's channels before and after, removed ones crossed (the paper's figure 7)."""
    if not layers:
        return None
    figure, axes = _figure(2.9)
    places = range(1, len(layers) + 1)
    axes.bar(places, [layer["width"] for layer in layers], width=0.85, color=FAINT, label="before")
    axes.bar(places, [layer["kept"] for layer in layers], width=0.85, color=ONE, label="after")
    gone = [place for place, layer in zip(places, layers, strict=True) if not layer["kept"]]
    if gone:
        axes.plot(gone, [0] * len(gone), linestyle="", marker="x", color=BAD, label="removed", clip_on=False, zorder=5)
    axes.set(xlabel="convolution, in the network's order", ylabel="output channels")
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_xlim(0.3, len(layers) + 0.7)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handlelength=1.2)
    return _svg(figure, "Output channels of every convolution before and after pruning; removed ones are crossed")


@matplotlib.rc_context(_STYLE)
def histogram(samples_ms: Sequence[float]) -> str:
    """Draw the latency's distribution up to thrice its median; how many runs were slower is said below it."""
    figure, axes = _figure(2.4)
    ordered = sorted(samples_ms)
    highest = 3 * ordered[len(ordered) // 2]
    shown = [ms for ms in ordered if ms <= highest]
    slower = len(ordered) - len(shown)
    axes.hist(shown, bins=40, color=ONE)
    axes.set(xlabel=f"latency, ms ({slower:,} slower runs not drawn)" if slower else "latency, ms", ylabel="inferences")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return _svg(figure, f"Histogram of {len(samples_ms)} latencies in ms")


@matplotlib.rc_context(_STYLE)
def trade_off(points: Sequence[tuple[str, float, float]], name: str) -> str | None:
    """Draw metric over cost factor, one colour and mark per series; points: (series, factor, metric)."""
    if not points:
        return None
    figure, axes = _figure(3.2)
    styles = [(ONE, "o"), (TWO, "s"), (BAD, "^"), (INK, "D"), (INK, "x"), (ONE, "v")]
    for place, series in enumerate(dict.fromkeys(p[0] for p in points)):
        color, marker = styles[place % len(styles)]
        mine = [(factor, metric) for s, factor, metric in points if s == series]
        axes.plot(*zip(*mine, strict=True), color=color, marker=marker, linestyle="", label=series)
    axes.set(xlabel="activation volume, times smaller", ylabel=name)
    if max(metric for _, _, metric in points) <= 1:
        axes.set_ylim(top=min(1.0, axes.get_ylim()[1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", linewidth=0.5)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handlelength=1)
    return _svg(figure, f"{name} of each run over how many times smaller its activation volume is")


def _with_steps(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[float, Mapping[str, Any]]]:
    # `step` starts again in each phase: phases are put one behind the other
    found: list[tuple[float, Mapping[str, Any]]] = []
    offset = last = 0.0
    for line in metrics:
        if found and line.get("phase") != found[-1][1].get("phase"):
            offset += last
        last = float(line.get("step") or 0)
        found.append((offset + last, line))
    return found


def _thin(points: list[Any]) -> list[Any]:
    stride = -(-len(points) // _MOST_POINTS) or 1
    return [p for place, p in enumerate(points) if place % stride == 0 or place == len(points) - 1]


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, says: str) -> str:
    """Return the figure as an `<svg>` element for a page: themed, scalable, and named for who cannot see it."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for color, css in _CSS.items():
        text = text.replace(color, css)
    text = re.sub(r"font: [^;\"]*?(\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px", text)
    tag, rest = text.split(">", 1)
    tag = re.sub(r' (width|height|version)="[^"]*"', "", tag)
    return f'{tag} role="img" aria-label="{html.escape(says)}">{rest}'
