"""What a SPEC names, and what of it is written into a run's folder."""

from pathlib import Path

import pytest

from bar_edge.requests import PruneRequest, anchored, located
from bar_edge.runs.specs import portable, shape_and_classes


def test_no_absolute_path_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = PruneRequest(model="resnet20", data=str(tmp_path / "images"), weights=str(tmp_path / "here" / "w.pt"))
    assert portable(config) == PruneRequest(model="resnet20", data="../images", weights="w.pt")
    assert portable(portable(config)) == portable(config)


@pytest.mark.parametrize("started", [".", "elsewhere", "run"])
def test_a_run_keeps_paths_as_seen_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: str
) -> None:
    """A run that is read from another directory finds its data; what is no path stays as it is."""
    for name in ("images", "elsewhere", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "w.pt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    asked = PruneRequest(model="resnet20", data="images", weights="w.pt")
    kept = anchored(asked, Path("run"))
    assert (kept.model, kept.data, kept.weights) == ("resnet20", "../images", "../w.pt")
    monkeypatch.chdir(tmp_path / started)
    found = located({"model": kept.model, "data": kept.data, "weights": kept.weights}, tmp_path / "run")
    assert Path(found["data"]).is_dir() and Path(found["weights"]).is_file() and found["model"] == "resnet20"


def test_paths_of_older_runs_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stored = {"model": "resnet20", "data": "images", "task": "classification"}
    (tmp_path / "images").mkdir()
    assert located(stored, tmp_path / "run") == stored
    assert anchored(PruneRequest(model="resnet20"), tmp_path) == PruneRequest(model="resnet20")


def test_a_given_shape_wins_over_the_data() -> None:
    assert shape_and_classes("digits", None) == ((1, 8, 8), 10)
    assert shape_and_classes("digits", (3, 16, 16)) == ((3, 16, 16), 10)
    assert shape_and_classes(None, None) == ((3, 32, 32), 10)
