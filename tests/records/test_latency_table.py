"""Stored latency tables: those that `profile` wrote are read, others are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bar_edge.errors import InputError
from bar_edge.files import read_json, write_json
from bar_edge.records.latency_table import LatencyTable


@pytest.mark.parametrize("name", ["mobilenetv2", "resnet56", "wrn-16-4"])
def test_what_profile_wrote_is_read(repository: Path, name: str) -> None:
    table = LatencyTable.load(repository / f"benchmarks/results/latency/{name}.json")
    # without channels nothing is done
    assert all(axis[0] == 0 for prices in table.prices.values() for axis in prices.widths)


@pytest.mark.parametrize("axis", [[], [-1, 4], [4, 4], [4, 0], [0, 1 << 24]])
def test_widths_that_do_not_rise(repository: Path, tmp_path: Path, axis: list[int]) -> None:
    data = read_json(repository / "benchmarks/results/latency/resnet56.json")
    one = next(iter(data["prices"].values()))
    one |= {"widths": [axis], "ms": [0.0] * len(axis)}
    write_json(tmp_path / "table.json", data)
    with pytest.raises(InputError, match="do not rise"):
        LatencyTable.load(tmp_path / "table.json")
