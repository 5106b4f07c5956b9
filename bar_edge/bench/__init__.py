"""Bench: measuring artifacts in a process of their own. Nothing here imports torch."""

from bar_edge.bench.protocol import bench_onnx, save_measurement, summary
from bar_edge.bench.statistics import Comparison, compare, drift, meets

__all__ = ["Comparison", "bench_onnx", "compare", "drift", "meets", "save_measurement", "summary"]
