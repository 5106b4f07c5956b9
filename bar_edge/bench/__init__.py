"""Bench: measuring artifacts in a process of their own. Nothing here imports torch."""

from bar_edge.bench.protocol import (
    Measurement,
    bench_onnx,
    load_measurement,
    measurement,
    runtimes_here,
    save_measurement,
    summary,
)
from bar_edge.bench.runner.runtimes import RUNTIMES
from bar_edge.bench.statistics import Comparison, compare, drift, median_interval, meets

__all__ = [
    "RUNTIMES",
    "Comparison",
    "Measurement",
    "bench_onnx",
    "compare",
    "drift",
    "load_measurement",
    "median_interval",
    "measurement",
    "meets",
    "runtimes_here",
    "save_measurement",
    "summary",
]
