"""Published networks through the commands, as a user types them: what passes, what it costs, Torch-Pruning beside it.

    make zoo                                  # the environment (.venv-zoo) and everything that has no result yet
    python benchmarks/zoo.py resnet18 --redo  # single networks, once more
    python benchmarks/zoo.py --beside         # Torch-Pruning on the same networks, too
    python benchmarks/zoo.py --table          # docs/any_cnn.md's table from the results, nothing runs

Every network of NETWORKS (timm's, random weights, small images) goes through inspect, prune, slice, export and verify
(tests/five_commands.py) in a process of its own, with a limit on its processor time; Torch-Pruning prunes the same
network to half the FLOPs in another. An interrupted run goes on. Whoever passes: all five commands answer yes, and the
FLOPs of `inspect` are torch's to 1 %. Needs timm and, for the comparison, torch-pruning.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the five commands are the tests'
from bar_edge import pipeline  # noqa: F401  loaded once: every network's process is a fork of this one
from bar_edge.files import read_json, write_json
from bar_edge.network import Network
from benchmarks.zoo_networks import NETWORKS
from tests.five_commands import five_commands, torch_flops, write_images

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 3
#: processor seconds of a network's commands, and of Torch-Pruning
LIMIT_S, LIMIT_BESIDE_S = 600, 60
#: FLOPs by bar-edge against torch's that still count as the same
SAME_COUNT = 0.01


def network(name: str, num_classes: int) -> nn.Module:
    """Return a network of timm's with random weights whose norms, scales and biases hide nothing."""
    import timm

    row = NETWORKS[name]
    torch.manual_seed(0)
    return unhidden(timm.create_model(name, num_classes=num_classes, **row.arguments)).eval()


@torch.no_grad()
def unhidden(module: nn.Module) -> nn.Module:
    """Give constants (gammas of 1, betas of 0, layer scales of 1e-6, running statistics) values that show mistakes."""
    for tensor in module.parameters():
        if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            low, high = (-0.2, 0.2) if tensor.flatten()[0] == 0 else (0.5, 1.5)
            tensor.uniform_(low, high)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.2, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return module


def commands(name: str, file: Path) -> None:
    """Send a network through the five commands; write what is known so far into `file` after each."""
    row = NETWORKS[name]
    shape = (3, row.side, row.side)
    found: dict[str, Any] = {"input": row.side, "seconds": {}, "passed": False, "failed": None}
    module = network(name, CLASSES)
    found |= {"params": sum(p.numel() for p in module.parameters()), "torch": torch_flops(module, shape)}
    with tempfile.TemporaryDirectory() as scratch:
        data, folder = write_images(Path(scratch) / "noise", shape), Path(scratch)
        spec = os.path.relpath(Path(__file__).resolve())
        for done in five_commands(f"{spec}:network", data, folder, shape, (f"name={name}",)):
            found["seconds"][done.command] = round(done.seconds, 2)
            found["failed"] = {"command": done.command, "words": done.words[:600]} if done.code else None
            if not done.code:
                found |= noted(done.command, done.answer)
            write_json(file, found)
        if found["failed"] is None:
            left = torch_flops(Network.load(folder / "run" / "network").eval(), shape)
            found["left"] = counted(left) / counted(found["torch"])
    apart = found.get("flops", 0) / counted(found["torch"]) - 1
    if found["failed"] is None and abs(apart) > SAME_COUNT:
        found["failed"] = {"command": "inspect", "words": f"FLOPs by bar-edge are {apart:+.1%} off torch's"}
    found["passed"] = found["failed"] is None
    write_json(file, found)


def counted(flops: dict[str, int]) -> int:
    """Return those of torch's FLOPs that bar-edge's convention counts."""
    return flops["convolutions"] + flops["positions"]


def noted(command: str, answer: dict[str, Any]) -> dict[str, Any]:
    """Return what the table says of a command's answer."""
    if command == "inspect":
        flops = answer["costs"]["flops"]
        operators = sorted({entry["operator"] for entry in answer["without_rule"]})
        return {"flops": flops["full"], "prunable": flops["prunable_share"], "without_rule": operators}
    if command == "slice":
        return {"difference": answer["parity"]["masked_vs_sliced"]}
    if command == "export":
        return {"onnx": answer["parity"]["sliced_vs_onnx"]}
    return {}


def beside(name: str, file: Path) -> None:
    """Prune the same network by Torch-Pruning to half of torch's FLOPs; of its layers only the classifier is named."""
    import torch_pruning

    shape, module = (3, NETWORKS[name].side, NETWORKS[name].side), network(name, CLASSES)
    example, full = torch.zeros(1, *shape), counted(torch_flops(module, shape))
    try:
        pruner = torch_pruning.pruner.MagnitudePruner(
            module,
            example,
            importance=torch_pruning.importance.RandomImportance(),
            pruning_ratio=0.6,
            iterative_steps=12,
            ignored_layers=[m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES],
        )
        left = 1.0
        for _ in range(12):
            pruner.step()
            left = counted(torch_flops(module, shape)) / full
            if left <= 0.5:
                break
        answer: dict[str, Any] = {"passed": left <= 0.55, "left": left}
        answer |= {} if answer["passed"] else {"words": f"{left:.0%} of the FLOPs are left"}
    except Exception as error:  # whatever another tool stumbles over is its answer
        answer = {"passed": False, "words": f"{type(error).__name__}: {error}"[:300]}
    write_json(file, answer | {"seconds": round(sum(os.times()[:2]), 1)})


