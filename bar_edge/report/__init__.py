"""A run's page of proof, and the comparison of several runs: one self-contained HTML file each."""

from bar_edge.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
