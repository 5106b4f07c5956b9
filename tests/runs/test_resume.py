"""A run that was stopped goes on: nothing that finished phases left is lost, and the page is written in the end."""

import json
from pathlib import Path
from typing import Any

import pytest

from bar_edge.config import TrainConfig
from bar_edge.pipeline import prune
from bar_edge.progress import NoProgress
from bar_edge.requests import PruneRequest

REQUEST = PruneRequest(
    model="resnet8",
    budget="4x",
    method="random",
    train=TrainConfig(dense=1, prune=1, tune=1, batch=256, precision="fp32", device="cpu"),
)


class Stops(NoProgress):
    """Interrupts a phase at its first step, before its first checkpoint."""

    def __init__(self, phase: str) -> None:
        self.stopped = phase

    def step(self, record: dict[str, Any]) -> None:
        if record["phase"] == self.stopped:
            raise KeyboardInterrupt


def phases(run: Path) -> list[str]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return list(dict.fromkeys(json.loads(line)["phase"] for line in lines))


def test_a_stop_before_the_first_checkpoint_of_a_phase_erases_no_metrics(tmp_path: Path) -> None:
    for phase in ("prune", "tune"):
        with pytest.raises(KeyboardInterrupt):
            prune(REQUEST, tmp_path / "run", resume=True, progress=Stops(phase))
    prune(REQUEST, tmp_path / "run", resume=True)
    assert phases(tmp_path / "run") == ["dense", "prune", "tune"]
    (tmp_path / "run" / "report.html").unlink()
    prune(REQUEST, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "report.html").is_file()
