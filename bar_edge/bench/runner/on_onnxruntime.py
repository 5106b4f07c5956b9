"""ONNX Runtime: on the CPU, on an NVIDIA GPU, with TensorRT."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from .records import Loaded, Problem, Runtime, Settings
from .telling import package, refused


def load_onnxruntime_cpu(path: Path, name: str, settings: Settings) -> Loaded:
    """Load an ONNX file in ONNX Runtime on the CPU; operators run one after the other."""
    return _load_onnxruntime(path, name, settings, "CPUExecutionProvider", {})


def load_onnxruntime_cuda(path: Path, name: str, settings: Settings) -> Loaded:
    """Load an ONNX file in ONNX Runtime on an NVIDIA GPU; a run copies the inputs there and the outputs back."""
    return _load_onnxruntime(path, name, settings, "CUDAExecutionProvider", {"use_tf32": "0"})


def load_onnxruntime_tensorrt(path: Path, name: str, settings: Settings) -> Loaded:
    """Load an ONNX file in ONNX Runtime with TensorRT; its engines are kept beside the file.

    What TensorRT does not take runs on the CUDA provider. The cache's folder is named after what is in the file and
    ONNX Runtime's version: the provider itself knows an engine by its file's name only.
    """
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # fp32 means fp32; the provider has no option for it
    version = str(package("onnxruntime", "onnxruntime-gpu").__version__)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    cache = str(path.parent / f"engines-{digest}-{version}")
    allowed = [] if settings.precision == "fp32" else [f"trt_{settings.precision}_enable"]
    flags = ("trt_engine_cache_enable", "trt_timing_cache_enable", *allowed)
    options = {"trt_engine_cache_path": cache, "trt_timing_cache_path": cache, **dict.fromkeys(flags, "True")}
    return _load_onnxruntime(path, name, settings, "TensorrtExecutionProvider", options)


def _load_onnxruntime(path: Path, name: str, settings: Settings, provider: str, provider_options: Any) -> Loaded:
    install = "onnxruntime" if provider == "CPUExecutionProvider" else "onnxruntime-gpu"
    onnxruntime = package("onnxruntime", install)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = settings.threads, 1
    options.log_severity_level = 3
    if not settings.alone:  # idle threads of one session would spin on the cores that the other one is measured on
        options.add_session_config_entry("session.force_spinning_stop", "1")
    providers, libraries = [(provider, provider_options)], "CUDA, cuDNN"
    if provider == "TensorrtExecutionProvider":
        providers.append(("CUDAExecutionProvider", {"use_tf32": "0"}))
        libraries += ", TensorRT"
    remedy = f"install {install} with {libraries} of the versions that it names"
    lacks = functools.partial(Problem, "EnvironmentLacks", f"{install} with a GPU that it can use", remedy=remedy)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base class
        _, please, advice = str(error).partition("Please install")
        if please:
            raise lacks(got=f"{please}{advice}".strip()[:200]) from error
        raise refused(name, "ONNX Runtime", error) from error
    if provider not in session.get_providers():  # it warns and falls back to the CPU
        raise lacks(got=f"{', '.join(session.get_providers())} only")
    values, dtypes = session.get_inputs(), {"tensor(float)": "float32", "tensor(uint8)": "uint8"}
    names = [value.name for value in values]
    return Loaded(
        run=lambda arrays: session.run(None, dict(zip(names, arrays))),
        inputs=[(dtypes.get(value.type, value.type), list(value.shape)) for value in values],
        version=str(onnxruntime.__version__),
    )


#: ONNX Runtime's TensorRT must be allowed the types that are in a file of fp16, bf16 or int8
CPU = Runtime("onnxruntime-cpu", load_onnxruntime_cpu, ("fp32",), gpu=False)
CUDA = Runtime("onnxruntime-cuda", load_onnxruntime_cuda, ("fp32",), gpu=True, provider="CUDAExecutionProvider")
TENSORRT = Runtime(
    "onnxruntime-tensorrt",
    load_onnxruntime_tensorrt,
    ("fp32", "fp16", "bf16", "int8"),
    gpu=True,
    builds=True,
    provider="TensorrtExecutionProvider",
)
