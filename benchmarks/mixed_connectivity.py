"""Is mixed connectivity faster than every other way to run the same network? Whole files, interleaved, medians.

Per cell (network, factor of the volume, seed of the mask; or a learned plan) and per runtime and number of
threads: "ours" is chosen among the candidates of `--lowering auto` in one measurement and judged in another,
in turn with the regular form, the literal one (paper) and first-write order with ScatterND, then with the
dense network. The masks are those of benchmarks/masks.py. Resumable: what results/mixed_connectivity.json
holds is not measured again; each processor has a folder of results. Run: python -m benchmarks.mixed_connectivity
[--results DIR] [--cells wrn-28-12] [--files DIR [--prepare]]
[--table|--profile|--low [--seeds 3]|--modules|--full-width]
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bar_edge.bench import bench_onnx, compare
from bar_edge.bench.statistics import median_ms
from bar_edge.files import read_json, write_json
from bar_edge.lowering.lower import lower
from bar_edge.lowering.widen import regular_form
from bar_edge.models import build
from bar_edge.network import Network, count, trace
from bar_edge.network.counted_cost import count_executed
from bar_edge.records.lowering import Lowering
from bar_edge.runs.run_folder import versions
from bar_edge.surgery import slice_network
from bar_edge.targets.convert import for_speed
from bar_edge.targets.form_search import choose_lowering
from bar_edge.targets.onnx.file import export_onnx
from bar_edge.targets.table import TARGETS
from bar_edge.targets.target import MEASURED_IN, faster_recipe
from benchmarks.masks import CELLS, uneven_plan

HERE = Path(__file__).parent / "results"
OTHERS = ("regular", "paper", "scatter")
#: (runtime, precision) -> forms that `--lowering auto` tries
CANDIDATES = {
    (target.runtime, precision): tuple(map(str, forms.candidates))
    for target in TARGETS.values()
    if target.runtime is not None
    for precision, forms in target.forms.items()
}
#: learned plans of the CIFAR-10 runs: folder -> dense network's folder
LEARNED = {
    "resnet20_bar2_s0": "resnet20_dense_s0",
    "resnet20_bar4_s0": "resnet20_dense_s0",
    "wrn-10-2_bar4_s0": "wrn-10-2_dense_s0",
}
CHOOSE_S, JUDGE_S, DENSE_S = 0.3, 0.8, 0.8
#: of trying forms in a low precision: what `export` takes by default
LOW_S = 60.0


def cells() -> Iterator[tuple[str, str, int, int]]:
    """Yield name, network, factor and seed: learned plans first, then all networks seed by seed."""
    for learned in LEARNED:
        yield learned, learned, 0, 0
    for seed in range(max(len(seeds) for _, _, seeds in CELLS.values())):
        for model, (_, factors, seeds) in CELLS.items():
            for factor in factors:
                if seed in seeds:
                    yield f"{model} {factor}x seed {seed}", model, factor, seed


def networks(model: str, factor: int, seed: int) -> tuple[Network, Network]:
    """Return the dense and the sliced network of a cell."""
    if model in LEARNED:
        folder = HERE / "cifar10"
        return Network.load(folder / LEARNED[model] / "network"), Network.load(folder / model / "network")
    torch.manual_seed(0)
    shape = CELLS[model][0]
    dense = trace(build(model, input_shape=shape, classes=10).eval(), torch.zeros(2, *shape))
    return dense, slice_network(dense, uneven_plan(dense, factor, seed))


def prepare(folder: Path, model: str, factor: int, seed: int) -> tuple[dict[str, Path], dict[str, Any]]:
    """Export one cell in every form, and the dense network; return the files and what was counted."""
    folder.mkdir(parents=True, exist_ok=True)
    forms = dict.fromkeys(
        [*OTHERS, *(c for (_, precision), names in CANDIDATES.items() for c in names if precision == "fp32")]
    )
    files = {form: folder / f"{form.replace(':', '_')}.onnx" for form in forms}
    files["dense"] = folder.parent / f"{LEARNED.get(model, model)}-dense.onnx"
    counted = folder / "counted.json"
    if not counted.is_file():
        dense, sliced = networks(model, factor, seed)
        executed = {}
        for form, file in files.items():
            lowered = dense if form == "dense" else lower(sliced, Lowering.parse(form))
            executed[form] = count_executed(lowered).flops if form != "dense" else count(dense).flops
            if form != "dense" or not file.is_file():
                export_onnx(lowered, sliced.input_shapes, file)
        flops = {**executed, "sliced": count(sliced).flops}
        write_json(counted, {"flops": flops, "volume": {"dense": count(dense).volume, "sliced": count(sliced).volume}})
    return files, read_json(counted)


def measure(files: dict[str, Path], seed: int) -> dict[str, Any]:
    """Measure one cell on every runtime; two threads only for the first three seeds."""
    found = {}
    for (runtime, precision), candidates in CANDIDATES.items():
        if precision != "fp32":
            continue
        for threads in (1, 2) if seed < 3 else (1,):
            options: dict[str, Any] = {"runtime": runtime, "threads": threads, "seed": seed}
            tried = bench_onnx([files[c] for c in candidates], seconds=CHOOSE_S, **options)
            tried_ms = dict(zip(candidates, map(median_ms, tried), strict=True))
            best = min(candidates, key=tried_ms.__getitem__)
            last = dict.fromkeys([best, "regular"])  # as `auto` does in the end
            again = map(median_ms, bench_onnx([files[form] for form in last], seconds=CHOOSE_S, **options))
            ours = min(zip(again, last, strict=True))[1]
            names = list(dict.fromkeys([ours, *OTHERS]))
            judged = dict(zip(names, bench_onnx([files[n] for n in names], seconds=JUDGE_S, **options), strict=True))
            pair = bench_onnx([files["dense"], files[ours]], seconds=DENSE_S, **options)
            found[f"{runtime} {threads}"] = {
                "ours": ours,
                "ours_ms": median_ms(judged[ours]),
                "tried_ms": tried_ms,
                "quartiles_ms": {n: np.percentile(m.samples_ms, [25, 50, 75]).tolist() for n, m in judged.items()},
                "against": {name: _ratio(compare(judged[ours], judged[name])) for name in OTHERS if name != ours}
                | {"dense": _ratio(compare(pair[1], pair[0]))},
                "dense_ms": median_ms(pair[0]),
                "runs": len(judged[ours].samples_ms),
            }
    return {"runtimes": found, "environment": tried[0].environment}


def _ratio(found: Any) -> list[float]:
    return [round(x, 4) for x in (found.speedup, found.low, found.high)]


def table(results: dict[str, Any]) -> str:
    """Return geometric means of the speed-ups per network, factor, runtime and threads, as Markdown."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for name, cell in results["cells"].items():
        for runtime, found in cell["runtimes"].items():
            groups[name.partition(" seed")[0], runtime].append(found)
    lines = [
        "| network | runtime, threads | n | dense ms | ours ms | x dense | x regular | x paper | x ScatterND "
        "| worst x regular | ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, runtime), group in groups.items():
        means = {other: _geometric([g["against"].get(other, [1.0])[0] for g in group]) for other in ("dense", *OTHERS)}
        worst = min(g["against"].get("regular", [1.0])[0] for g in group)
        forms = ", ".join(f"{form} {n}" for form, n in collections.Counter(g["ours"] for g in group).most_common(3))
        dense, ours = (_geometric([g[key] for g in group]) for key in ("dense_ms", "ours_ms"))
        lines.append(
            f"| {name} | {runtime} | {len(group)} | {dense:.2f} | {ours:.3f} | {means['dense']:.1f} "
            f"| {means['regular']:.2f} | {means['paper']:.2f} | {means['scatter']:.2f} | {worst:.2f} | {forms} |"
        )
    return "\n".join(lines)


def _geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot the speed-up over the regular form per cell, one panel per runtime with one thread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runtimes = [runtime for runtime, precision in CANDIDATES if precision == "fp32"]
    figure, axes = plt.subplots(1, len(runtimes), figsize=(11, 4), sharey=True)
    for axis, runtime in zip(axes, runtimes, strict=True):
        groups: dict[str, list[float]] = collections.defaultdict(list)
        for name, cell in results["cells"].items():
            found = cell["runtimes"].get(f"{runtime} 1")
            if found:
                groups[name.partition(" seed")[0]].append(found["against"].get("regular", [1.0])[0])
        for i, values in enumerate(groups.values()):
            axis.plot([i] * len(values), values, "o", alpha=0.5, color="tab:blue")
        axis.axhline(1, color="grey", linewidth=1)
        axis.set_xticks(range(len(groups)), list(groups), rotation=75, ha="right", fontsize=7)
        axis.set_title(f"{runtime}, 1 thread")
    axes[0].set_ylabel("times faster than regular")
    figure.tight_layout()
    figure.savefig(path)


def operator_times_us(file: Path, runs: int = 300) -> dict[str, float]:
    """Return the median time per inference of every operator type in ONNX Runtime's own profile, one thread."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        first = session.get_inputs()[0]
        image = np.random.default_rng(0).standard_normal((1, *first.shape[1:]), np.float32)
        for _ in range(runs):
            session.run(None, {first.name: image})
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"], event["args"]["op_name"]].append(event["dur"])
    total = collections.defaultdict[str, float](float)
    for (_, operator), found in times.items():
        total[operator] += float(np.median(found))
    return total


def profile(folder: Path) -> str:
    """Return where the time goes before (regular, paper) and after (ours), for three networks, as Markdown."""
    lines = []
    for model, factor in (("wrn-28-12", 16), ("wrn-28-12", 8), ("resnet56", 4)):
        files, counted = prepare(folder / f"{model}_{factor}x_seed_0", model, factor, 0)
        forms = ("dense", "regular", "paper", "slices:4", "gather:4", "pointwise:16")
        columns = {form: operator_times_us(files[form], 20 if form == "dense" else 300) for form in forms}
        ideal = counted["flops"]["sliced"] / counted["flops"]["dense"] * sum(columns["dense"].values())
        operators = sorted({o for c in columns.values() for o in c}, key=lambda o: -columns["paper"].get(o, 0))
        lines += [f"\n{model} at {factor}x, seed 0, microseconds per inference\n"]
        lines += ["| operator | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for operator in operators:
            lines.append(f"| {operator} | " + " | ".join(f"{c.get(operator, 0):.0f}" for c in columns.values()) + " |")
        totals = [sum(c.values()) for c in columns.values()]
        convolutions = [c.get("Conv", 0) + c.get("FusedConv", 0) for c in columns.values()]
        floor = [total / least for total, least in zip(totals, convolutions, strict=True)]
        for name, row, digits in (
            ("all nodes", totals, 0),
            ("all / convolutions", floor, 2),
            ("all / counted FLOPs at the dense rate", [total / ideal for total in totals], 2),
        ):
            lines.append(f"| {name} | " + " | ".join(f"{x:.{digits}f}" for x in row) + " |")
    return "\n".join(lines)


def low_precision(results: Path, model: str, seeds: range) -> str:
    """Return what `--lowering auto` makes of networks at 4x and 16x in bf16 and INT8, as Markdown; measure one of them.

    INT8 is calibrated on noise, for speed. Resumable; what was measured lies in the results.
    """
    rows: list[dict[str, Any]] = read_json(results)["rows"] if results.is_file() else []
    for seed in seeds:
        for factor in (4, 16):
            for runtime, precision in CANDIDATES:
                key = {"network": model, "runtime": runtime, "precision": precision, "factor": factor, "seed": seed}
                if precision == "fp32" or any(key.items() <= row.items() for row in rows):
                    continue
                dense, sliced = networks(model, factor, seed)
                target = next(row for row in TARGETS.values() if row.runtime == runtime)
                recipe = (
                    faster_recipe(target, sliced, runtime=runtime, lowering=MEASURED_IN, threads=1)
                    if precision == "int8"
                    else None
                )
                convert = for_speed(precision, recipe)
                found = choose_lowering(
                    sliced, dense, runtime=runtime, precision=precision, seconds=LOW_S, convert=convert
                )
                rows.append({**key, "recipe": recipe.name if recipe else None, **found.to_json()})
                write_json(results, {"rows": rows, "versions": versions()})
    lines = [
        "| network | runtime, precision | seed | recipe | ours | ours ms | x regular | x dense |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        regular, dense = (row[f"{name}_ms"] / row["chosen_ms"] for name in ("regular", "dense"))
        lines.append(
            f"| {row['network']} {row['factor']}x | {row['runtime']}, {row['precision']} | {row['seed']} "
            f"| {row['recipe'] or ''} | {row['lowering']} | {row['chosen_ms']:.3f} | {regular:.2f} | {dense:.1f} |"
        )
    return "\n".join(lines)


def full_width(seeds: range = range(3)) -> str:
    """Return wrn-28-12 against a stream at its full width (stem and shortcuts whole), literally, as Markdown.

    That is what a block with gather and scatter-add costs if nothing but the blocks is sliced.
    """
    lines = [
        "| factor | seed | full-width, literal ms | regular ms | gather:4 ms | x full width | x regular |",
        "|---" * 7 + "|",
    ]
    for factor in (8, 16):
        for seed in seeds:
            dense, sliced = networks("wrn-28-12", factor, seed)
            plan = uneven_plan(dense, factor, seed)
            whole = {
                name: tuple(range(len(dense.body.get_parameter(f"{name}.weight"))))
                if name == "conv1" or "shortcut" in name
                else ids
                for name, ids in plan.kept.items()
            }
            naive = slice_network(dense, dataclasses.replace(plan, kept=whole))
            with tempfile.TemporaryDirectory() as folder:
                files = [Path(folder) / f"{name}.onnx" for name in ("naive", "regular", "ours")]
                for file, (form, lowering) in zip(
                    files, ((naive, "paper"), (sliced, "regular"), (sliced, "gather:4")), strict=True
                ):
                    export_onnx(lower(form, Lowering.parse(lowering)), dense.input_shapes, file)
                a, b, c = bench_onnx(files, seconds=JUDGE_S)
            lines.append(
                f"| {factor}x | {seed} | {median_ms(a):.3f} | {median_ms(b):.3f} | {median_ms(c):.3f} "
                f"| {compare(c, a).speedup:.2f} | {compare(c, b).speedup:.2f} |"
            )
    return "\n".join(lines)


def modules() -> str:
    """Return the plain nn.Modules in torch, eager and compiled, batch 1, one thread, as Markdown."""
    torch.set_num_threads(1)
    image = torch.randn(1, 3, 32, 32)
    lines = [
        "| wrn-28-12 | regular, eager ms | sliced, eager ms | ratio | compiled ms | compiled ms | ratio |",
        "|---" * 7 + "|",
    ]
    for factor in (4, 8, 16):
        _, sliced = networks("wrn-28-12", factor, 0)
        pair: list[Callable[..., Any]] = [regular_form(sliced).eval(), sliced.eval()]
        cells = []
        for forms in (pair, [torch.compile(module) for module in pair]):
            samples: list[list[float]] = [[], []]
            with torch.no_grad():
                for step in range(110):
                    for form, found in zip(forms, samples, strict=True):
                        start = time.perf_counter()
                        form(image)
                        if step >= 10:
                            found.append(1e3 * (time.perf_counter() - start))
            regular, ours = (float(np.median(found)) for found in samples)
            cells += [f"{regular:.2f}", f"{ours:.2f}", f"{regular / ours:.2f}"]
        lines.append(f"| {factor}x | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what the options ask for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cells", default="", help="only cells of this name, as in `wrn-28-12` or `wrn-28-12 8x seed 0`"
    )
    parser.add_argument("--results", type=Path, default=HERE, help="folder of the results on this processor")
    parser.add_argument("--files", type=Path, help="folder that keeps the exported files")
    parser.add_argument("--prepare", action="store_true", help="only export, to measure later on a quiet machine")
    parser.add_argument("--table", action="store_true", help="only print the table and the plot")
    parser.add_argument("--profile", action="store_true", help="only print where the time goes")
    parser.add_argument(
        "--low", action="store_true", help="only measure bf16 and INT8, of wrn-28-12 or --cells NETWORK"
    )
    parser.add_argument("--seeds", type=int, default=3, help="masks per cell of --low")
    parser.add_argument("--modules", action="store_true", help="only measure the nn.Modules in torch")
    parser.add_argument("--full-width", action="store_true", help="only measure the stream at its full width")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    if options.low:
        low = options.results / "mixed_connectivity_low.json"
        print(low_precision(low, options.cells or "wrn-28-12", range(options.seeds)))
    elif options.modules:
        print(modules())
    elif options.full_width:
        print(full_width())
    elif options.profile:
        with tempfile.TemporaryDirectory() as temporary:
            print(profile(options.files or Path(temporary)))
    else:
        whole_files(options)


def whole_files(options: argparse.Namespace) -> None:
    """Measure the cells that are missing, write JSON and plot, print the table."""
    path = options.results / "mixed_connectivity.json"
    results: dict[str, Any] = read_json(path) if path.is_file() else {"cells": {}, "versions": versions()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.files or Path(temporary)
        for name, model, factor, seed in cells():
            asked = not options.cells or f"{name} ".startswith(f"{options.cells} ")
            if options.table or name in results["cells"] or not asked:
                continue
            files, counted = prepare(folder / name.replace(" ", "_"), model, factor, seed)
            if options.prepare:
                continue
            results["cells"][name] = {**measure(files, seed), **counted, "load": os.getloadavg()[0]}
            write_json(path, results)
            first = results["cells"][name]["runtimes"]["onnxruntime-cpu 1"]
            print(name, first["ours"], f"{first['ours_ms']:.3f} ms", first["against"], flush=True)
    plot(results, path.with_suffix(".svg"))
    print(table(results))


if __name__ == "__main__":
    main()
