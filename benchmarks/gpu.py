"""Mixed against regular against dense on an NVIDIA GPU: wrn-28-12 with random masks, fp16, batch 1, 8 and 64.

Each form runs in torch as one CUDA graph, and in ONNX Runtime CUDA if onnxruntime-gpu is installed. Torch's time
is that of the host from the graph's launch until the GPU is done, images on the GPU; ONNX Runtime's has the copies
of images and outputs in it. Forms are timed in interleaved rounds. Run: python -m benchmarks.gpu
(or make bench-gpu)
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bar_edge.bench import Measurement, bench_onnx, compare, median_interval
from bar_edge.bench.runner.timing import interleave, warm_up
from bar_edge.errors import BarEdgeError, EnvironmentLacks
from bar_edge.files import write_json
from bar_edge.lowering.lower import lower
from bar_edge.models import build
from bar_edge.network import Network, trace
from bar_edge.records.lowering import PAPER, Lowering
from bar_edge.runs.run_folder import versions
from bar_edge.surgery import slice_network
from bar_edge.surgery.masked import relative_difference
from bar_edge.targets.onnx.file import export_onnx
from benchmarks.masks import CELLS, uneven_plan

#: tensor cores take channels by eights in half precision
LOWERED = ("regular", "regular:8", "slices", "slices:8", "blocks:8", "zero-filled:8", PAPER)
BATCHES = (1, 8, 64)


def forms(model: str, shape: tuple[int, ...], factor: float, seed: int) -> dict[str, Network]:
    """Return the dense network and every form of it at 1/factor of the volume, random weights, eval mode."""
    torch.manual_seed(seed)
    dense = trace(build(model, input_shape=shape, classes=10), torch.zeros(2, *shape)).eval()
    sliced = slice_network(dense, uneven_plan(dense, factor, seed))
    return {"dense": dense} | {form: lower(sliced, Lowering.parse(form)) for form in LOWERED}


def graphed(module: nn.Module, images: Tensor) -> Callable[[], object]:
    """Return what runs a module on fixed images and waits for it: as a CUDA graph on a GPU, plainly on a CPU."""
    if images.device.type == "cpu":
        return torch.inference_mode()(lambda: module(images))
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are chosen before the graph is recorded
            for _ in range(5):
                module(images)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            module(images)

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return run


def time_torch(networks: dict[str, Network], batch: int, seconds: float, device: str) -> dict[str, Measurement]:
    """Time all forms in turn in half precision (on a CPU in float32), each after its outputs were checked."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    images = torch.randn(batch, *networks["dense"].input_shapes[0], generator=torch.Generator().manual_seed(0))
    ready = images.to(device, dtype).contiguous(memory_format=torch.channels_last)
    runs, parities = [], []
    for network in networks.values():
        module = copy.deepcopy(network).to(device, dtype)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        with torch.inference_mode():
            parities.append(relative_difference(network(images), module(ready).float().cpu()))
        runs.append(graphed(module, ready))
    warmups = [warm_up(run) for run in runs]
    samples, _ = interleave(runs, seconds * len(runs), random.Random(0))
    return {
        name: Measurement(
            name=name,
            samples_ms=tuple(times),
            warmup_runs=warmup[0],
            warmup_stable=warmup[1],
            batch=batch,
            environment={"runtime": f"torch-{device}", "interleaved": len(networks)},
            parity={"error": error},
        )
        for name, times, warmup, error in zip(networks, samples, warmups, parities, strict=True)
    }


def time_onnx(networks: dict[str, Network], batch: int, seconds: float, runtime: str) -> dict[str, Measurement]:
    """Time the forms' ONNX files, in turn, in half precision with inputs and outputs in float32.

    The paper's form is left out: ONNX Runtime has no ScatterND that adds in half precision on every device.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    networks = {name: network for name, network in networks.items() if name != PAPER}
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, network in networks.items():
            files.append(Path(folder) / f"{name}.onnx")
            export_onnx(network, network.input_shapes, files[-1])
            if runtime != "onnxruntime-cpu":
                onnx.save(convert_float_to_float16(onnx.load(files[-1]), keep_io_types=True), files[-1])
        found = bench_onnx(files, runtime=runtime, batch=batch, seconds=seconds)
    return dict(zip(networks, found, strict=True))


def rows(found: dict[str, Measurement]) -> list[dict[str, Any]]:
    """Return median, its interval, and how many times faster than the dense and the regular form, per form."""
    answer = []
    for name, measured in found.items():
        interval = median_interval(measured)
        answer.append(
            {
                "form": name,
                "engine": measured.environment["runtime"],
                "batch": measured.batch,
                "p50_ms": measured.percentile_ms(50),
                "interval_ms": [interval.low_ms, interval.high_ms] if interval else None,
                "n": len(measured.samples_ms),
                "over_dense": dataclasses.asdict(compare(measured, found["dense"])),
                "over_regular": dataclasses.asdict(compare(measured, found["regular"])),
                "error": (measured.parity or {}).get("error"),
            }
        )
    return answer


def table(found: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = ["| network | factor | seed | engine | batch | form | ms (95 %) | n | over dense | over regular | error |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in found:
        low, high = row["interval_ms"] or (float("nan"), float("nan"))
        speed = [
            f"{c['speedup']:.2f} ({c['low']:.2f}..{c['high']:.2f})" for c in (row["over_dense"], row["over_regular"])
        ]
        error = "-" if row["error"] is None else f"{row['error']:.0e}"
        cells = [row["network"], f"{row['factor']}x", row["seed"], row["engine"], row["batch"], row["form"]]
        cells += [f"{row['p50_ms']:.3f} ({low:.3f}..{high:.3f})", row["n"], *speed, error]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def measure(
    model: str, factors: list[int], seeds: list[int], batches: list[int], seconds: float, device: str
) -> dict[str, Any]:
    """Measure every cell; ONNX Runtime is left out, with the reason, where it does not run on the device."""
    shape, found, left_out = CELLS.get(model, ((3, 32, 32), (), range(0)))[0], [], ""
    for factor in factors:
        for seed in seeds:
            networks = forms(model, shape, factor, seed)
            for batch in batches:
                cell = {"network": model, "factor": factor, "seed": seed}
                found += [cell | row for row in rows(time_torch(networks, batch, seconds, device))]
                if not left_out:
                    try:
                        measured = time_onnx(networks, batch, seconds, f"onnxruntime-{device}")
                        found += [cell | row for row in rows(measured)]
                    except EnvironmentLacks as error:
                        left_out = f"{error.required}; got: {error.got}"
                print(table(found[-2 * len(networks) :]), file=sys.stderr, flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {
        "device": name,
        "precision": "fp16" if device == "cuda" else "fp32",
        "versions": versions(),
        "onnxruntime left out": left_out or None,
        "seconds": seconds,
        "rows": found,
    }


def main() -> None:
    """Measure on the GPU; exit code 3 where there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="wrn-28-12")
    parser.add_argument("--factors", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, per form")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the program")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    options = parser.parse_args()
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise EnvironmentLacks(
                "an NVIDIA GPU, and torch built for it",
                got=f"torch {torch.__version__} finds none",
                consequence="nothing was measured",
                remedy="run it on a machine with a GPU",
            )
        answer = measure(
            options.model, options.factors, options.seeds, options.batches, options.seconds, options.device
        )
    except BarEdgeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, answer)
    print(table(answer["rows"]))


if __name__ == "__main__":
    main()
