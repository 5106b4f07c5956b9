"""OpenVINO on the CPU."""

from __future__ import annotations

from pathlib import Path

from .records import Loaded, Problem, Runtime, Settings
from .telling import package, refused


def load_openvino_cpu(path: Path, name: str, settings: Settings) -> Loaded:
    """Load an ONNX file in OpenVINO on the CPU, compiled for one stream and a fixed batch."""
    openvino = package("openvino")
    core = openvino.Core()
    try:
        model = core.read_model(path)
        sizes = [[s.get_length() if s.is_static else None for s in value.partial_shape] for value in model.inputs]
        inputs = [(str(v.element_type.to_dtype()), shape) for v, shape in zip(model.inputs, sizes)]
        # a batch that is left open would have every shape inferred anew at every run
        model.reshape({v: [settings.batch, *shape[1:]] for v, shape in zip(model.inputs, sizes) if shape[0] is None})
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
        raise refused(name, "OpenVINO", error) from error
    used = str(compiled.get_property("INFERENCE_PRECISION_HINT"))
    if settings.precision == "bf16" and "bfloat16" not in used:  # it ignores the hint where the CPU has no bf16
        raise Problem("EnvironmentLacks", "a CPU that OpenVINO computes bf16 on", f"one where it takes {used}")
    request = compiled.create_infer_request()
    return Loaded(
        run=lambda arrays: request.infer(arrays, share_inputs=True, share_outputs=True).to_tuple(),
        inputs=inputs,
        version=str(openvino.__version__),
    )


#: bf16 rounds by itself, without calibration
CPU = Runtime(
    "openvino-cpu",
    load_openvino_cpu,
    ("fp32", "bf16"),
    gpu=False,
    package="openvino",
    install='"bar-edge[openvino]"',
)
