"""What all arms share: the dense start, the data, the teacher, the table, the training, and how a rival is matched."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bar_edge.bench import bench_onnx
from bar_edge.config import DistillConfig, TrainConfig
from bar_edge.data import DataSource, load_data
from bar_edge.latency_budget.operation_prices import undisturbed_ms
from bar_edge.lowering.lower import lower
from bar_edge.methods import GateLayout
from bar_edge.models import build, load_weights
from bar_edge.network import Network, count, trace
from bar_edge.pipeline import profile
from bar_edge.records.latency_table import LatencyTable
from bar_edge.records.lowering import Lowering
from bar_edge.requests import PruneRequest
from bar_edge.runs.run_folder import Run
from bar_edge.runs.specs import read_material
from bar_edge.targets.onnx.file import export_onnx
from bar_edge.training import load_task, train
from benchmarks.cifar10 import Lines

TASK = load_task("classification")
#: forms in which a search measures, how far above ours a rival may be, and how often its ratio is halved
FORMS, ABOVE, HALVINGS = ("regular:4", "regular:16", "gather:4"), 1.02, 7


class Remembering(nn.Module):
    """A teacher that remembers its answers, in a file: all arms of a seed see the same images."""

    def __init__(self, network: nn.Module, file: Path) -> None:
        super().__init__()
        self.network, self.file = [network.eval()], file
        self.known: dict[int, Tensor] = torch.load(file, weights_only=True) if file.is_file() else {}

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's outputs, from memory where these images came before."""
        key = zlib.crc32(images.float().contiguous().numpy().tobytes())
        if key not in self.known:
            self.known[key] = self.network[0](images).float()
        return self.known[key]

    def keep(self) -> None:
        """Write what is known."""
        torch.save(self.known, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)


class Taught(Run):
    """The product's run, with a teacher that remembers."""

    def __init__(self, bed: Bed, config: PruneRequest, out: Path) -> None:
        self.remembering = bed.teacher
        super().__init__(config, read_material(config), out, resume=out.exists(), progress=Lines())

    def teacher(self, dense: Network) -> nn.Module:
        """Return the dense network."""
        return self.remembering


class Bed:
    """One model and one seed: its dense network, its data, its table, and all arms on them."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed, self.model, self.by = options, seed, str(options.model), str(options.by)
        self.data: DataSource = load_data(str(options.data), seed=seed)
        self.folder = Path(options.dense.format(model=self.model, seed=seed)) / "network"
        self.dense = Network.load(self.folder)
        self.work: Path = options.work / f"{self.model}_{self.by}_s{seed}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.teacher = Remembering(copy.deepcopy(self.dense), options.work / f"{self.model}_s{seed}_teacher.pt")
        self.table_file = options.table_file or options.work / f"{self.model}.json"
        if self.by == "ms" and not self.table_file.is_file():
            profile(self.model, out=self.table_file, input_shape=tuple(self.data.input_shape))
        self.table = LatencyTable.load(self.table_file) if self.by == "ms" else None
        self.layout = GateLayout(self.dense, table=self.table)
        self.full = self.layout.cost({}, self.by)
        config = TrainConfig(threads=1, dense=0, prune=options.prune, tune=options.epochs - options.prune)
        self.train = config.chosen(len(self.data.fit))
        self.batch = self.train.batch or 1

    def module(self, width: float = 1.0) -> nn.Module:
        """Return the zoo's module, with the dense network's weights at full width."""
        arguments = (f"width={width}",) if width != 1 else ()
        module = build(self.model, input_shape=self.data.input_shape, classes=10, model_args=arguments)
        if width == 1:
            load_weights(module, self.folder / "weights.safetensors")
        return module

    def traced(self, module: nn.Module) -> Network:
        """Return a module as a Network."""
        return trace(module, torch.zeros(2, *self.data.input_shape))

    def run(self, share: float) -> Taught:
        """Return the product's run at a share of the dense network's cost, with the defaults."""
        limit = share * self.full
        config = PruneRequest(
            model=self.model,
            data=str(self.options.data),
            budget=f"{limit:.6f}ms" if self.by == "ms" else f"{limit / 1e6:.6f}MFLOPs",
            weights=str(self.folder),
            table=str(self.table_file) if self.by == "ms" else None,
            seed=self.seed,
            train=self.train,
        )
        return Taught(self, config, self.work / f"ours-{share:g}-run")

    def tuned(self, network: Network, epochs: int) -> Network:
        """Return the network after some epochs of tuning, as every arm has them."""
        config = dataclasses.replace(self.train, tune=epochs)
        distill = DistillConfig()
        train(network, self.data, TASK, config, "tune", seed=self.seed, teacher=self.teacher, distill=distill)
        return network

    def matched(self, make: Callable[[float], Network], share: float, low: float, high: float) -> Network:
        """Return the costliest network of a family that costs at most 2 % more than ours, else the cheapest.

        make: a network for a number between low (large) and high (small). share: the one that ours was given.
        """
        reference = Network.load(self.work / f"ours-{share:g}-cut")
        known: dict[tuple[tuple[int, ...], ...], float] = {}
        found: list[tuple[float, Network]] = []
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            network = make(middle)
            shapes = tuple(tuple(weight.shape) for weight in network.parameters())
            if shapes not in known:
                known[shapes] = self.ratio(network, reference)
                found.append((known[shapes], network))
            low, high = (low, middle) if known[shapes] <= ABOVE else (middle, high)
        fit = [pair for pair in found if pair[0] <= ABOVE]
        ratio, best = max(fit, key=lambda p: p[0]) if fit else min(found, key=lambda p: p[0])
        print(f"matched: {ratio:.3f} of ours, of {sorted(round(r, 3) for r, _ in found)}", flush=True)
        return best

    def ratio(self, network: Network, reference: Network) -> float:
        """Return what a network costs, by the FLOPs or by the fastest quick form of each, over what another does."""
        if self.by == "flops":
            return count(network).flops / count(reference).flops
        with tempfile.TemporaryDirectory() as folder:
            forms = [lower(one, Lowering.parse(form)) for one in (network, reference) for form in FORMS]
            files = [Path(folder) / f"{i}.onnx" for i in range(len(forms))]
            for form, file in zip(forms, files, strict=True):
                export_onnx(form, form.input_shapes, file)
            times = list(map(undisturbed_ms, bench_onnx(files, seconds=0.5)))
        return min(times[: len(FORMS)]) / min(times[len(FORMS) :])
