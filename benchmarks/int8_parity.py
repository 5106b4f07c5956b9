"""Ten INT8 files: what ONNX Runtime and OpenVINO compute on this processor, beside what the files mean.

    python -m benchmarks.int8_parity --files FOLDER write --data FOLDER
    python -m benchmarks.int8_parity --files FOLDER compare
    cc -O1 -shared -fPIC -o avx2_only.so tests/avx2_only.c
    LD_PRELOAD=./avx2_only.so python -m benchmarks.int8_parity --files FOLDER compare

The last run shows a processor with AVX2 alone: CPUID answers so to every library of the process. Seven networks of
results/cifar10, and three of the zoo with random weights, two of them pruned by the masks of masks.py; calibrated on
128 training images of CIFAR-10, compared on 64 others. By the recipes as they are, and with weights of eight bits.
Largest difference of an output from what the file means (ONNX Runtime without optimisation), over the largest output.
Written into results/int8_parity.json, a part per processor.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import openvino
import torch

from bar_edge.data import Split, load_data
from bar_edge.files import read_json, write_json
from bar_edge.lowering.lower import lower
from bar_edge.models import build
from bar_edge.network import Network, trace
from bar_edge.records.lowering import Lowering
from bar_edge.runs.run_folder import versions
from bar_edge.surgery import slice_network
from bar_edge.targets.onnx.file import export_onnx
from bar_edge.targets.onnx.parity import cpu_session, difference, relative
from bar_edge_calibration.collect import collect
from bar_edge_calibration.graph import prepare
from bar_edge_calibration.place import place
from bar_edge_calibration.recipe import load_recipe
from benchmarks.masks import uneven_plan

RESULTS = Path(__file__).resolve().parent / "results"
TRAINED = tuple(f"resnet20_{name}_s0" for name in ("dense", "bar2", "bar4", "uniform4", "random4"))
TRAINED += ("wrn-10-2_dense_s0", "wrn-10-2_bar4_s0")
#: of the zoo -> by what their volume is divided
RANDOM = {"mobilenetv2": 1, "resnet32": 4, "wrn-16-4": 4}
NETWORKS = (*TRAINED, *RANDOM)
RECIPES = {"onnxruntime-cpu": "onnxruntime", "onnxruntime-amx": "onnxruntime", "openvino-cpu": "openvino"}
BITS: tuple[Literal[7, 8], ...] = (7, 8)
CALIBRATION, COMPARED, SEED = 128, 64, 0


def network(name: str) -> Network:
    """Return a trained network of the results, or one of the zoo with random weights and masks."""
    if name in TRAINED:
        return Network.load(RESULTS / "cifar10" / name / "network").eval()
    torch.manual_seed(SEED)
    found = trace(build(name, input_shape=(3, 32, 32), classes=10).eval(), torch.zeros(2, 3, 32, 32)).eval()
    factor = RANDOM[name]
    return slice_network(found, uneven_plan(found, factor, SEED)).eval() if factor > 1 else found


def first(split: Split, number: int) -> np.ndarray:
    """Return the first images of a split (number, 3, 32, 32), normalised."""
    batches = split.batches(number, train=False, seed=SEED, epoch=0, device="cpu", augment="none")
    return np.ascontiguousarray(next(iter(batches))[0].numpy())


def write(options: argparse.Namespace) -> None:
    """Write all files, and the images that they are compared on."""
    data = load_data(str(options.data))
    images = first(data.fit, CALIBRATION)
    np.save(options.files / "images.npy", first(data.held_out, COMPARED))
    for name in NETWORKS:
        source, form = options.files / f"{name}.onnx", network(name)
        export_onnx(lower(form, Lowering.parse("slices")), form.input_shapes, source)
        for recipe in map(load_recipe, RECIPES):
            model = prepare(onnx.load(source), batchnorm_as_convolution=recipe.batchnorm == "convolution")
            ranges = collect(source, model, [images], data="cifar10").ranges(recipe.ranges)
            for bits in BITS:
                file = options.files / f"{name}.{recipe.name}.{bits}.onnx"
                onnx.save(place(model, ranges, dataclasses.replace(recipe, weight_bits=bits)), file)
        print(name, file=sys.stderr, flush=True)


def outputs(file: Path, runtime: str, images: np.ndarray) -> list[np.ndarray]:
    """Return what a runtime computes with a file."""
    if runtime == "onnxruntime":
        return list(cpu_session(file).run(None, {"input": images}))
    model = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(model([images]).to_tuple())


def compare(options: argparse.Namespace) -> None:
    """Compare all files in this process, and print the table of all processors so far."""
    images, rows = np.load(options.files / "images.npy"), []
    for name, (recipe, runtime), bits in itertools.product(NETWORKS, RECIPES.items(), BITS):
        file = options.files / f"{name}.{recipe}.{bits}.onnx"
        meant = list(cpu_session(file, as_written=True).run(None, {"input": images}))
        error = relative(*difference(meant, outputs(file, runtime, images)))
        rows.append({"network": name, "recipe": recipe, "weight_bits": bits, "error": error})
    # torch reads the processor's abilities as every library of this process does
    vnni = "with" if torch.cpu._is_vnni_supported() else "without"
    path = RESULTS / "int8_parity.json"
    parts = read_json(path) if path.is_file() else {}
    parts[f"{vnni} VNNI"] = {"images": COMPARED, "seed": SEED, "versions": versions(), "rows": rows}
    write_json(path, parts)
    print(table(parts))


def table(found: dict[str, Any]) -> str:
    """Return Markdown: a row per network, a column per processor, recipe and bits."""
    cells: dict[str, dict[str, float]] = {}
    for processor, part in found.items():
        for row in part["rows"]:
            column = f"{processor}: {row['recipe']}, {row['weight_bits']} bits"
            cells.setdefault(row["network"], {})[column] = row["error"]
    columns = list(dict.fromkeys(column for cell in cells.values() for column in cell))
    lines = [f"| largest difference / largest output | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{cell[c]:.4f}' for c in columns)} |" for name, cell in cells.items()]
    return "\n".join(lines)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["write", "compare"])
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as Parquet")
    options = parser.parse_args()
    options.files.mkdir(parents=True, exist_ok=True)
    {"write": write, "compare": compare}[options.part](options)


if __name__ == "__main__":
    main()
