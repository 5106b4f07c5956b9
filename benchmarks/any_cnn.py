"""Networks that bar-edge has never seen: what can be pruned, how exact surgery is, how long it takes.

    python benchmarks/any_cnn.py
    python benchmarks/any_cnn.py --onnx --beside densenet121 unet

For every network of the zoo and of tests/network/architectures.py at its published width and input: seconds to trace,
to plan (4x FLOPs, random order) and to slice (one thread, the median of three; CPU time, and wall time of all three
stages together: run it on an idle machine), the prunable share, and
the memory that slicing adds at its peak when nothing is removed, as a multiple of the weights (Linux only); and,
float64 with random masks at 25, 50 and 90 % on narrow copies, the largest difference between the sliced network
and the user's own module under masks. --onnx also exports the sliced narrow network, zero-filled, and runs it in
ONNX Runtime and, where it is installed, OpenVINO; --beside times Torch-Pruning (pip install torch-pruning) on
the same published networks. An interrupted run goes on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import functools
import gc
import importlib.util
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the architectures and the reference are the tests'
from bar_edge.files import read_json, write_json
from bar_edge.lowering.lower import lower
from bar_edge.methods import GateLayout, random_plan, smallest_cost
from bar_edge.models import build
from bar_edge.network import Network, count, trace
from bar_edge.records import ChannelPlan
from bar_edge.records.lowering import Lowering
from bar_edge.runs.run_folder import versions
from bar_edge.surgery import relative_difference, slice_network
from bar_edge.targets.onnx.file import export_onnx
from bar_edge.targets.onnx.parity import cpu_session
from tests.meaning import masked_answer
from tests.network.architectures import ARCHITECTURES, Architecture
from tests.reference import contrasting, randomise

REMOVED = (0.25, 0.5, 0.9)
REPEATS = 3


def of_zoo(name: str, shape: tuple[int, int, int], small: tuple[int, int, int]) -> Architecture:
    """Return the row of a network of the zoo."""

    def width(share: float) -> Any:
        return build(name, input_shape=shape, classes=10 if shape[1] < 64 else 1000, model_args=(f"width={share}",))

    return Architecture(build=width, input_shape=shape, small_shape=small, kind="plain")


IMAGE, CIFAR = (3, 224, 224), (3, 32, 32)
NETWORKS = {
    **{name: of_zoo(name, CIFAR, CIFAR) for name in ("resnet20", "resnet56", "wrn-28-12", "vgg16", "mobilenetv2")},
    **{name: of_zoo(name, IMAGE, (3, 64, 64)) for name in ("resnet18", "resnet50")},
    **ARCHITECTURES,
}


def published(name: str) -> dict[str, Any]:
    """Return times and prunable shares of a network at its published width and input."""
    architecture = NETWORKS[name]
    torch.manual_seed(0)
    module = architecture.build(1.0).eval()
    seconds: dict[str, list[float]] = {"trace_s": [], "plan_s": [], "slice_s": [], "wall_s": []}
    for _ in range(REPEATS):
        wall, start = time.perf_counter(), time.process_time()
        network = trace(module, torch.zeros(2, *architecture.input_shape))
        traced = time.process_time()
        layout, full = GateLayout(network), count(network)
        plan = random_plan(layout, "flops", full.flops / 4, seed=0)
        planned = time.process_time()
        sliced = slice_network(network, plan)
        done, wall = time.process_time(), time.perf_counter() - wall
        for stage, each in zip(seconds, (traced - start, planned - traced, done - planned, wall), strict=True):
            seconds[stage].append(each)
    return {
        "params": full.params,
        "flops": full.flops,
        "layers": len(layout.offsets),
        "prunable_flops": 1 - smallest_cost(layout, "flops") / full.flops,
        "prunable_volume": 1 - smallest_cost(layout, "volume") / full.volume,
        "without_rule": sum(passage.kind == "opaque" for passage in layout.found.values()),
        "flops_factor": full.flops / count(sliced).flops,
        "all_s": seconds,
        **{stage: statistics.median(each) for stage, each in seconds.items()},
        **memory(network),
    }


def memory(network: Network) -> dict[str, Any]:
    """Return the memory that slicing adds at its peak when nothing is removed, beside that of the weights."""
    plan = ChannelPlan(network=network.fingerprint, kept={})
    weights = sum(t.numel() * t.element_size() for t in network.body.state_dict().values())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free does not count as there
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    slice_network(network, plan)
    return {"memory": {"weights_mb": weights / 1e6, "added_mb": (resident("VmHWM") - before) / 1e6}}


def resident(field: str) -> int:
    """Return a field of this process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def in_process(function: Any, *arguments: Any) -> Any:
    """Return what a function returns in a fresh process; an error where that crashes."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        1, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    )
    with pool:
        return pool.submit(function, *arguments).result()


def beside(name: str) -> dict[str, Any]:
    """Return what Torch-Pruning takes to build its graph of the same network and to prune half of every layer."""
    import torch_pruning

    architecture = NETWORKS[name]
    graph_s, prune_s = [], []
    for _ in range(REPEATS):
        torch.manual_seed(0)
        module, example = architecture.build(1.0).eval(), torch.zeros(1, *architecture.input_shape)
        start = time.process_time()
        try:
            torch_pruning.DependencyGraph().build_dependency(module, example_inputs=example)
            built = time.process_time()
            importance = torch_pruning.importance.RandomImportance()
            torch_pruning.pruner.MagnitudePruner(module, example, importance=importance, pruning_ratio=0.5).step()
            done = time.process_time()
            with torch.no_grad():
                module(example)
        except Exception as error:  # whatever another tool stumbles over is its answer
            return {"torch_pruning": {"error": f"{type(error).__name__}: {error}"[:200]}}
        graph_s.append(built - start)
        prune_s.append(done - built)
    return {"torch_pruning": {"graph_s": statistics.median(graph_s), "prune_s": statistics.median(prune_s)}}


def exact(name: str) -> dict[str, Any]:
    """Return the largest difference of sliced and masked narrow networks, float64."""
    architecture = NETWORKS[name]
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
    architecture = NETWORKS[name]
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
        start = time.process_time()
        export_onnx(lower(sliced, Lowering.parse("zero-filled")), (architecture.small_shape,), file)
        found["export_s"] = time.process_time() - start
        session = cpu_session(file)
        found["onnxruntime"] = apart(expected, session.run(None, {session.get_inputs()[0].name: images.numpy()}))
        if importlib.util.find_spec("openvino"):
            try:
                found["openvino"] = apart(expected, in_process(openvino_answers, file, images.numpy()))
            except Exception as error:  # what it does not take, or crashes over, is its answer
                found["openvino"] = f"{type(error).__name__}: {error}"[:200]
    return {"onnx": found}


def openvino_answers(file: Path, images: np.ndarray) -> list[np.ndarray]:
    """Return the answers of OpenVINO on the CPU in float32."""
    import openvino

    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.array(answer) for answer in compiled([images]).values()]


def apart(expected: list[np.ndarray], got: list[np.ndarray]) -> float:
    """Return max |a - b| / max |a| over all outputs."""
    scale = max(float(np.abs(a).max()) for a in expected)
    return max(float(np.abs(a - b).max()) for a, b in zip(expected, got, strict=True)) / scale


def table(found: dict[str, Any]) -> str:
    """Write the results as a Markdown table."""
    head = ["network", "parameters", "FLOPs", "prunable", "no rule", "trace, plan, slice; wall (s)", "memory"]
    head += ["difference", "ONNX Runtime", "OpenVINO", "Torch-Pruning: graph, prune (s)"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name in NETWORKS:
        row = found["networks"].get(name, {})
        if "trace_s" not in row:
            continue
        seconds = ", ".join(f"{row[k]:.2f}" for k in ("trace_s", "plan_s", "slice_s")) + f"; {row['wall_s']:.2f}"
        files, other = row.get("onnx", {}), row.get("torch_pruning", {"error": "not run"})
        cells = [
            name,
            f"{row['params'] / 1e6:.2f} M",
            f"{row['flops'] / 1e9:.2f} G",
            f"{row['prunable_flops']:.1%}",
            str(row["without_rule"]),
            seconds,
            f"{row['memory']['added_mb'] / row['memory']['weights_mb']:.2f} of {row['memory']['weights_mb']:.0f} MB",
            f"{max(row['difference'].values()):.0e}" if "difference" in row else "not run",
            *(_error(files.get(runtime, "not run")) for runtime in ("onnxruntime", "openvino")),
            f"{other['graph_s']:.2f}, {other['prune_s']:.2f}" if "graph_s" in other else other["error"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _error(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.0e}"


def main() -> None:
    """Run what the output file does not hold yet, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help=f"default: all of {', '.join(NETWORKS)}")
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/any_cnn.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = read_json(options.out) if options.out.is_file() else {"networks": {}}
    found["versions"], found["threads"] = versions(), 1
    stages: dict[str, Any] = {"trace_s": functools.partial(in_process, published), "difference": exact}
    stages |= ({"torch_pruning": beside} if options.beside else {}) | ({"onnx": onnx} if options.onnx else {})
    for key, stage in stages.items():
        for name in options.networks or NETWORKS:
            row = found["networks"].setdefault(name, {})
            if key not in row:
                row |= stage(name)
                write_json(options.out, found)
                print(name, json.dumps(row), flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
