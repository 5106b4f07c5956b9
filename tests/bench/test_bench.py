"""Measuring: what is run and recorded, what is withheld, and how it fails. No test asserts a speed."""

import ast
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from bar_edge import pipeline
from bar_edge.bench import (
    RUNTIMES,
    Measurement,
    agent,
    bench_onnx,
    compare,
    drift,
    load_measurement,
    median_interval,
    meets,
    runtimes_here,
    save_measurement,
    summary,
)
from bar_edge.bench.runner import device as described
from bar_edge.bench.runner.inputs import read_safetensors
from bar_edge.bench.runner.on_openvino import load_openvino_cpu
from bar_edge.bench.runner.records import Problem, Settings
from bar_edge.bench.runner.runtimes import RUNTIMES as ROWS
from bar_edge.bench.runner.timing import BURST, MIN_RUNS, UNTIMED, interleave, warm_up
from bar_edge.errors import EnvironmentLacks, InputError
from bar_edge.records import Budget
from bar_edge.requests import BenchRequest
from tests.targets.tensorrt_surface import download

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")


def bf16_or_no() -> AbstractContextManager[object]:
    """Expect that OpenVINO computes in bf16, or that it is said where this processor has none."""
    if torch.cpu._is_avx512_bf16_supported():
        return nullcontext()
    return pytest.raises(EnvironmentLacks, match="a CPU that OpenVINO computes bf16 on")