def alone(task: Callable[[str, Path], None], name: str, limit_s: int, log: Path) -> dict[str, Any]:
    """Return what a task writes for a network in a forked process of one thread; what it had where that ends early."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.json"
        process = multiprocessing.get_context("fork").Process(target=_limited, args=(task, name, file, limit_s, log))
        process.start()
        process.join(6 * limit_s)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        found: dict[str, Any] = read_json(file) if file.is_file() else {"passed": False, "seconds": {}}
        if process.exitcode:
            ended = "the time limit" if late or process.exitcode in (-9, -24) else f"exit code {process.exitcode}"
            found |= {"passed": False, "failed": {"command": after(found), "words": ended}, "words": ended}
        return found


def after(found: dict[str, Any]) -> str:
    """Return the command that an early end interrupted."""
    done = found["seconds"] if isinstance(found["seconds"], dict) else {}
    return next((c for c in ("inspect", "prune", "slice", "export", "verify") if c not in done), "torch's count")


def _limited(task: Callable[[str, Path], None], name: str, file: Path, limit_s: int, log: Path) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s + 5))
    with log.open("a") as errors:
        os.dup2(errors.fileno(), 2)
    print(f"\n=== {task.__name__} {name}", file=sys.stderr, flush=True)
    try:
        task(name, file)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def environment() -> dict[str, str]:
    """Return what the results depend on."""
    packages = ("torch", "torchvision", "timm", "torch-pruning", "onnx", "onnxruntime", "numpy")
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ": unknown")
    found = {"python": platform.python_version(), "processor": cpu.partition(": ")[2]}
    return found | {package: version(package) for package in packages}


def table(found: dict[str, Any]) -> str:
    """Write the results as Markdown: counts, the table, the failures."""
    rows = {name: found["networks"][name] for name in NETWORKS if name in found["networks"]}
    passed = sum(row["passed"] for row in rows.values())
    others = [row["torch_pruning"]["passed"] for row in rows.values() if "torch_pruning" in row]
    lines = [f"{passed} of {len(rows)} networks pass, with Torch-Pruning {sum(others)} of {len(others)}.", ""]
    head = ["network", "input", "passes", "prunable", "FLOPs", "by torch", "left", "seconds", "difference", "ONNX"]
    lines += [f"| {' | '.join([*head, 'Torch-Pruning'])} |", "| --- |" + " ---: |" * len(head)]
    for name, row in rows.items():
        lines.append(f"| {' | '.join([name, *cells(row)])} |")
    failures = {
        n: f"`{row['failed']['command']}`: {row['failed']['words']}" for n, row in rows.items() if row["failed"]
    }
    return "\n".join([*lines, "", *(f"- {name}: {words}" for name, words in failures.items())])


def cells(row: dict[str, Any]) -> list[str]:
    """Return a network's cells behind its name."""

    def number(key: str, form: str, scale: float = 1.0) -> str:
        return format(row[key] * scale, form) if row.get(key) is not None else ""

    other = row.get("torch_pruning", {"passed": False, "words": "not tried"})
    return [
        str(row.get("input", "")),
        "yes" if row["passed"] else f"no: {row['failed']['command']}",
        number("prunable", ".1%"),
        number("flops", ".1f", 1e-6) + " M" * ("flops" in row),
        f"{counted(row['torch']) / 1e6:.1f} M" if "torch" in row else "",
        number("left", ".0%"),
        f"{sum(row['seconds'].values()):.0f}",
        number("difference", ".0e"),
        number("onnx", ".0e"),
        "yes" if other["passed"] else other["words"][:40].replace("|", "/"),
    ]


def main() -> None:
    """Run what the results do not hold yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="default: all")
    parser.add_argument("--beside", action="store_true", help="Torch-Pruning, too")
    parser.add_argument("--redo", action="store_true", help="run the commands again for these networks")
    parser.add_argument("--redo-failed", action="store_true", help="run the commands again for those that failed")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "zoo.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = read_json(options.out) if options.out.is_file() else {"networks": {}}
    log = options.out.with_suffix(".log")
    for name in () if options.table else options.networks or NETWORKS:
        row = found["networks"].get(name, {})
        other = row.get("torch_pruning")
        again = options.redo or (options.redo_failed and not row.get("passed"))
        if again or "passed" not in row:
            row = alone(commands, name, LIMIT_S, log)
        if options.beside and other is None:
            other = alone(beside, name, LIMIT_BESIDE_S, log)
        found["networks"][name], found["environment"] = row | ({"torch_pruning": other} if other else {}), environment()
        write_json(options.out, found)
        print(name, json.dumps(found["networks"][name]), flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
