"""An ONNX file to a TensorRT engine on this machine.

A bundle takes it to the device as it is, with the modules that it imports; it needs Python 3.10 and numpy there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bar_edge.errors import BarEdgeError, EnvironmentLacks, InputError
from bar_edge.files import write_bytes, write_json
from bar_edge.targets.tensorrt.bindings import given, import_tensorrt, make, new_log
from bar_edge.targets.tensorrt.cuda import Cuda
from bar_edge.targets.tensorrt.engine import REBUILD, manifest_path, read_model, sha256
from bar_edge.targets.tensorrt.options import HARDWARE, EngineOptions

#: how TensorRT complains -> what to do; the first that is found counts
REMEDIES = {
    r"[Oo]ut ?[Oo]f ?[Mm]emory|Cuda Runtime \(out of memory\)|insufficient memory": "free memory on the GPU, build for "
    "a smaller largest batch, or set a lower workspace limit",
    r"workspace|memory pool": "allow more workspace, or set no limit",
    r"must have (the )?same (input )?types|[Tt]ype mismatch": "export the ONNX file again: its types must agree "
    "at every node of a strongly typed network",
    r"[Oo]ptimization profile|min.*opt.*max|missing dimensions": "give a batch range smallest <= best <= largest",
    r"DLA": "build without DLA, or with static shapes in fp16 or int8",
    r"Could not find any implementation for node": "set no workspace limit, try another precision or lowering, "
    "or a newer TensorRT",
    r"UNSUPPORTED_NODE|No importer registered|Plugin not found|unsupported": "run bar-edge's TensorRT check on "
    "the file, and export with --lowering slices, zero-filled or regular",
}


def build(
    onnx_path: Path, engine_path: Path, options: EngineOptions | None = None, *, rebuild: str = REBUILD
) -> dict[str, Any]:
    """Build an engine for the GPU of this machine and return its manifest, which is also written beside it.

    The network is strongly typed: precision is what the file's tensors say. rebuild: the command that a user
    of the engine is told if it does not fit a machine. Raises EnvironmentLacks without TensorRT, GPU or what the
    options ask of them, InputError if TensorRT refuses the file, BarEdgeError if the build fails; the engine's
    path then keeps what it held.
    """
    options, model = options or EngineOptions(), read_model(onnx_path)
    trt, gpu = import_tensorrt(), Cuda().gpu()
    log = new_log(trt)
    builder = make(trt.Builder, log)
    # required by 10.x, accepted and ignored by 11
    network = given(builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)), log)
    _parse(trt, network, log, model, onnx_path.name)
    config = given(builder.create_builder_config(), log)
    _configure(trt, config, options)
    profile = _add_profile(builder, network, config, options, log)
    fallback = _use_dla(trt, builder, network, config, options) if options.dla_core >= 0 else []
    start = time.perf_counter()
    with _timing_cache(config, options, f"{trt.__version__}-{gpu.name}-{gpu.compute_capability}", log):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _build_error(log, network, onnx_path.name)
    engine = bytes(plan)
    manifest = {
        "schema": 1,
        "onnx": {"file": onnx_path.name, "sha256": sha256(model)},
        "engine": {"file": engine_path.name, "sha256": sha256(engine), "bytes": len(engine)},
        "tensorrt": trt.__version__,
        "gpu": dataclasses.asdict(gpu),
        "options": {**dataclasses.asdict(options), "batch": list(options.batch)},
        "profile": profile,
        "dla_fallback": fallback,
        "warnings": log.warnings[:20],
        "build_s": round(time.perf_counter() - start, 1),
        "rebuild": rebuild,
    }
    write_bytes(engine_path, engine)
    write_json(manifest_path(engine_path), manifest)
    return manifest


def _parse(trt: Any, network: Any, log: Any, model: bytes, name: str) -> None:
    parser = make(lambda log: trt.OnnxParser(network, log), log)
    if parser.parse(model):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    found = [f"{e.node_operator()} '{e.node_name()}' (node {e.node()}): {e.code()}: {e.desc()}" for e in errors]
    text = " | ".join(found) or log.text()
    raise InputError(
        f"nodes that TensorRT {trt.__version__} has",
        got=f"{name}: {text}",
        consequence="no engine was built",
        remedy=_remedy(text),
    )


def _configure(trt: Any, config: Any, options: EngineOptions) -> None:
    config.builder_optimization_level = options.optimization_level
    # names and shapes of the layers stay readable in logs and profiles; costs nothing at run time
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware != "none":
        level = getattr(trt.HardwareCompatibilityLevel, HARDWARE[options.hardware], None)
        if level is None:
            raise EnvironmentLacks(
                f"a TensorRT with hardware compatibility {options.hardware}", got=trt.__version__, remedy="use ampere+"
            )
        config.hardware_compatibility_level = level


def _add_profile(builder: Any, network: Any, config: Any, options: EngineOptions, log: Any) -> dict[str, Any]:
    """Give every input whose batch is free the range of the options; returns name -> smallest, best, largest shape."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    profile, shapes = given(builder.create_optimization_profile(), log), {}
    for tensor in inputs:
        first, *rest = tuple(tensor.shape)
        if -1 in rest:
            raise InputError(
                "inputs whose sizes are fixed, except for the batch",
                got=f"{tensor.name} {(first, *rest)}",
                consequence="no engine was built",
                remedy="export the network for one image size",
            )
        if first != -1 and set(options.batch) != {first}:
            raise InputError(
                f"batch {first}, which the file fixes", got=f"{options.batch}", consequence="no engine was built"
            )
        if first == -1:
            shapes[tensor.name] = [[batch, *rest] for batch in options.batch]
            profile.set_shape(tensor.name, *map(tuple, shapes[tensor.name]))
    if shapes and config.add_optimization_profile(profile) < 0:
        raise BarEdgeError("an optimisation profile that TensorRT accepts", got=log.text())
    return shapes