def relu_file(path: Path, shape: tuple[str | int, ...] = ("batch", 3, 4, 4), dtype: int = TensorProto.FLOAT) -> Path:
    """Write the smallest network there is."""
    values = [helper.make_tensor_value_info(name, dtype, shape) for name in ("input", "output")]
    node = helper.make_node("Relu" if dtype == TensorProto.FLOAT else "Identity", ["input"], ["output"])
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def artifact(folder: Path, *, off: float = 0.0, dtype: int = TensorProto.FLOAT) -> Path:
    """Write an artifact of five samples whose expected outputs are off by a share of the largest."""
    folder.mkdir()
    relu_file(folder / "model.onnx", dtype=dtype)
    images = np.random.default_rng(0).standard_normal((5, 3, 4, 4)).astype(np.float32)
    if dtype == TensorProto.UINT8:
        images = (images * 50 + 128).clip(0, 255).astype(np.uint8)
    outputs = np.maximum(images, 0)
    save_file(
        {"input": images, "output": (outputs + off * outputs.max()).astype(outputs.dtype)},
        folder / "samples.safetensors",
    )
    manifest = {"inputs": [{"name": "input"}], "outputs": [{"name": "output"}], "parity": {"tolerance": 1e-4}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def latency(samples: list[float], name: str = "a", **other: object) -> Measurement:
    settings = {"on": "local", "runtime": "onnxruntime-cpu", "precision": "fp32", "threads": 1}
    environment = {**settings, **other.pop("environment", {})}
    return Measurement(name=name, samples_ms=tuple(samples), warmup_runs=10, batch=1, environment=environment, **other)


def test_a_real_measurement_and_its_record(tmp_path: Path) -> None:
    folder = tmp_path / "onnx-fp32"
    folder.mkdir()
    relu_file(folder / "model.onnx")
    (record,) = bench_onnx([folder], seconds=0.05, threads=2, batch=3, seed=4)
    assert record.name == "onnx-fp32" and record.batch == 3
    assert len(record.samples_ms) >= MIN_RUNS and min(record.samples_ms) > 0
    assert record.warmup_runs >= 10
    environment = record.environment
    assert (environment["runtime"], environment["threads"], environment["interleaved"]) == ("onnxruntime-cpu", 2, 1)
    assert (
        environment["cpu"]
        and environment["os"]
        and environment["runtime_version"]
        and len(environment["model_sha256"]) == 64
    )
    budget = Budget.parse("10000ms")
    path = save_measurement(folder, record, budget=budget)
    assert path == folder / "bench-onnxruntime-cpu-t2-b3.json"
    data = json.loads(path.read_text())
    assert data["schema"] == 1 and data["runs"] == len(data["samples_ms"])
    assert tuple(data["samples_ms"]) == record.samples_ms
    assert data["budget"] == {"text": "10000ms", "limit_ms": 10000, "within": True}
    for word in (os.uname().nodename, str(tmp_path)):
        assert word not in path.read_text()


def test_uint8_input_and_two_files_in_rounds(tmp_path: Path) -> None:
    files = [relu_file(tmp_path / "a.onnx"), relu_file(tmp_path / "b.onnx", dtype=TensorProto.UINT8)]
    a, b = bench_onnx(files, seconds=0.05)
    assert [a.name, b.name] == ["a.onnx", "b.onnx"]
    assert len(a.samples_ms) == len(b.samples_ms) and a.environment["interleaved"] == 2
    comparison = compare(a, b)
    assert comparison.low <= comparison.speedup <= comparison.high and comparison.against == "b.onnx"


@needs_openvino
def test_openvino(tmp_path: Path) -> None:
    files = [relu_file(tmp_path / "a.onnx"), relu_file(tmp_path / "b.onnx", dtype=TensorProto.UINT8)]
    a, b = bench_onnx(files, runtime="openvino-cpu", threads=2, batch=3, seconds=0.05)
    assert len(a.samples_ms) == len(b.samples_ms) >= MIN_RUNS
    assert (a.environment["runtime"], a.environment["precision"]) == ("openvino-cpu", "fp32")
    with bf16_or_no():
        (half,) = bench_onnx(files[:1], runtime="openvino-cpu", precision="bf16", seconds=0.05)
        assert save_measurement(files[0], half).name == "bench-openvino-cpu-bf16-t1-b1.json"
    (tmp_path / "bad.onnx").write_bytes(b"rubbish")
    with pytest.raises(InputError, match=r"bad\.onnx"):
        bench_onnx([tmp_path / "bad.onnx"], runtime="openvino-cpu")
    with pytest.raises(InputError, match="batch 1, which the file fixes"):
        bench_onnx([relu_file(tmp_path / "one.onnx", (1, 3, 4, 4))], runtime="openvino-cpu", batch=2)
    with pytest.raises(InputError, match="float32 or uint8"):
        bench_onnx([relu_file(tmp_path / "int.onnx", dtype=TensorProto.INT64)], runtime="openvino-cpu")


def test_onnxruntime_cuda_without_a_gpu_says_so(tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(EnvironmentLacks, match="onnxruntime-gpu"):
        bench_onnx([relu_file(tmp_path / "a.onnx")], runtime="onnxruntime-cuda")


def tensorrt_options(path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> dict[str, str]:
    """Return what the runner asks of ONNX Runtime's TensorRT provider."""
    import onnxruntime

    given: list[tuple[str, dict[str, str]]] = []

    def session(_path: str, _options: object, *, providers: list[tuple[str, dict[str, str]]], **_: int) -> object:
        given.extend(providers)
        raise RuntimeError("Please install TensorRT libraries")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(Problem) as caught:
        ROWS["onnxruntime-tensorrt"].load(path, path.name, Settings(1, 1, precision, True))
    assert caught.value.fields["kind"] == "EnvironmentLacks" and "TensorRT" in caught.value.fields["remedy"]
    assert [name for name, _ in given] == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    return given[0][1]


def test_onnxruntimes_tensorrt_is_allowed_what_the_precision_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = relu_file(tmp_path / "a.onnx")
    caches = set()
    for precision in ROWS["onnxruntime-tensorrt"].precisions:
        options = tensorrt_options(path, monkeypatch, precision)
        flags = {name for name in options if re.fullmatch("trt_(fp16|bf16|int8)_enable", name)}
        assert flags == ({f"trt_{precision}_enable"} if precision != "fp32" else set())
        caches.add(options["trt_engine_cache_path"])
    path.write_bytes(relu_file(tmp_path / "b.onnx", (5, 3, 4, 4)).read_bytes())
    caches.add(tensorrt_options(path, monkeypatch, "fp32")["trt_engine_cache_path"])
    assert len(caches) == 2, "an engine of an older file would be taken for this one"
    assert all(Path(cache).parent == tmp_path for cache in caches)


@pytest.mark.network
def test_the_real_onnxruntime_knows_our_tensorrt_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bindings take apart each option by name, and say what its value should be."""
    try:
        wheel = download("onnxruntime-gpu==1.31.1", tmp_path)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"onnxruntime-gpu cannot be downloaded: {type(error).__name__}")
    (bindings,) = wheel.glob("onnxruntime/capi/onnxruntime_pybind11_state*.so")
    text = bindings.read_bytes().decode("latin-1")
    for precision in ROWS["onnxruntime-tensorrt"].precisions:
        for name, value in tensorrt_options(relu_file(tmp_path / "a.onnx"), monkeypatch, precision).items():
            said = re.search(f"The value for the key '{name}' should be ([^\0]*)", text)
            assert said and (value in said.group(1) if name.endswith("_enable") else "a path" in said.group(1)), name


def test_what_runs_on_the_device_is_old_python_and_imports_little() -> None:
    runner = sorted(Path(described.__file__).parent.glob("*.py"))
    for file, allowed in (*((file, {"numpy"}) for file in runner), (Path(agent.__file__), set())):
        tree = ast.parse(file.read_text(), feature_version=(3, 8))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names | allowed
    script = f"import sys; sys.path[:0] = {sys.path!r}\nimport bar_edge.bench\n"
    script += "sys.exit(bool({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_rounds_run_every_file_in_a_row_in_an_order_that_changes() -> None:
    log: list[int] = []
    samples, _ = interleave([lambda: log.append(0), lambda: log.append(1)], 0.01, random.Random(0))
    rounds = [tuple(log[i : i + 2 * BURST]) for i in range(0, len(log), 2 * BURST)]
    rows = (0,) * BURST, (1,) * BURST
    assert set(rounds) == {rows[0] + rows[1], rows[1] + rows[0]}
    assert abs(np.mean([r[0] == 0 for r in rounds]) - 0.5) < 0.25  # at least a hundred rounds in 10 ms
    assert [len(s) for s in samples] == [len(rounds) * (BURST - UNTIMED)] * 2  # the first of a row are not timed
    (wall,), (cpu,) = interleave([lambda: time.sleep(0.01)], 1e-9, random.Random(0))
    assert len(wall) == len(cpu) == MIN_RUNS
    assert min(wall) >= 10 > 5 > max(cpu)  # asleep for 10 ms, and computing for almost none of them


def test_warm_up_goes_on_until_stable() -> None:
    pauses = iter([0.06, 0.06, 0.05, 0.05, 0.03, 0.03, 0.03] + [0.02] * 100)
    runs, stable = warm_up(lambda: time.sleep(next(pauses)))
    assert stable and runs >= 15  # a stable pair of windows of 5 exists from run 8 on only


def test_percentiles_only_with_the_samples_to_carry_them() -> None:
    def carried(n: int) -> list[str]:
        return [p for p, v in summary(latency([1.0] * n))["percentiles_ms"].items() if v is not None]

    assert [carried(n) for n in (10, 63, 64, 661, 662)] == [
        ["p50"],
        ["p50"],
        ["p50", "p90"],
        ["p50", "p90"],
        ["p50", "p90", "p99"],
    ]


def test_verdict_is_by_the_median() -> None:
    samples = [7.0] * 6 + [100.0] * 5
    assert meets(latency(samples), Budget.parse("7ms")) and not meets(latency(samples), Budget.parse("6.9ms"))
    with pytest.raises(InputError, match="milliseconds"):
        meets(latency(samples), Budget.parse("8x"))
    with pytest.raises(InputError, match="at least 5 runs"):
        meets(latency([1.0] * 4), Budget.parse("8ms"))


def test_drift_is_second_half_over_first() -> None:
    assert drift(latency([2.0] * 10 + [3.0] * 10)) == pytest.approx(0.5)
    assert drift(latency([2.0] * 11)) == 0


def test_comparison_interval() -> None:
    rng = np.random.default_rng(0)
    base, two = rng.normal(10, 1, 400), {"environment": {"interleaved": 2}}
    fast, slow = latency(list(base), **two), latency(list(base * 1.5 + rng.normal(0, 0.1, 400)), "slow", **two)
    result = compare(fast, slow)
    assert result.low < 1.5 < result.high and result.high - result.low < 0.1
    assert compare(slow, fast).speedup == pytest.approx(1 / result.speedup)
    same = compare(fast, latency(list(rng.permutation(base))))
    assert result.interleaved
    # at another time: the noise that both shared no longer cancels
    apart = compare(latency(list(base)), slow)
    assert apart.low < 1.5 < apart.high and not apart.interleaved
    assert apart.high - apart.low > 2 * (result.high - result.low)
    assert same.low < 1 < same.high
    # runs that share the machine's mood say less: the interval must widen
    mood = np.repeat(rng.normal(0, 3, 20), 20)
    moody = compare(fast, latency(list(base + mood)))
    calm = compare(fast, latency(list(base + rng.permutation(mood))))
    assert moody.high - moody.low > 1.5 * (calm.high - calm.low)
    with pytest.raises(InputError, match="same rounds"):
        compare(fast, latency([1.0] * 10))


def test_bad_input(tmp_path: Path) -> None:
    good = relu_file(tmp_path / "good.onnx")
    with pytest.raises(InputError, match="onnxruntime-cpu"):
        bench_onnx([good], runtime="abacus")
    with pytest.raises(InputError, match="for onnxruntime-cpu a precision out of: fp32"):
        bench_onnx([good], precision="bf16")
    with pytest.raises(InputError, match="artifact folder"):
        bench_onnx([tmp_path])
    with pytest.raises(InputError, match="above 0"):
        bench_onnx([good], threads=0)
    (tmp_path / "bad.onnx").write_bytes(b"rubbish")
    with pytest.raises(InputError, match=r"bad\.onnx"):
        bench_onnx([tmp_path / "bad.onnx"])
    with pytest.raises(InputError, match="batch 1, which the file fixes"):
        bench_onnx([relu_file(tmp_path / "one.onnx", (1, 3, 4, 4))], batch=2)
    with pytest.raises(InputError, match="sizes are fixed"):
        bench_onnx([relu_file(tmp_path / "free.onnx", ("batch", 3, "h", "w"))])
    with pytest.raises(InputError, match="float32 or uint8"):
        bench_onnx([relu_file(tmp_path / "int.onnx", dtype=TensorProto.INT64)])


@pytest.mark.parametrize(
    ("onnxruntime", "text"),
    [
        ("raise ImportError('No module named onnxruntime')", "pip install"),
        ("import os; os.abort()", r"SIGABRT while loading a\.onnx"),
        ("import os; os._exit(7)", "exit status 7"),
        ("raise RuntimeError('broken library')", "broken library"),
        ("import time; time.sleep(60)", r"no answer within 3 s while loading a\.onnx"),
    ],
    ids=["missing", "killed", "gone", "raises", "hangs"],
)
def test_a_runtime_that_fails(onnxruntime: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text(onnxruntime)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EnvironmentLacks, match=text):
        bench_onnx([relu_file(tmp_path / "a.onnx")], timeout_s=3)


def test_a_runtime_that_prints_breaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text(
        "import os\nos.write(1, b'hello from C\\n')\nprint('hello')\n__version__ = '0'\n"
        "class SessionOptions:\n    def add_session_config_entry(self, *entry): pass\n"
        "class InferenceSession:\n    def __init__(self, *a, **k): pass\n    def get_inputs(self): return []\n"
        "    def get_providers(self): return ['CPUExecutionProvider']\n"
        "    def run(self, *a): sum(range(1000))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (record,) = bench_onnx([relu_file(tmp_path / "a.onnx")], seconds=0.01)
    assert record.environment["runtime_version"] == "0" and len(record.samples_ms) >= MIN_RUNS


def test_an_earlier_measurement_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = relu_file(tmp_path / "a.onnx")
    path = save_measurement(model, latency([1.0] * 10))
    before = path.read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        save_measurement(model, latency([2.0] * 10))
    assert path.read_text() == before


@pytest.mark.parametrize("runtime", ["onnxruntime-cpu", pytest.param("openvino-cpu", marks=needs_openvino)])
@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_are_compared_with_those_that_the_artifact_carries(runtime: str, batch: int, tmp_path: Path) -> None:
    files = [artifact(tmp_path / "right"), artifact(tmp_path / "wrong", off=2e-4)]
    right, wrong = bench_onnx(files, runtime=runtime, batch=batch, seconds=0.02)
    assert right.parity is not None and wrong.parity is not None
    assert right.parity["within"] and right.parity["error"] < 1e-6 and right.parity["n"] == 5
    assert not wrong.parity["within"] and wrong.parity["error"] == pytest.approx(2e-4, rel=0.01)
    assert not any("outputs" in text for text in summary(right)["warnings"])
    assert any("outputs are wrong" in text for text in summary(wrong)["warnings"])


def test_fast_but_wrong_is_no(tmp_path: Path) -> None:
    assert pipeline.bench(artifact(tmp_path / "right"), BenchRequest(seconds=0.02))["verdict"] is None
    assert (
        pipeline.bench(artifact(tmp_path / "uint8", dtype=TensorProto.UINT8), BenchRequest(seconds=0.02))["parity"][
            "error"
        ]
        == 0
    )
    wrong = pipeline.bench(artifact(tmp_path / "wrong", off=1.0), BenchRequest(seconds=0.02, budget="1000ms"))
    assert wrong["verdict"] is False and wrong["budget"]["within"] and not wrong["parity"]["within"]
    nan = pipeline.bench(artifact(tmp_path / "nan", off=float("nan")), BenchRequest(seconds=0.02))
    assert nan["verdict"] is False


@pytest.mark.parametrize(("used", "right"), [("<Type: 'float32'>", False), ("<Type: 'bfloat16'>", True)])
def test_bf16_that_openvino_does_not_compute_in_is_said(
    monkeypatch: pytest.MonkeyPatch, used: str, right: bool
) -> None:
    """It takes the hint on every CPU, and follows it on those that have bf16."""
    request = SimpleNamespace(infer=None)
    compiled = SimpleNamespace(get_property=lambda name: used, create_infer_request=lambda: request)
    model = SimpleNamespace(inputs=[], reshape=lambda shapes: None)
    core = SimpleNamespace(read_model=lambda path: model, compile_model=lambda *_: compiled)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core, __version__="0"))
    for precision in ("fp32", "bf16"):
        settings = Settings(1, 1, precision, alone=True)
        refused = pytest.raises(Problem, match="a CPU that OpenVINO computes bf16 on")
        with nullcontext() if right or precision == "fp32" else refused:
            assert load_openvino_cpu(Path("a.onnx"), "a.onnx", settings).version == "0"


@needs_openvino
def test_bf16_may_be_further_off(tmp_path: Path) -> None:
    off = artifact(tmp_path / "off", off=0.01)
    for precision, within, expected in (("fp32", False, nullcontext()), ("bf16", True, bf16_or_no())):
        with expected:
            (found,) = bench_onnx([off], runtime="openvino-cpu", precision=precision, seconds=0.02)
            assert found.parity is not None and found.parity["within"] is within


def test_samples_that_cannot_be_read(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a")
    samples = folder / "samples.safetensors"
    whole = samples.read_bytes()
    for damaged in (whole[:-4], whole[:20], b"", b"\xff" * 30):
        samples.write_bytes(damaged)
        with pytest.raises(InputError, match=r"samples\.safetensors"):
            bench_onnx([folder])
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="manifest"):
        bench_onnx([folder])


def test_safetensors_as_the_library_writes_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        str(kind): (rng.standard_normal((3, 0, 2) if kind == "float16" else (3, 2)) * 9).astype(kind)
        for kind in ("float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool")
    }
    save_file(tensors, tmp_path / "a", metadata={"made": "here"})
    found = read_safetensors(tmp_path / "a")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and np.array_equal(found[name], tensor)


def test_interval_of_the_median_covers_it() -> None:
    def covered(noise: list[np.ndarray]) -> float:
        found = [median_interval(latency(list(100 + x))) for x in noise]
        return float(np.mean([i is not None and i.low_ms <= 100 <= i.high_ms for i in found]))

    rng = np.random.default_rng(0)
    independent = list(rng.normal(size=(200, 101)))
    hanging_together = [np.zeros(1000) for _ in range(100)]
    for noise in hanging_together:
        for i in range(1, 1000):
            noise[i] = 0.9 * noise[i - 1] + rng.normal()
    assert 0.9 < covered(independent) < 1
    assert covered(hanging_together) > 0.9  # about 0.4 if each run counted as a witness of its own
    assert median_interval(latency([1.0] * 5)) is None
    constant = median_interval(latency([1.0] * 100))
    assert constant is not None and (constant.low_ms, constant.high_ms, constant.blocks) == (1, 1, 100)


def test_an_older_measurement_is_compared_with_only_if_device_settings_and_versions_are_the_same(
    tmp_path: Path,
) -> None:
    file = relu_file(tmp_path / "a.onnx")
    answer = pipeline.bench(file, BenchRequest(seconds=0.02))
    older = tmp_path / answer["file"]
    again = pipeline.bench(relu_file(tmp_path / "b.onnx"), BenchRequest(seconds=0.02, against=older))
    assert again["comparison"]["against"] == "a.onnx" and again["comparison"]["interleaved"] is False
    data = json.loads(older.read_text())
    for name, other in (("power_mode", "MAXN"), ("cpu", "another"), ("runtime_version", "1.0"), ("threads", 7)):
        changed = {**data, "environment": {**data["environment"], name: other}}
        (tmp_path / "other.json").write_text(json.dumps(changed))
        with pytest.raises(EnvironmentLacks, match=f"{name.replace('_', ' ')} .*{other} there"):
            pipeline.bench(file, BenchRequest(seconds=0.02, against=tmp_path / "other.json"))
    (tmp_path / "other.json").write_text('{"schema": 2}')
    with pytest.raises(InputError, match="schema 2"):
        load_measurement(tmp_path / "other.json")


def test_interference_is_reported(tmp_path: Path) -> None:
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this system does not tell who waits for a core")
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        (disturbed,) = bench_onnx([relu_file(tmp_path / "a.onnx")], seconds=0.5)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    seen = disturbed.conditions["interference"]
    assert seen["cores_busy_elsewhere"] > 0.4 and seen["waited_for_core"] > 0.1 and seen["cpu_per_wall"] < 0.9
    assert any("disturbed" in text for text in summary(disturbed)["warnings"])
    assert 10 < disturbed.conditions["peak_rss_mb"] < 1000


def test_warnings() -> None:
    calm = {"interference": {"cores_busy_elsewhere": 0.1, "waited_for_core": 0.01, "cores_stolen": 0.0}}
    cool = {"cpu_mhz": 2000, "throttle_count": 3}
    for words, measured in {
        "": latency([1.0] * 100, conditions={**calm, "before": cool, "after": cool}),
        "clock fell from 2000 to 1500": latency([1.0] * 100, conditions={"before": cool, "after": {"cpu_mhz": 1500}}),
        "throttled": latency([1.0] * 100, conditions={"before": cool, "after": {"throttle_count": 4}}),
        "hypervisor took 0.50": latency([1.0] * 100, conditions={"interference": {"cores_stolen": 0.5}}),
        r"second half of the runs took \+10.0 %": latency([1.0] * 50 + [1.1] * 50),
        "had not settled": latency([1.0] * 100, warmup_stable=False),
        "no better than 5 %": latency([1.0, 1.2] * 10),
    }.items():
        found = summary(measured)["warnings"]
        assert bool(found) is bool(words)
        assert not words or any(re.search(words, text) for text in found), found


def test_what_a_jetson_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs' outputs as NVIDIA documents them; not run on a Jetson."""
    for name, text in {
        "nvpmodel": "NV Power Mode: MODE_15W\n2",
        "jetson_clocks": "SOC family:tegra234  Machine:Jetson\nOnline CPUs: 0-3\n"
        "cpu0: Online=1 Governor=schedutil MinFreq=1190400 MaxFreq=1190400 CurrentFreq=1190400 IdleStates: WFI=0\n"
        "GPU MinFreq=612000000 MaxFreq=612000000 CurrentFreq=306000000\nEMC MinFreq=204000000 MaxFreq=2133000000 "
        "CurrentFreq=2133000000 FreqOverride=1\n",
        "tegrastats": "RAM 1100/7000MB CPU [1%@1190] GR3D_FREQ 0% CPU@45C GPU@44C",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncat <<'E'\n{text}\nE\n" + "exec sleep 60\n" * (name == "tegrastats"))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = described.device(with_gpu=False)
    assert found["power_mode"] == "MODE_15W"
    assert "MaxFreq=612000000" in found["clocks"] and "Current" not in found["clocks"]
    assert described.state(with_gpu=False)["tegrastats"].startswith("RAM 1100")


def test_each_runtime_is_tried() -> None:
    found = runtimes_here()
    assert found.keys() == set(RUNTIMES)
    assert found["onnxruntime-cpu"].startswith("works, version ")
