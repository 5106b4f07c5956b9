"""A rehearsal for a Jetson on an x86 machine: bundles run by aarch64 Python and ONNX Runtime under user-mode emulation.

    python benchmarks/aarch64.py --data FOLDER [--cache runs/aarch64]

Downloads once into the cache, changing nothing of the system: QEMU and an aarch64 Python from Debian's packages (needs
apt-get and dpkg, not root), numpy and onnxruntime as aarch64 wheels. Then the runner compares the outputs of fp32 and
fp16 bundles of a trained network with the expected ones, there and here. Emulation says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from bar_edge.data import load_data
from bar_edge.files import read_json, write_json
from bar_edge.lowering.lower import lower
from bar_edge.network import Network
from bar_edge.records.lowering import Lowering
from bar_edge.targets.artifact import ArtifactSpec, write_artifact
from bar_edge.targets.tensorrt.bundle import write_bundle

SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
PYTHON_PACKAGES = """
libbz2-1.0 libc6 libexpat1 libffi8 libgcc-s1 liblzma5 libpython3.11-minimal libpython3.11-stdlib libssl3 libstdc++6
libuuid1 python3.11 python3.11-minimal zlib1g
"""
WHEELS = "numpy onnxruntime flatbuffers protobuf packaging"
#: Armv8.2 with half-precision arithmetic, as Orin's Cortex-A78AE
CPU = "neoverse-n1"
#: ONNX Runtime reads the processor's features here, and dies of the host's own text
CPUINFO = """processor\t: {}
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
NETWORKS = ("resnet20_bar4_s0",)
SAMPLES = 12


def prepare(cache: Path) -> list[str]:
    """Fill the cache and return the command that starts the emulated Python."""
    root = cache / "root"
    if not (root / "site").is_dir():
        unpack(cache, "amd64", ["qemu-user-static"], cache / "qemu")
        unpack(cache, "arm64", PYTHON_PACKAGES.split(), root)
        (root / "proc").mkdir(exist_ok=True)
        (root / "proc" / "cpuinfo").write_text("".join(CPUINFO.format(i) for i in range(os.cpu_count() or 1)))
        wheels(cache, root / "site")
    emulator = [str(cache / "qemu/usr/bin/qemu-aarch64-static"), "-cpu", CPU, "-L", str(root)]
    return [*emulator, "-E", f"PYTHONPATH={root / 'site'}", str(root / "usr/bin/python3.11")]


def unpack(cache: Path, architecture: str, packages: list[str], target: Path) -> None:
    """Download Debian packages of an architecture, with lists of our own, and unpack them."""
    lists, downloads = cache / f"lists-{architecture}", cache / f"debs-{architecture}"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    downloads.mkdir(exist_ok=True)
    sources = cache / "sources.list"
    sources.write_text(f"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {MIRROR} {SUITE} main\n")
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "",
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": lists,
        "Dir::State::status": "/dev/null",
    }
    options = [f"-o{key}={value}" for key, value in settings.items()]
    subprocess.run(["apt-get", "--quiet", "--quiet", *options, "update"], check=True)
    subprocess.run(["apt-get", "--quiet", "--quiet", *options, "download", *packages], check=True, cwd=downloads)
    for package in downloads.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(target)], check=True)


def wheels(cache: Path, target: Path) -> None:
    """Download wheels for aarch64 and unpack them."""
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version=3.11", *platforms, "--dest", str(cache / "wheels")]
    subprocess.run([*command, *WHEELS.split()], check=True)
    for wheel in (cache / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)


def make_bundles(kept: Path, data: str, out: Path) -> list[Path]:
    """Write fp32 and fp16 bundles of the kept networks with the first test images as samples."""
    images, _ = next(
        iter(load_data(data).test.batches(SAMPLES, train=False, seed=0, epoch=0, device="cpu", augment="none"))
    )
    bundles = []
    for name in NETWORKS:
        network = Network.load(kept / name / "network")
        lowered = lower(network, Lowering.parse("slices"))
        spec = ArtifactSpec(lowering="slices", budget=read_json(kept / name / "result.json")["budget"]["text"])
        manifest = write_artifact(lowered, out / name / "onnx-fp32", samples=images, spec=spec, reference=network)
        assert manifest["parity"]["within"], name
        for precision in ("fp32", "fp16"):
            bundles.append(out / name / f"trt-bundle-{precision}")
            write_bundle(out / name / "onnx-fp32", bundles[-1], precision=precision)
    return bundles


def run(python: list[str], bundle: Path) -> dict[str, Any]:
    """Run a bundle's runner on its model file with ONNX Runtime, and return the parity that it found."""
    manifest = read_json(bundle / "manifest.json")
    file = {
        "path": str(bundle / "model.onnx"),
        "name": bundle.name,
        "samples": str(bundle / "samples.safetensors"),
        "inputs": [value["name"] for value in manifest["inputs"]],
        "outputs": [value["name"] for value in manifest["outputs"]],
        "tolerance": manifest["parity"]["tolerance"],
    }
    request = {"runtime": "onnxruntime-cpu", "precision": "fp32", "threads": 1, "batch": 1, "seed": 0}
    request |= {"seconds": 0.01, "files": [file]}
    done = subprocess.run(
        [*python, str(bundle / "run.pyz")], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
        parity: dict[str, Any] = answer["models"][0]["parity"]
    except (ValueError, KeyError) as error:
        raise SystemExit(f"{bundle}: {error}: {done.stdout[-500:]} {done.stderr[-500:]}") from error
    return parity | {
        "machine": answer["environment"]["machine"],
        "onnxruntime": answer["environment"]["runtime_version"],
    }


def main() -> None:
    """Prepare, run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10")
    parser.add_argument("--cache", type=Path, default=Path("runs/aarch64"))
    parser.add_argument("--kept", type=Path, default=Path("benchmarks/results/cifar10"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/aarch64.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    emulated = prepare(options.cache.resolve())
    rows: list[dict[str, Any]] = []
    for bundle in make_bundles(options.kept, options.data, options.cache.resolve() / "bundles"):
        here, there = run([sys.executable], bundle), run(emulated, bundle)
        rows.append(
            {"network": bundle.parent.name, "precision": bundle.name.rsplit("-", 1)[1], "here": here, "there": there}
        )
    # without TensorRT the builder says what is missing, on that machine too
    builder = subprocess.run([*emulated, str(bundle / "build.pyz")], capture_output=True, text=True, check=False)
    assert builder.returncode == 3 and "required: TensorRT" in builder.stderr, builder.stderr
    result = {"samples": SAMPLES, "cpu": CPU, "python": "3.11", "host": platform.machine(), "rows": rows}
    write_json(options.out, result)
    machines = [rows[0][side]["machine"] for side in ("here", "there")]
    print(f"| network | file | {' | '.join(machines)} | tolerance |\n|---|---|---|---|---|")
    for row in rows:
        errors = " | ".join(f"{row[side]['error']:.1e}" for side in ("here", "there"))
        print(f"| {row['network']} | {row['precision']} | {errors} | {row['there']['tolerance']:g} |")
    if not all(row[side]["within"] for row in rows for side in ("here", "there")):
        raise SystemExit("outputs differ")


if __name__ == "__main__":
    main()
