"""`bar-edge profile`: a latency table of a network's own operations, fitted to whole networks on the same device.

On TensorRT, which fuses what it likes and builds for minutes, the prices come from the layers of whole engines.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bar_edge.bench import Measurement, bench_onnx
from bar_edge.errors import InputError
from bar_edge.latency_budget.engine_prices import Sample, fitted_prices, layer_samples
from bar_edge.latency_budget.operation_prices import LINE_WIDTHS, Prober, find_step, undisturbed_ms
from bar_edge.lowering.lower import lower
from bar_edge.methods import GateLayout, random_plan, smallest_cost
from bar_edge.network import Network, count
from bar_edge.network.priced_operations import LAYERS, LatencyCounter, largest_widths
from bar_edge.progress import NoProgress, Progress
from bar_edge.records import ChannelPlan
from bar_edge.records.latency_table import Kind, LatencyTable, Prices, knots
from bar_edge.records.lowering import PLAIN, Lowering
from bar_edge.surgery import slice_network
from bar_edge.targets.onnx.file import export_onnx
from bar_edge.targets.table import forms_for

#: shares of the volume of the random plans to which a table is fitted, the whole network among them
SHARES = (1.0, 0.7, 0.55, 0.4, 0.3, 0.2, 0.12, 0.07)
CHECK_S = 1.0
#: where layers are timed in whole engines, and in how many besides those to which the table is fitted
TENSORRT, ENGINES = "tensorrt", 24
#: shares of the volume of the plans by which the form of the additions is chosen: what is fast at half may not be later
TRIED = (0.5, 0.3, 0.1)


def profile_network(
    network: Network,
    out: Path,
    *,
    model: str,
    runtime: str = "onnxruntime-cpu",
    threads: int = 1,
    lowering: Lowering | None = None,
    on: str = "local",
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure the network's operations, then a few random plans of it as whole files; write and return the table.

    lowering: form of the additions in whole networks; None is the faster of the runtime's two most promising, in
    random plans. What was measured before a stop is not measured again; engines are built again, with what their timing
    cache holds. Raises what `bench_onnx` raises, and InputError for a lowering that layers have no prices for alone.
    """
    if lowering is not None and not _has_prices(lowering):
        raise InputError(
            "a lowering for a table of single layers: a form, or a form and one rounding as in gather:4",
            got=str(lowering),
            consequence="nothing was measured",
            remedy="omit packing and the smaller rounding; `export --lowering` takes them",
        )
    progress = progress or NoProgress()
    largest = largest_widths(network)
    caches = out.with_name(f".{out.name}.caches")
    shared = {"caches": str(caches.resolve())} if runtime == TENSORRT else {}
    progress.phase("profile", 1, 0)
    prober = Prober(
        out.with_name(f".{out.name}.part"),
        lambda n: progress.step({"phase": "profile", "epoch": 1, "step": n}),
        runtime=runtime,
        threads=threads,
        on=on,
        **shared,
    )
    lines = _lines(prober, largest) if runtime != TENSORRT else []
    prices = prober.prices(largest) if runtime != TENSORRT else {}
    if lowering is None:
        lowering = _faster(prober, network, forms_for(runtime, "fp32").candidates[:2])
    if runtime == TENSORRT:
        prices = _engine_prices(prober, network, largest, lowering)
    table = LatencyTable(
        lowering=lowering,
        rounding=max(4, *(form.rounding for form in lowering.forms)),
        step=find_step(lines) if lines else 4,
        prices=prices,
        lines=tuple(lines),
        model=model,
        environment=prober.environment,
    )
    table = fit(table, network, _whole(prober, network, lowering))
    progress.done()
    table.save(out)
    prober.memory.unlink(missing_ok=True)
    shutil.rmtree(caches, ignore_errors=True)
    return table


def export_plan(network: Network, plan: ChannelPlan, lowering: Lowering, file: Path) -> None:
    """Write the network, sliced by the plan, in a form of its additions."""
    sliced = slice_network(network, plan)
    export_onnx(lower(sliced, lowering), sliced.input_shapes, file)


def _has_prices(lowering: Lowering) -> bool:
    """Tell whether layers have prices alone: one form for all streams, with one rounding at most."""
    forms = lowering.forms
    return len(forms) == 1 and not forms[0].narrow and forms[0].packing == PLAIN


