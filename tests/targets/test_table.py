"""Every row of the table of targets goes through `export`, or is refused with exit 2 or 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bar_edge.bench import RUNTIMES
from bar_edge.config import TrainConfig
from bar_edge.errors import BarEdgeError
from bar_edge.files import read_json
from bar_edge.pipeline import export_run, prune
from bar_edge.requests import ExportRequest, PruneRequest
from bar_edge.targets.row import PRECISIONS
from bar_edge.targets.table import ELSEWHERE, TARGETS, find_target, forms_for
from bar_edge_calibration.recipe import recipes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("table") / "run"
    train = TrainConfig(dense=1, prune=0, tune=0, batch=256, precision="fp32", device="cpu")
    config = PruneRequest(
        model="wrn-10-1", model_arg=("width=0.5",), data="digits", budget="2x", method="random", train=train
    )
    prune(config, folder)
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", TARGETS)
def test_every_target_in_every_precision_is_written_or_refused(
    run: Path, tmp_path: Path, name: str, precision: str
) -> None:
    target, folder = TARGETS[name], tmp_path / "artifact"
    try:
        answer: dict[str, Any] = export_run(
            run, ExportRequest(target=name, precision=precision, lowering="slices:4", data="random"), out=folder
        )
    except BarEdgeError as error:
        assert error.exit_code in (2, 3) and not folder.exists()
        assert precision not in target.precisions or target.needs is not None
        return
    assert precision in target.precisions
    assert all((folder / file).is_file() for file in target.files)
    if target.convert is not None:
        manifest = read_json(folder / "manifest.json")
        assert (manifest["target"], manifest["precision"], manifest["lowering"]) == (name, precision, "slices:4")
        assert answer["parity"]["sliced_vs_onnx"] <= 1e-4 and manifest["parity"]["within"]


def test_the_rows_name_what_is_there() -> None:
    for name, target in TARGETS.items():
        assert find_target(name) is target and target.name == name
        assert target.runtime is None or target.runtime in RUNTIMES
        assert set(target.recipes) <= set(recipes()) and bool(target.recipes) == ("int8" in target.precisions)
        for part in (target.forms, target.unmeasured, target.hinted, target.unscored):
            assert set(part) <= set(target.precisions)
        # something is known of every precision whose form nobody names
        if target.convert is not None and target.runtime is None:
            assert set(target.unmeasured) == set(target.precisions)


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "openvino-cpu"])
def test_no_form_that_is_tried_scatters(name: str) -> None:
    for precision in PRECISIONS:
        assert not [form for form in forms_for(name, precision).candidates if form.scatters]
    assert forms_for("onnxruntime-cuda", "fp32") == forms_for("somewhere", "int8") == ELSEWHERE