def _use_dla(trt: Any, builder: Any, network: Any, config: Any, options: EngineOptions) -> list[str]:
    """Build for a DLA core; returns the layers that fall back to the GPU."""
    cores = builder.num_DLA_cores
    if options.dla_core >= cores:
        raise EnvironmentLacks(
            f"DLA core {options.dla_core}",
            got=f"{cores} cores that TensorRT {trt.__version__} can use here",
            consequence="no engine was built",
            remedy="build for the GPU; DLA needs an Orin NX or AGX and TensorRT up to 10.7, or an AGX and 11.4.1",
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = options.dla_core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return [layer.name for layer in layers if not config.can_run_on_DLA(layer)]


@contextlib.contextmanager
def _timing_cache(config: Any, options: EngineOptions, identity: str, log: Any) -> Iterator[None]:
    """Build with the timing cache of this TensorRT version and GPU, and keep what the build added."""
    if not options.timing_caches:
        yield
        return
    path = Path(options.timing_caches) / f"timing-{re.sub(r'[^A-Za-z0-9.]+', '-', identity)}.cache"
    known = path.read_bytes() if path.is_file() else b""
    cache = given(config.create_timing_cache(known), log)
    if not config.set_timing_cache(cache, False):  # written by another driver or device: begin anew
        cache = given(config.create_timing_cache(b""), log)
        given(config.set_timing_cache(cache, False), log)
    yield
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, bytes(given(cache.serialize(), log)))


def _build_error(log: Any, network: Any, name: str) -> BarEdgeError:
    """Say which layers TensorRT's log names, with operator and shapes, and what to do."""
    text = log.text()
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    whole = r"(?<![\w/])(?<!\w\.){}(?![\w/]|\.\w)"  # /conv1 is not /conv10, nor layer1 in layer1.conv
    named = [layer for layer in layers if re.search(whole.format(re.escape(layer.name)), text)]
    described = "; ".join(_describe(layer) for layer in named[:8])
    return BarEdgeError(
        "an engine for every layer of the network",
        got=f"{name}: {text}" + (f" [{described}]" if described else ""),
        consequence="no engine was built",
        remedy=_remedy(text),
    )


def _describe(layer: Any) -> str:
    def shapes(tensors: list[Any]) -> str:
        return ", ".join("x".join(map(str, tuple(t.shape))) for t in tensors if t is not None)

    inputs = shapes([layer.get_input(i) for i in range(layer.num_inputs)])
    outputs = shapes([layer.get_output(i) for i in range(layer.num_outputs)])
    return f"{layer.type.name} '{layer.name}' {inputs} -> {outputs}"


def _remedy(text: str) -> str:
    found = (remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, text))
    return next(found, "run trtexec --verbose on the ONNX file for the whole log")
