"""What gates and barrier cost per training step: gated against ungated, interleaved, without a teacher.

Prints the ratio of median step times with its spread and the ratio of peak memory (each in a process of
its own). Aim: at most 1.10 and 1.15. Run: python benchmarks/gate_overhead.py
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bar_edge.files import write_json
from bar_edge.methods import BAR
from bar_edge.models import build
from bar_edge.network import trace
from bar_edge.runs.run_folder import versions

BATCH = 128


def stepper(model: str, gated: bool) -> Any:
    """Return a function that does one training step of a network at 3x32x32 in bf16 autocast."""
    torch.manual_seed(0)
    network = trace(build(model, input_shape=(3, 32, 32), classes=10), torch.zeros(2, 3, 32, 32)).train()
    pruner = BAR(network, budget="4x", steps=1000) if gated else None
    module: nn.Module = pruner.network if pruner is not None else network
    weights = pruner.weights() if pruner is not None else list(network.parameters())
    optimizer = torch.optim.SGD(weights, lr=0.02, momentum=0.9, nesterov=True, fused=True)
    images = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(0, 10, (BATCH,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = module(images)
        loss = nn.functional.cross_entropy(outputs.float(), targets)
        if pruner is not None:
            loss = pruner.loss(loss, images, outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()

    return step


def times(model: str, rounds: int) -> dict[str, Any]:
    """Return the ratio of step times, gated over plain, in processor seconds of this process."""
    steps = {gated: stepper(model, gated) for gated in (False, True)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for round_ in range(rounds + 3):
        for gated, step in steps.items():
            start = time.process_time()
            step()
            if round_ >= 3:
                seconds[gated].append(time.process_time() - start)
    ratios = sorted(g / p for g, p in zip(seconds[True], seconds[False], strict=True))
    return {
        "plain_s": statistics.median(seconds[False]),
        "gated_s": statistics.median(seconds[True]),
        "ratio": statistics.median(seconds[True]) / statistics.median(seconds[False]),
        "ratio_quartiles": [ratios[rounds // 4], ratios[3 * rounds // 4]],
        "rounds": rounds,
    }


def peak_mb(model: str, gated: bool) -> float:
    """Return the peak resident memory of a fresh process after five steps, in MB."""
    command = [sys.executable, __file__, "--peak", model, "gated" if gated else "plain"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Measure both networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", nargs=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gate_overhead.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        step = stepper(options.peak[0], options.peak[1] == "gated")
        for _ in range(5):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    found: dict[str, Any] = {"batch": BATCH, "threads": 1, "precision": "bf16 autocast", "versions": versions()}
    for model in ("resnet20", "wrn-16-2"):
        plain, gated = peak_mb(model, False), peak_mb(model, True)
        memory = {"plain_mb": plain, "gated_mb": gated, "memory_ratio": gated / plain}
        found[model] = times(model, options.rounds) | memory
        print(model, json.dumps(found[model]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, found)


if __name__ == "__main__":
    main()
