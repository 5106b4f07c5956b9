"""Damaged and hostile files: an error that says so, never a traceback, a hang, or gigabytes."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from bar_edge.bench import bench_onnx, load_measurement
from bar_edge.bench.ssh import Finished
from bar_edge.config import TrainConfig, read_toml
from bar_edge.data import load_data
from bar_edge.errors import BarEdgeError, EnvironmentLacks, InputError
from bar_edge.files import read_json
from bar_edge.models import load_weights
from bar_edge.network import Network
from bar_edge.pipeline import export_run, prune
from bar_edge.records import ChannelPlan
from bar_edge.records.latency_table import LatencyTable
from bar_edge.report import write_report
from bar_edge.requests import ExportRequest, PruneRequest, prune_request
from bar_edge.runs.run_folder import read_result
from bar_edge.targets.artifact import replacing
from bar_edge.targets.verify import read_manifest, verify_artifact
from bar_edge.training.journal import read_checkpoint
from bar_edge_calibration.collect import Calibration
from tests.untrusted.mutations import Loader, png, within_time

#: so many of each loader in CI, of a page fewer; `make slow` does ten times as many
CASES, PAGES = 150, 6


@pytest.fixture(scope="module")
def loaders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loader]:
    """One file of each kind that bar-edge reads."""
    base = tmp_path_factory.mktemp("untrusted")
    run, module = base / "run", nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))
    train = TrainConfig(dense=1, prune=0, tune=0, batch=256, device="cpu", precision="fp32")
    prune(PruneRequest(model="resnet8", budget="4x", method="random", train=train), run)
    artifact = run / "artifacts" / "onnx-fp32"
    export_run(run, ExportRequest(lowering="slices"))
    torch.save(module.state_dict(), base / "weights.pt")
    from safetensors.torch import save_file

    save_file(module.state_dict(), base / "weights.safetensors")
    measurement = {
        "schema": 1, "name": "m", "samples_ms": [1.0, 2.0], "warmup_runs": 3, "batch": 1,
        "environment": {"runtime": "onnxruntime-cpu", "threads": 1, "precision": "fp32"},
    }  # fmt: skip
    table = {
        "schema": 1, "lowering": "gather:4", "rounding": 4, "step": 8, "layer_scale": 1.0, "rest_scale": 1.0,
        "prices": {"conv 3x3 @8x8": {"widths": [[4, 8], [4, 8]], "ms": [0.1, 0.2, 0.2, 0.3]}}, "constant_ms": 0.1,
        "checks": [[1.0, 1.1]], "lines": [], "model": "resnet8", "environment": {"cpu": "x"},
    }  # fmt: skip
    from bar_edge.files import write_json

    write_json(base / "measurement.json", measurement)
    write_json(base / "table.json", table)
    parquet(base / "parquet", [{"bytes": png(8, 8, shade)} for shade in range(10, 70, 10)], list(range(3)) * 2)
    cifar(base / "cifar", [0, 1] * 5)
    images(base / "images")

    def weights(name: str) -> Loader:
        return Loader(base, name, lambda: load_weights(module, base / name))

    return {
        "network": Loader(run / "network", "network.json", lambda: Network.load(run / "network")),
        "safetensors": Loader(run / "network", "weights.safetensors", lambda: Network.load(run / "network")),
        "plan": Loader(run, "plan.json", lambda: ChannelPlan.from_json(read_json(run / "plan.json"))),
        "config": Loader(run, "config.toml", lambda: prune_request(read_toml(run / "config.toml"))),
        "result": Loader(run, "result.json", lambda: read_result(run)),
        "page by result": Loader(run, "result.json", lambda: write_report(run)),
        "page by manifest": Loader(artifact, "manifest.json", lambda: write_report(run)),
        "page by metrics": Loader(run, "metrics.jsonl", lambda: write_report(run)),
        "manifest": Loader(artifact, "manifest.json", lambda: read_manifest(artifact)),
        "measurement": Loader(base, "measurement.json", lambda: load_measurement(base / "measurement.json")),
        "table": Loader(base, "table.json", lambda: LatencyTable.load(base / "table.json")),
        "checkpoint": Loader(
            run / "checkpoints", "dense.pt", lambda: read_checkpoint(run / "checkpoints" / "dense.pt")
        ),
        "weights.pt": weights("weights.pt"),
        "weights.safetensors": weights("weights.safetensors"),
        "parquet": Loader(base / "parquet", "train.parquet", lambda: load_data(str(base / "parquet"))),
        "cifar": Loader(base / "cifar", "data_batch_1", lambda: load_data(str(base / "cifar"))),
        "image": Loader(base / "images" / "train" / "a", "0.png", lambda: load_data(str(base / "images"))),
    }


NAMES = (
    *("network", "safetensors", "plan", "config", "result", "page by result", "page by manifest", "page by metrics"),
    *(
        "manifest",
        "measurement",
        "table",
        "checkpoint",
        "weights.pt",
        "weights.safetensors",
        "parquet",
        "cifar",
        "image",
    ),
)


def try_many(loader: Loader, seeds: range) -> tuple[list[tuple[int, str]], int]:
    """Return the seeds whose files raised what they should not, and how many files were read."""
    wrong, read = [], 0
    try:
        for seed in seeds:
            loader.tried(seed)
            try:
                with within_time():
                    loader.load()
                read += 1
            except BarEdgeError:
                pass
            except Exception as error:
                wrong.append((seed, f"{type(error).__name__}: {str(error)[:200]}"))
    finally:
        loader.restore()
    loader.load()  # the whole file is read
    return wrong, read


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files(loaders: dict[str, Loader], name: str) -> None:
    cases = PAGES if name.startswith("page") else CASES
    wrong, read = try_many(loaders[name], range(cases))
    assert wrong == [] and read < cases


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_mutated_files(loaders: dict[str, Loader], name: str) -> None:
    cases = PAGES if name.startswith("page") else CASES
    wrong, _ = try_many(loaders[name], range(cases, 10 * cases))
    assert wrong == []


def parquet(folder: Path, images: list[Any], labels: Any, kind: Any = None) -> Path:
    folder.mkdir(parents=True)
    table = pa.table({"image": pa.array(images), "label": pa.array(labels, kind)})
    for name in ("train", "test"):
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


def cifar(folder: Path, labels: list[Any]) -> Path:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"x", b"y"]}, protocol=2))
    return folder


def images(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    from PIL import Image

    for split in ("train", "test"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([0, 1, 2**63] * 2, pa.uint64()),
        ([0, 1, 300_000_000] * 2, None),
        ([0, 1, -5] * 2, None),
        ([0, 1, None] * 2, None),
    ],
)
def test_labels_of_parquet_that_are_none(tmp_path: Path, labels: list[Any], kind: Any) -> None:
    folder = parquet(tmp_path / "p", [{"bytes": png(8, 8)}] * 6, labels, kind)
    with pytest.raises(InputError):
        load_data(str(folder))


@pytest.mark.parametrize("cell", [{"path": "x.png"}, {"bytes": None}, {"bytes": "text"}, "text", 7])
def test_images_of_parquet_that_are_none(tmp_path: Path, cell: Any) -> None:
    with pytest.raises(InputError):
        load_data(str(parquet(tmp_path / "p", [cell] * 6, [0, 1, 2] * 2)))


@pytest.mark.parametrize("label", ["cat", None, 10**30, -1, 1.5, 100, [0]])
def test_labels_of_cifar_that_are_none(tmp_path: Path, label: Any) -> None:
    with pytest.raises(InputError):
        load_data(str(cifar(tmp_path / "c", [0, 1, 0, 1, label])))


def test_an_image_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = images(tmp_path / "i")
    os.mkfifo(folder / "train" / "a" / "9.png")
    with within_time():
        assert len(load_data(str(folder)).fit) == 4


def test_a_small_file_of_a_huge_image(tmp_path: Path) -> None:
    folder = images(tmp_path / "i")
    (folder / "train" / "a" / "9.png").write_bytes(png(13_000, 13_000))
    with pytest.raises(InputError, match="13000x13000|169000000 pixels"):
        load_data(str(folder))


def test_weights_that_hold_themselves_or_are_odd(tmp_path: Path) -> None:
    module, file = nn.Linear(4, 4), tmp_path / "w.pt"
    around: dict[str, Any] = {}
    around["model"] = around
    dense = {"weight": torch.ones(4, 4), "bias": torch.ones(4)}
    odd = [
        around,
        {**dense, "weight": torch.ones(4, 4).to_sparse()},
        {**dense, "weight": torch.ones(4, 4, dtype=torch.complex64)},
        {**dense, "weight": torch.empty(4, 4, device="meta")},
    ]
    for data in odd:
        torch.save(data, file)
        with within_time(), pytest.raises(InputError):
            load_weights(module, file)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["prices"]["conv 3x3 @8x8"].update(ms=[-0.1, 0.2, 0.2, 0.3]),
        lambda t: t["prices"]["conv 3x3 @8x8"].update(ms=[0.1]),
        lambda t: t["prices"]["conv 3x3 @8x8"].update(widths=[[8, 4], [4, 8]]),
        lambda t: t["prices"]["conv 3x3 @8x8"].update(widths=[[4, 8], [4, 2**40]]),
        lambda t: t.update(step=0),
        lambda t: t.update(rounding=-4),
        lambda t: t.update(layer_scale="1.0"),
        lambda t: t.update(checks=[["a", 1.0]]),
    ],
)
def test_prices_that_are_none(loaders: dict[str, Loader], change: Any) -> None:
    import json

    loader = loaders["table"]
    data = json.loads(loader.whole)
    change(data)
    loader.file.write_text(json.dumps(data))
    try:
        with pytest.raises(InputError):
            loader.load()
    finally:
        loader.restore()


def test_a_network_larger_than_its_weights_is_not_built(loaders: dict[str, Loader]) -> None:
    import json

    loader = loaders["network"]
    data = json.loads(loader.whole)
    name = next(name for name, module in data["modules"].items() if module["type"] == "Conv2d")
    data["modules"][name]["out_channels"] = 2_000_000_000
    loader.file.write_text(json.dumps(data))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with within_time(), pytest.raises(InputError, match="bytes of weights"):
            loader.load()
    finally:
        loader.restore()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_verify_ends_what_does_not_end(loaders: dict[str, Loader]) -> None:
    """A loop of 2^62 rounds in a stranger's file: a failed check after the time that it was given."""
    import json

    from bar_edge.files import file_hash, write_json

    artifact = loaders["manifest"].file.parent
    model = onnx.load(artifact / "model.onnx")
    graph_in, graph_out = model.graph.input[0], model.graph.output[0]
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Sin", ["v"], ["w"])],
        "body",
        [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("v", TensorProto.FLOAT, None)],
        [value("d", TensorProto.BOOL, []), value("w", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Constant", [], ["n"], value=helper.make_tensor("n", TensorProto.INT64, [], [2**62])),
        helper.make_node("Constant", [], ["t"], value=helper.make_tensor("t", TensorProto.BOOL, [], [True])),
        helper.make_node("Loop", ["n", "t", graph_in.name], [graph_out.name], body=body),
    ]
    graph = helper.make_graph(nodes, "endless", [graph_in], [graph_out])
    endless = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    endless.metadata_props.extend(model.metadata_props)
    whole = (artifact / "model.onnx").read_bytes()
    try:
        onnx.save(endless, artifact / "model.onnx")
        manifest = json.loads(loaders["manifest"].whole)
        manifest["files"]["model.onnx"]["sha256"] = file_hash(artifact / "model.onnx")
        write_json(artifact / "manifest.json", manifest)
        checks = verify_artifact(artifact, limit_s=5.0)
    finally:
        (artifact / "model.onnx").write_bytes(whole)
        loaders["manifest"].restore()
    assert not checks[-1].passed and "no outputs within 5 s" in checks[-1].detail


def test_the_runner_ends_with_its_parent(tmp_path: Path, repository: Path) -> None:
    """`bench` that is killed leaves no process behind."""
    child = (
        "import os, subprocess, sys, time; from bar_edge.bench.runner.telling import end_with_parent; "
        "end_with_parent(); print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, env=environment) as started:
        assert started.stdout is not None
        number = int(started.stdout.readline())
        started.kill()
    with within_time():
        while Path(f"/proc/{number}").exists() and "Z" not in Path(f"/proc/{number}/stat").read_text().split()[2]:
            pass


def test_calibrations_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "c.npz"
    for data in (b"", b"PK\x03\x04", png(8, 8)):
        file.write_bytes(data)
        with pytest.raises(InputError):
            Calibration.load(file)


@pytest.mark.parametrize(
    "said",
    [
        *("no JSON", "[]", "3", "null", "{}", "[" * 100_000, '{"error": "text"}', '{"error": {"kind": "SystemExit"}}'),
        *('{"error": {"kind": []}}', '{"models": []}', '{"models": 3, "environment": {}}'),
        '{"models": [{}], "environment": {"runtime": "../x", "threads": 1, "batch": 1}, "conditions": {}}',
        '{"models": [{"samples_ms": [-1.0]}], "environment": {"runtime": "onnxruntime-cpu", "threads": 1, "batch": 1}}',
    ],
)
def test_what_a_device_answers_is_not_believed(
    loaders: dict[str, Loader], monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    finished = Finished(returncode=0, stdout=said, stderr="")
    monkeypatch.setattr("bar_edge.bench.protocol._run_here", lambda *_: finished)
    with pytest.raises(EnvironmentLacks):
        bench_onnx([loaders["manifest"].file.parent])


def test_what_a_killed_export_left_is_swept(tmp_path: Path) -> None:
    """Its half-written folder goes; the artifact that it had moved away comes back; those of the living stay."""
    gone, mine = 2**22 + 1, os.getpid()  # Linux numbers no process so high
    for name in (f".a.{gone}.tmp", f".a.{gone}.old", f".b.{mine}.x.tmp", f".a.{mine}.x"):
        (tmp_path / name).mkdir()
    (tmp_path / f".a.{gone}.old" / "manifest.json").write_text("{}")
    with replacing(tmp_path / "a") as temporary:
        assert (tmp_path / "a" / "manifest.json").is_file()
        temporary.rmdir()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a", f".b.{mine}.x.tmp", f".a.{mine}.x"])
