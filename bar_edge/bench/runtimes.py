"""What loads a model file and runs it: one short adapter per runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bar_edge.errors import EnvironmentLacks, InputError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A model file that is ready to run."""

    #: runs once on one array per input, in order; the outputs do not matter here
    run: Callable[[list[Any]], Any]
    #: (numpy dtype, shape) of each input; an axis of free size is a text or None
    inputs: tuple[tuple[str, tuple[int | str | None, ...]], ...]
    version: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a file is run."""

    threads: int = 1
    #: inputs per inference
    batch: int = 1
    #: of the arithmetic where the file leaves it open: fp32 or bf16
    precision: str = "fp32"
    #: no other model runs in this process
    alone: bool = True


def load_onnxruntime_cpu(path: Path, settings: Settings) -> Loaded:
    """Load an ONNX file in ONNX Runtime on the CPU; operators run one after the other.

    Raises EnvironmentLacks without onnxruntime and InputError for a file that it cannot load.
    """
    return _load_onnxruntime(path, settings, "CPUExecutionProvider")


def load_onnxruntime_cuda(path: Path, settings: Settings) -> Loaded:
    """Load an ONNX file in ONNX Runtime on an NVIDIA GPU; a run copies the inputs there and the outputs back.

    Raises EnvironmentLacks without onnxruntime-gpu or a GPU that it can use.
    """
    return _load_onnxruntime(path, settings, "CUDAExecutionProvider")


def load_openvino_cpu(path: Path, settings: Settings) -> Loaded:
    """Load an ONNX file in OpenVINO on the CPU, compiled for one stream and a fixed batch.

    Raises EnvironmentLacks without openvino and InputError for a file that it cannot load.
    """
    try:
        import openvino
    except ImportError as error:
        raise EnvironmentLacks("openvino", got=f"{error}", remedy='pip install "bar-edge[openvino]"') from error
    core = openvino.Core()
    try:
        model = core.read_model(path)
        inputs = tuple(
            (
                _known(str(value.element_type.to_dtype())),
                tuple(size.get_length() if size.is_static else None for size in value.partial_shape),
            )
            for value in model.inputs
        )
        # a batch that is left open would have every shape inferred anew at every run
        open_batch = {
            v: [settings.batch, *list(v.partial_shape)[1:]] for v in model.inputs if v.partial_shape[0].is_dynamic
        }
        model.reshape(open_batch)
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": settings.threads,
                "NUM_STREAMS": 1,
                # it would bind the thread to one core, and wait there for whatever else runs on it
                "ENABLE_CPU_PINNING": False,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[settings.precision],
            },
        )
    except RuntimeError as error:
        raise _refused(path, "OpenVINO", error) from error
    request = compiled.create_infer_request()
    return Loaded(
        run=lambda arrays: request.infer(arrays, share_inputs=True, share_outputs=True),
        inputs=inputs,
        version=str(openvino.__version__),
    )


def _load_onnxruntime(path: Path, settings: Settings, provider: str) -> Loaded:
    package = "onnxruntime" if provider == "CPUExecutionProvider" else "onnxruntime-gpu"
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentLacks(package, got=f"{error}", remedy=f"pip install {package}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = settings.threads, 1
    options.log_severity_level = 3
    if not settings.alone:  # idle threads of one session would spin on the cores that the other one is measured on
        options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise _refused(path, "ONNX Runtime", error) from error
    if provider not in session.get_providers():  # it warns and falls back to the CPU
        raise EnvironmentLacks(
            f"{package} with a GPU that it can use",
            got=f"{', '.join(session.get_providers())} only",
            remedy=f"install {package} and the CUDA libraries that it names",
        )
    specifications = session.get_inputs()
    names = [value.name for value in specifications]
    return Loaded(
        run=lambda arrays: session.run(None, dict(zip(names, arrays, strict=True))),
        inputs=tuple(
            (_known({"float": "float32"}.get(kind, kind)), tuple(value.shape))
            for value in specifications
            for kind in [value.type.removeprefix("tensor(").removesuffix(")")]
        ),
        version=str(onnxruntime.__version__),
    )


def _known(dtype: str) -> str:
    if dtype not in ("float32", "uint8"):
        raise InputError("inputs of float32 or uint8", got=dtype, consequence="nothing was measured")
    return dtype


def _refused(path: Path, runtime: str, error: Exception) -> InputError:
    got = f"{path.name}: {str(error).strip()[:200]}"
    return InputError(f"an ONNX file that {runtime} loads", got=got, consequence="nothing was measured")


RUNTIMES: dict[str, Callable[[Path, Settings], Loaded]] = {
    "onnxruntime-cpu": load_onnxruntime_cpu,
    "onnxruntime-cuda": load_onnxruntime_cuda,
    "openvino-cpu": load_openvino_cpu,
}
#: what a runtime can compute in where the file leaves it open; bf16 rounds by itself, without calibration
PRECISIONS = {"onnxruntime-cpu": ("fp32",), "onnxruntime-cuda": ("fp32",), "openvino-cpu": ("fp32", "bf16")}