def plot_table(table: LatencyTable, path: Path) -> None:
    """Draw the hardware's steps: the time of the network's heaviest convolution over its widths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    for line in table.lines:
        side, other = ("inputs", "outputs") if line["axis"] == 0 else ("outputs", "inputs")
        label = f"{side}, with {line['other']} {other}"
        axes.plot(line["widths"], [1e3 * ms for ms in line["ms"]], "o-", markersize=3, label=label)
    for width in range(table.step, LINE_WIDTHS[-1] + 1, table.step):
        axes.axvline(width, color="grey", linewidth=0.5)
    axes.set(xlabel="channels", ylabel="microseconds", ylim=(0, None))
    if table.lines:
        axes.set_title(f"{table.lines[0]['kind']}: steps of {table.step}", fontsize=10)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def fit(table: LatencyTable, network: Network, measured: list[tuple[ChannelPlan, float]]) -> LatencyTable:
    """Return the table with the scales and the constant under which it predicts whole networks best.

    Least squares of relative errors, held to the measured prices by the weight of one network: few networks
    do not tell apart what all of them have. The checks are of fits without the network that they check.
    """
    counter = LatencyCounter(network, table)
    parts = [counter.priced.parts(counter.widths(plan.kept), stepped=True) for plan, _ in measured]
    rows = np.array([[float(layers), float(rest), 1.0] for layers, rest in parts])
    ms = np.array([latency for _, latency in measured])

    def solve(chosen: np.ndarray) -> np.ndarray:
        a, b = rows[chosen] / ms[chosen, None], np.ones(int(chosen.sum()))
        prior = np.diag([0.1, 0.1, 0.1 / float(ms.min())])
        found: np.ndarray = np.linalg.lstsq(
            np.vstack([a, prior]), np.concatenate([b, prior @ np.array([1.0, 1.0, 0.0])]), rcond=None
        )[0]
        return found

    everything = np.ones(len(ms), dtype=bool)
    without = [np.arange(len(ms)) != i for i in range(len(ms))]
    checks = tuple((float(rows[i] @ solve(chosen)), float(ms[i])) for i, chosen in enumerate(without))
    layer_scale, rest_scale, constant_ms = map(float, solve(everything))
    return dataclasses.replace(
        table, layer_scale=layer_scale, rest_scale=rest_scale, constant_ms=constant_ms, checks=checks
    )


def _lines(prober: Prober, largest: dict[Kind, tuple[int, ...]]) -> list[dict[str, Any]]:
    """Measure the steps along inputs and outputs of the convolution with the most work."""
    convolutions = {kind: widths for kind, widths in largest.items() if kind.op == "conv" and kind.groups == 1}
    wide = {kind: widths for kind, widths in convolutions.items() if min(widths) >= 16}
    if not wide:
        return []
    kind = max(wide, key=lambda k: np.prod(k.kernel) * np.prod(k.shape) * np.prod(wide[k]) / k.stride**2)
    return [prober.line(kind, axis, min(64, wide[kind][1 - axis])) for axis in (0, 1)]


def _engine_prices(
    prober: Prober, network: Network, largest: dict[Kind, tuple[int, ...]], lowering: Lowering
) -> dict[str, Prices]:
    """Price the operations by the layers of engines of random plans.

    All that is not a layer is priced by the values that it goes over, at one rate; what TensorRT fuses at 0.
    """
    plans = _random_plans(network, tuple(np.geomspace(1, min(SHARES), ENGINES)), first_seed=len(SHARES))
    samples, rests = list[Sample](), list[float]()

    def read(files: list[Path], found: list[Measurement]) -> None:
        for file, measured in zip(files, found, strict=True):
            assert measured.layers_ms is not None
            own, rest = layer_samples(file, measured.layers_ms, largest)
            samples.extend(own)
            rests.append(rest)

    _benched(prober, network, [(plan, lowering) for plan in plans], read, layers=True)
    prices = fitted_prices(samples, largest)
    for kind, widths in largest.items():
        per_value = 1.0 if kind.op not in ("handover", *LAYERS) else 0.0
        if str(kind) not in prices:
            axes = tuple((0, *knots(n)) for n in widths)
            values = np.multiply.outer(np.ones(len(axes[0])), axes[-1]) if len(axes) > 1 else np.array(axes[0], float)
            prices[str(kind)] = Prices(widths=axes, ms=tuple(per_value * np.prod(kind.shape) * values.ravel()))
    unit = LatencyTable(
        lowering=lowering, rounding=max(4, *(form.rounding for form in lowering.forms)), step=4, prices=prices
    )
    counter = LatencyCounter(network, unit)
    gone_over = sum(float(counter.priced.parts(counter.widths(plan.kept), stepped=True)[1]) for plan in plans)
    rate = sum(rests) / gone_over if gone_over else 0.0
    return {
        text: price
        if Kind.parse(text).op in LAYERS
        else dataclasses.replace(price, ms=tuple(round(rate * ms, 9) for ms in price.ms))
        for text, price in prices.items()
    }


def _faster(prober: Prober, network: Network, lowerings: tuple[Lowering, ...]) -> Lowering:
    """Return the form in which random plans of the network run faster, by the geometric mean over their sizes."""
    pairs = [(plan, lowering) for lowering in lowerings for plan in _random_plans(network, TRIED)]
    found = np.log(_measured(prober, network, pairs)).reshape(len(lowerings), len(TRIED)).mean(1)
    return lowerings[int(found.argmin())]


def _whole(prober: Prober, network: Network, lowering: Lowering) -> list[tuple[ChannelPlan, float]]:
    """Measure random plans of the network, the whole network among them."""
    plans = _random_plans(network, SHARES)
    return list(zip(plans, _measured(prober, network, [(plan, lowering) for plan in plans]), strict=True))


def _random_plans(network: Network, shares: tuple[float, ...], first_seed: int = 0) -> list[ChannelPlan]:
    """Return random plans of shares of the network's volume."""
    layout, volume = GateLayout(network), count(network).volume
    limits = [max(share * volume, smallest_cost(layout, "volume")) for share in shares]
    return [random_plan(layout, "volume", limit, seed) for seed, limit in enumerate(limits, first_seed)]


def _measured(prober: Prober, network: Network, forms: list[tuple[ChannelPlan, Lowering]]) -> list[float]:
    """Return the ms of the network, sliced by plans and lowered, interleaved."""
    found: list[float] = []
    _benched(prober, network, forms, lambda _, measured: found.extend(map(undisturbed_ms, measured)))
    return found


def _benched(
    prober: Prober,
    network: Network,
    forms: list[tuple[ChannelPlan, Lowering]],
    read: Callable[[list[Path], list[Measurement]], None],
    **options: Any,
) -> None:
    """Measure the network, sliced by plans and lowered, interleaved; files and measurements are read before they go."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.onnx" for i in range(len(forms))]
        for (plan, lowering), file in zip(forms, files, strict=True):
            export_plan(network, plan, lowering, file)
        found = bench_onnx(files, seconds=CHECK_S, **prober.options, **options)
        prober.environment = prober.environment or found[0].environment
        read(files, found)
