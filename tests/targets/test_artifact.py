"""The artifact folder: complete, checked before it takes its place, and honest when somebody changes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from bar_edge.errors import InputError
from bar_edge.records import ChannelPlan
from bar_edge.targets.artifact import ArtifactSpec, plan_hash, write_artifact
from bar_edge.targets.onnx.file import Preprocessing
from bar_edge.targets.verify import verify_artifact

PLAN = ChannelPlan(network="f00d", kept={"0": (0, 2)})
SPEC = ArtifactSpec(
    preprocessing=Preprocessing(mean=(0.5,), std=(0.25,)),
    classes=("cat", "dog"),
    budget="8x",
    plan=PLAN,
    lowering="slices",
)
SAMPLES = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "artifacts" / "onnx-fp32"
    assert write_artifact(network(), folder, samples=SAMPLES, spec=SPEC)["parity"]["within"]
    return folder


@pytest.fixture
def artifact(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    folder = tmp_path / "onnx-fp32"
    folder.mkdir()
    for file in written.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def failed(folder: Path) -> list[str]:
    return [check.name for check in verify_artifact(folder) if not check.passed]


def test_contents(written: Path) -> None:
    assert sorted(p.name for p in written.iterdir()) == ["manifest.json", "model.onnx", "samples.safetensors"]
    assert [p.name for p in written.parent.iterdir()] == ["onnx-fp32"]  # nothing temporary is left
    manifest = json.loads((written / "manifest.json").read_text())
    assert manifest["schema"] == 1
    assert (manifest["target"], manifest["precision"], manifest["lowering"]) == ("onnx", "fp32", "slices")
    assert manifest["inputs"] == [{"name": "input", "dtype": "float32", "shape": ["batch", 1, 6, 6], "layout": "NCHW"}]
    assert manifest["outputs"] == [{"name": "output", "dtype": "float32", "shape": ["batch", 2]}]
    assert manifest["normalisation"] == {"mean": [0.5], "std": [0.25], "inside": False}
    assert (manifest["classes"], manifest["budget"], manifest["plan"]) == (["cat", "dog"], "8x", plan_hash(PLAN))
    assert manifest["parity"]["samples"] == 8 and manifest["parity"]["error"] <= 1e-5
    assert manifest["versions"]["onnxruntime"]
    inside = {p.key: p.value for p in onnx.load(written / "model.onnx").metadata_props}
    assert inside == {
        "plan": plan_hash(PLAN), "budget": "8x", "classes": '["cat", "dog"]', "mean": "[0.5]", "std": "[0.25]",
        "normalisation": "outside", "input_layout": "NCHW",
    }  # fmt: skip


def test_samples_are_the_networks_own_outputs(written: Path) -> None:
    tensors = load_file(written / "samples.safetensors")
    with torch.no_grad():
        expected = network().eval()(SAMPLES)
    assert torch.equal(torch.from_numpy(tensors["input"]), SAMPLES)
    assert torch.equal(torch.from_numpy(tensors["output"]), expected)  # the same torch code on the same machine


def test_no_machine_in_any_file(written: Path) -> None:
    for file in written.iterdir():
        for word in (str(written.parent), str(Path(torch.__file__).parent), os.uname().nodename):
            assert word.encode() not in file.read_bytes(), (file.name, word)


def test_verify_passes_and_needs_no_torch(artifact: Path) -> None:
    checks = verify_artifact(artifact)
    assert [c.name for c in checks] == ["hash of model.onnx", "hash of samples.safetensors", "description", "parity"]
    assert all(c.passed for c in checks)
    script = (
        f"import sys; sys.path[:0] = {sys.path!r}\nimport bar_edge.targets.verify\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize("name", ["model.onnx", "samples.safetensors"])
def test_a_changed_byte_or_a_missing_file_is_a_no(artifact: Path, name: str) -> None:
    content = bytearray((artifact / name).read_bytes())
    content[-5] ^= 1
    (artifact / name).write_bytes(content)
    assert failed(artifact) == [f"hash of {name}", "parity"]
    (artifact / name).unlink()
    assert failed(artifact) == [f"hash of {name}", "parity"]


def rehash(folder: Path, **changes: object) -> None:
    """Rewrite the manifest so that its hashes fit what lies there: a forger's work, or a wrong tool's."""
    from bar_edge.files import file_hash

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: {"sha256": file_hash(folder / name)} for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_other_weights_with_fitting_hashes_fail_parity(artifact: Path) -> None:
    model = onnx.load(artifact / "model.onnx")
    weights = next(t for t in model.graph.initializer if list(t.dims) == [2, 4])
    changed = onnx.numpy_helper.to_array(weights) * 1.01
    weights.CopyFrom(onnx.numpy_helper.from_array(changed, weights.name))
    onnx.save(model, artifact / "model.onnx")
    rehash(artifact)
    assert failed(artifact) == ["parity"]


def test_rubbish_with_fitting_hashes_is_a_no_not_a_crash(artifact: Path) -> None:
    (artifact / "model.onnx").write_bytes(b"not a model")
    rehash(artifact)
    assert failed(artifact) == ["parity"]


def test_a_manifest_that_claims_another_budget_is_found_out(artifact: Path) -> None:
    rehash(artifact, budget="16x", parity={"tolerance": 100})
    assert failed(artifact) == ["description"]


def test_what_is_no_artifact_is_bad_input(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="artifact folder"):
        verify_artifact(tmp_path)
    good = json.loads((artifact / "manifest.json").read_text())
    outside = {**good, "files": {**good["files"], "../secret": {"sha256": "0" * 64}}}
    for bad in (
        [],
        {"schema": 2},
        {**good, "files": {}},
        {**good, "precision": "int3"},
        {**good, "inputs": None},
        outside,
    ):
        (artifact / "manifest.json").write_text(json.dumps(bad))
        with pytest.raises(InputError, match="schema 1"):
            verify_artifact(artifact)


def test_preprocessing_inside(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (8, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    spec = ArtifactSpec(preprocessing=SPEC.preprocessing, with_preprocessing=True)
    manifest = write_artifact(network(), tmp_path / "raw", samples=images, spec=spec)
    assert manifest["inputs"][0]["dtype"] == "uint8" and manifest["normalisation"]["inside"]
    tensors = load_file(tmp_path / "raw" / "samples.safetensors")
    with torch.no_grad():
        expected = network().eval()((images / 255 - 0.5) / 0.25)
    assert torch.allclose(torch.from_numpy(tensors["output"]), expected, atol=1e-5)  # float32 in another order
    assert failed(tmp_path / "raw") == []


def test_failure_leaves_the_earlier_artifact(artifact: Path, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in artifact.iterdir()}
    # a file that computes something else than the reference (a lowering gone wrong) does not take the place
    manifest = write_artifact(network(1), artifact, samples=SAMPLES, spec=SPEC, reference=network(0))
    assert not manifest["parity"]["within"] and manifest["parity"]["error"] > 1e-4
    with pytest.raises(InputError):
        write_artifact(nn.Flatten(0), artifact, samples=SAMPLES, spec=SPEC)
    assert {p.name: p.read_bytes() for p in artifact.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["onnx-fp32"]
    assert failed(artifact) == []


def test_success_replaces_the_earlier_artifact_and_its_measurements(artifact: Path, tmp_path: Path) -> None:
    (artifact / "bench-onnxruntime-cpu-t1-b1.json").write_text("{}")  # it measured the earlier file
    write_artifact(network(1), artifact, samples=SAMPLES, spec=SPEC)
    assert sorted(p.name for p in artifact.iterdir()) == ["manifest.json", "model.onnx", "samples.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["onnx-fp32"]


def test_a_folder_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(InputError, match="something else"):
        write_artifact(network(), tmp_path / "photos", samples=SAMPLES, spec=SPEC)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="place to write"):
        write_artifact(network(), tmp_path / "file" / "onnx-fp32", samples=SAMPLES, spec=SPEC)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


def test_preprocessing_inside_needs_numbers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mean and standard deviation"):
        write_artifact(network(), tmp_path / "a", samples=SAMPLES, spec=ArtifactSpec(with_preprocessing=True))
