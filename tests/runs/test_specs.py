"""What a SPEC names, and what of it is written into a run's folder."""

from pathlib import Path

import pytest

from bar_edge.requests import PruneRequest
from bar_edge.runs.specs import portable, shape_and_classes


def test_no_absolute_path_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = PruneRequest(model="resnet20", data=str(tmp_path / "images"), weights=str(tmp_path / "here" / "w.pt"))
    assert portable(config) == PruneRequest(model="resnet20", data="../images", weights="w.pt")
    assert portable(portable(config)) == portable(config)


def test_a_given_shape_wins_over_the_data() -> None:
    assert shape_and_classes("digits", None) == ((1, 8, 8), 10)
    assert shape_and_classes("digits", (3, 16, 16)) == ((3, 16, 16), 10)
    assert shape_and_classes(None, None) == ((3, 32, 32), 10)
