"""The figures in the documents are those that the code computes."""

import re
from pathlib import Path

import pytest
import torch

from bar_edge.methods import GateLayout, smallest_cost
from bar_edge.models import build
from bar_edge.network import count, trace


@pytest.mark.parametrize(("model", "shape"), [("resnet20", "3x32x32"), ("wrn-16-2", "3x32x32"), ("wrn-10-2", "1x8x8")])
def test_the_zoo_table_holds_the_counted_figures(repository: Path, model: str, shape: str) -> None:
    sizes = [int(size) for size in shape.split("x")]
    network = trace(build(model, input_shape=(sizes[0], sizes[1], sizes[2]), classes=10), torch.zeros(2, *sizes))
    layout, full = GateLayout(network), count(network)
    lines = (repository / "docs/zoo.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith(f"| {model} | {shape}"))
    figures = [int(text.replace(",", "")) for text in re.findall(r"\| ([\d,]+)(?= \|)", row.split(shape)[1])]
    assert figures == [full.volume, full.flops, full.params, layout.size, smallest_cost(layout, "volume")]
