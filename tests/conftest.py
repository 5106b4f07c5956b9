"""What all tests share."""

from __future__ import annotations

import os

# before torch is imported anywhere: two workers on two cores are faster with a thread each, and runs repeat exactly
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from bar_edge.methods import GateLayout
    from bar_edge.records import Metric

#: what `rehearsed_once` need not rehearse again
REHEARSED = set[tuple[object, ...]]()
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """A folder with CIFAR-10 as Parquet; skips where there is none."""
    folder = Path(os.environ.get("BAR_EDGE_CIFAR10") or REPOSITORY.parent / "shared" / "data" / "cifar10")
    if not folder.is_dir():
        pytest.skip("no CIFAR-10: set BAR_EDGE_CIFAR10 to a folder that holds it as Parquet")
    return folder


@pytest.fixture(autouse=True)
def rehearsed_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rehearse a network and a budget once per process: most tests prune the same few; its own tests always do."""
    from bar_edge.runs import run_folder
    from bar_edge.runs.rehearsal import rehearse

    if request.path.name == "test_rehearsal.py":
        return

    def once(layout: GateLayout, metric: Metric, limit: float, images: Tensor) -> None:
        key = (layout.network.fingerprint, layout.round_to, tuple(layout.keep), metric)
        if key not in REHEARSED:
            rehearse(layout, metric, limit, images)
            REHEARSED.add(key)

    monkeypatch.setattr(run_folder, "rehearse", once)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs hardware or packages that this machine lacks."""
    marks = {mark.name for item in items for mark in item.iter_markers()}
    lacks = {name: lack() for name, lack in (("cuda", _lacks_cuda), ("tensorrt", _lacks_tensorrt)) if name in marks}
    for item in items:
        for name, reason in lacks.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def _lacks_cuda() -> str:
    import torch

    return "" if torch.cuda.is_available() else "no NVIDIA GPU"


def _lacks_tensorrt() -> str:
    import importlib.util

    return "" if importlib.util.find_spec("tensorrt") else "no TensorRT"
