"""Networks that bar-edge has never seen: what can be pruned, how exact surgery is, how long it takes.

    python benchmarks/any_cnn.py
    python benchmarks/any_cnn.py --onnx --beside densenet121 unet

For every network of tests/architectures.py at its published width and input: seconds to trace, to plan (4x FLOPs,
random order) and to slice; the prunable share; and, float64 with random masks at 25, 50 and 90 % on narrow
copies, the largest difference between the sliced network and the user's own module under masks. --onnx
also exports the sliced narrow network and runs it in ONNX Runtime and, where it is installed, OpenVINO; --beside
times Torch-Pruning (pip install torch-pruning) on the same published networks.
An interrupted run goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the architectures and the reference are the tests'
from bar_edge.export.lowering import lower
from bar_edge.export.onnx import export_onnx
from bar_edge.export.parity import cpu_session
from bar_edge.methods import GateLayout, random_plan, smallest_cost
from bar_edge.network import count, trace
from bar_edge.records import ChannelPlan, read_json, write_json
from bar_edge.run import versions
from bar_edge.surgery import relative_difference, slice_network
from tests.architectures import ARCHITECTURES
from tests.meaning import masked_answer
from tests.reference import contrasting, randomise

REMOVED = (0.25, 0.5, 0.9)


def published(name: str) -> dict[str, Any]:
    """Return times and prunable shares of a network at its published width and input."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    module = architecture.build(1.0).eval()
    start = time.perf_counter()
    network = trace(module, torch.zeros(2, *architecture.input_shape))
    traced = time.perf_counter()
    layout, full = GateLayout(network), count(network)
    plan = random_plan(layout, "flops", full.flops / 4, seed=0)
    planned = time.perf_counter()
    sliced = slice_network(network, plan)
    done = time.perf_counter()
    return {
        "params": full.params,
        "flops": full.flops,
        "layers": len(layout.offsets),
        "prunable_flops": 1 - smallest_cost(layout, "flops") / full.flops,
        "prunable_volume": 1 - smallest_cost(layout, "volume") / full.volume,
        "without_rule": sum(passage.kind == "opaque" for passage in layout.found.values()),
        "flops_factor": full.flops / count(sliced).flops,
        "trace_s": traced - start,
        "plan_s": planned - traced,
        "slice_s": done - planned,
    }


def beside(name: str) -> dict[str, Any]:
    """Return what Torch-Pruning takes to build its graph of the same network and to prune half of every layer."""
    import torch_pruning

    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    module, example = architecture.build(1.0).eval(), torch.zeros(1, *architecture.input_shape)
    start = time.perf_counter()
    try:
        torch_pruning.DependencyGraph().build_dependency(module, example_inputs=example)
        built = time.perf_counter()
        importance = torch_pruning.importance.RandomImportance()
        torch_pruning.pruner.MagnitudePruner(module, example, importance=importance, pruning_ratio=0.5).step()
        done = time.perf_counter()
        with torch.no_grad():
            module(example)
    except Exception as error:  # whatever another tool stumbles over is its answer
        return {"torch_pruning": {"error": f"{type(error).__name__}: {error}"[:200]}}
    return {"torch_pruning": {"graph_s": built - start, "prune_s": done - built}}


def exact(name: str) -> dict[str, Any]:
    """Return the largest difference of sliced and masked narrow networks, float64."""
    architecture = ARCHITECTURES[name]
    differences = {}
    for removed in REMOVED:
        torch.manual_seed(0)
        module = randomise(architecture.build(0.25).double().eval(), seed=1, removed=removed)
        network = trace(module, torch.zeros(2, *architecture.small_shape, dtype=torch.float64))
        images, plan = contrasting(2, *architecture.small_shape), masks(network, removed)
        with torch.no_grad():
            answer = slice_network(network, plan)(images)
        differences[f"{removed:.0%}"] = relative_difference(masked_answer(module, plan.kept, images), answer)
    return {"difference": differences}


def masks(network: Any, removed: float) -> ChannelPlan:
    """Return a plan with a share of every layer's channels removed at random."""
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for layer, (_, n) in GateLayout(network).offsets.items():
        chosen = torch.randperm(n, generator=generator)[: max(1, round((1 - removed) * n))]
        kept[layer] = tuple(sorted(chosen.tolist()))
    return ChannelPlan(network=network.fingerprint, kept=kept)


def onnx(name: str) -> dict[str, Any]:
    """Return the difference of the exported sliced narrow network from torch, per runtime, float32."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    module = randomise(architecture.build(0.25).eval(), seed=1, removed=0.5)
    network = trace(module, torch.zeros(2, *architecture.small_shape))
    sliced = slice_network(network, masks(network, 0.5))
    images = contrasting(2, *architecture.small_shape).float()
    with torch.no_grad():
        expected = [t.numpy() for t in torch.utils._pytree.tree_leaves(sliced(images))]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(lower(sliced, "slices"), (architecture.small_shape,), file)
        session = cpu_session(file)
        found["onnxruntime"] = apart(expected, session.run(None, {session.get_inputs()[0].name: images.numpy()}))
        if importlib.util.find_spec("openvino"):
            import openvino

            compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            found["openvino"] = apart(expected, list(compiled([images.numpy()]).values()))
    return {"onnx": found}


def apart(expected: list[np.ndarray], got: list[np.ndarray]) -> float:
    """Return max |a - b| / max |a| over all outputs."""
    scale = max(float(np.abs(a).max()) for a in expected)
    return max(float(np.abs(a - b).max()) for a, b in zip(expected, got, strict=True)) / scale


def table(found: dict[str, Any]) -> str:
    """Write the results as a Markdown table."""
    head = ["network", "parameters", "FLOPs", "prunable", "no rule", "trace, plan, slice (s)", "difference", "ONNX"]
    lines = [f"| {' | '.join([*head, 'Torch-Pruning: graph, prune (s)'])} |", "| --- |" + " ---: |" * len(head)]
    for name, row in found["networks"].items():
        seconds = ", ".join(f"{row[k]:.2f}" for k in ("trace_s", "plan_s", "slice_s"))
        files = ", ".join(f"{error:.0e}" for error in row.get("onnx", {}).values()) or "not run"
        other = row.get("torch_pruning", {})
        theirs = (
            f"{other['graph_s']:.2f}, {other['prune_s']:.2f}" if "graph_s" in other else other.get("error", "not run")
        )
        lines.append(
            f"| {name} | {row['params'] / 1e6:.2f} M | {row['flops'] / 1e9:.2f} G | {row['prunable_flops']:.1%} | "
            f"{row['without_rule']} | {seconds} | {max(row['difference'].values()):.0e} | {files} | {theirs} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what the output file does not hold yet, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help=f"default: all of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/any_cnn.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = read_json(options.out) if options.out.is_file() else {"networks": {}}
    found["versions"], found["threads"] = versions(), 1
    for name in options.networks or ARCHITECTURES:
        row = found["networks"].setdefault(name, {})
        stages = {"trace_s": published, "difference": exact}
        stages |= ({"onnx": onnx} if options.onnx else {}) | ({"torch_pruning": beside} if options.beside else {})
        for key, stage in stages.items():
            if key not in row:
                row |= stage(name)
                write_json(options.out, found)
        print(name, json.dumps(row), flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
