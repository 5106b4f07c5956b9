"""Measuring: what is run and recorded, what is withheld, and how it fails. No test asserts a speed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bar_edge.bench import bench_onnx, compare, drift, meets, save_measurement, summary
from bar_edge.bench.worker import MIN_RUNS, interleave, warm_up
from bar_edge.errors import BarEdgeError, EnvironmentLacks, InputError
from bar_edge.records import Budget, Latency


def relu_file(path: Path, shape: tuple[str | int, ...] = ("batch", 3, 4, 4), dtype: int = TensorProto.FLOAT) -> Path:
    """Write the smallest network there is."""
    values = [helper.make_tensor_value_info(name, dtype, shape) for name in ("input", "output")]
    node = helper.make_node("Relu" if dtype == TensorProto.FLOAT else "Identity", ["input"], ["output"])
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def latency(samples: list[float], name: str = "a") -> Latency:
    environment: dict[str, str | int | float | None] = {"runtime": "onnxruntime-cpu", "precision": "fp32", "threads": 1}
    return Latency(name=name, samples_ms=tuple(samples), warmup_runs=10, batch=1, environment=environment)


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


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_openvino(tmp_path: Path) -> None:
    files = [relu_file(tmp_path / "a.onnx"), relu_file(tmp_path / "b.onnx", dtype=TensorProto.UINT8)]
    a, b = bench_onnx(files, runtime="openvino-cpu", threads=2, batch=3, seconds=0.05)
    assert len(a.samples_ms) == len(b.samples_ms) >= MIN_RUNS
    assert (a.environment["runtime"], a.environment["precision"]) == ("openvino-cpu", "fp32")
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


def test_the_worker_imports_no_torch() -> None:
    script = f"import sys; sys.path[:0] = {sys.path!r}\nimport bar_edge.bench.worker\n"
    script += "sys.exit(bool({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_rounds_run_every_file_once_in_an_order_that_changes() -> None:
    log: list[int] = []
    samples = interleave([lambda: log.append(0), lambda: log.append(1)], 0.01, np.random.default_rng(0))
    rounds = [tuple(log[i : i + 2]) for i in range(0, len(log), 2)]
    assert set(rounds) == {(0, 1), (1, 0)}
    assert abs(np.mean([r == (0, 1) for r in rounds]) - 0.5) < 0.2  # at least hundreds of rounds in 10 ms
    assert [len(s) for s in samples] == [len(rounds)] * 2
    assert len(interleave([lambda: None], 1e-9, np.random.default_rng(0))[0]) == MIN_RUNS


def test_warm_up_goes_on_until_stable() -> None:
    import time

    pauses = iter([0.06, 0.06, 0.05, 0.05, 0.03, 0.03, 0.03] + [0.02] * 100)
    assert warm_up(lambda: time.sleep(next(pauses))) >= 15  # a stable pair of windows of 5 exists from run 8 on only


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
    base = rng.normal(10, 1, 400)
    fast, slow = latency(list(base)), latency(list(base * 1.5 + rng.normal(0, 0.1, 400)), "slow")
    result = compare(fast, slow)
    assert result.low < 1.5 < result.high and result.high - result.low < 0.1
    assert compare(slow, fast).speedup == pytest.approx(1 / result.speedup)
    same = compare(fast, latency(list(rng.permutation(base))))
    assert same.low < 1 < same.high
    # runs that share the machine's mood say less: the interval must widen
    mood = np.repeat(rng.normal(0, 3, 20), 20)
    moody = compare(latency(list(base)), latency(list(base + mood)))
    calm = compare(latency(list(base)), latency(list(base + rng.permutation(mood))))
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
    ("onnxruntime", "kind", "text"),
    [
        ("raise ImportError('No module named onnxruntime')", EnvironmentLacks, "pip install"),
        ("import os; os.abort()", BarEdgeError, r"SIGABRT while loading a\.onnx"),
        ("import os; os._exit(7)", BarEdgeError, "exit status 7"),
        ("raise RuntimeError('broken library')", BarEdgeError, "broken library"),
        ("import time; time.sleep(60)", BarEdgeError, r"no answer within 3 s while loading a\.onnx"),
    ],
    ids=["missing", "killed", "gone", "raises", "hangs"],
)
def test_a_runtime_that_fails(
    onnxruntime: str, kind: type[Exception], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text(onnxruntime)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(kind, match=text) as caught:
        bench_onnx([relu_file(tmp_path / "a.onnx")], timeout_s=3)
    assert type(caught.value) is kind


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

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left"):
        save_measurement(model, latency([2.0] * 10))
    assert path.read_text() == before
