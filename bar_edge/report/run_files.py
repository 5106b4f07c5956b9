"""What a RUN folder holds, read for the report; nothing that is missing is made up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from bar_edge.errors import InputError
from bar_edge.files import read_json
from bar_edge.records import ChannelPlan


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """One folder under artifacts/: its manifest and its measurements."""

    name: str
    manifest: dict[str, Any] | None
    #: of the model file
    size_bytes: int | None
    #: file name -> what bench wrote
    measurements: dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """The files of one run."""

    name: str
    result: dict[str, Any]
    #: lines of metrics.jsonl, in order
    metrics: list[dict[str, Any]]
    config_toml: str | None
    #: module name -> kept channels, out of plan.json
    kept: dict[str, tuple[int, ...]] | None
    artifacts: list[Artifact]


def read_run(folder: Path) -> RunFiles:
    """Read a run; raises InputError if the folder has no result.json of schema 1, or a file in it is damaged."""
    path = folder / "result.json"
    if not path.is_file():
        raise InputError(
            "a run's folder with a result.json",
            got=f"{folder.name or folder} without one",
            remedy="give the folder that `bar-edge prune --out` wrote; a run that was stopped needs --resume first",
        )
    result = read_json(path)
    if not isinstance(result, dict) or result.get("schema") != 1:
        schema = result.get("schema") if isinstance(result, dict) else type(result).__name__
        raise InputError("a result.json of schema 1", got=f"schema {schema}", remedy="use the version that wrote it")
    config, plan = folder / "config.toml", folder / "plan.json"
    return RunFiles(
        name=folder.resolve().name,
        result=result,
        metrics=_read_lines(folder / "metrics.jsonl"),
        config_toml=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        kept=ChannelPlan.from_json(read_json(plan)).kept if plan.is_file() else None,
        artifacts=[_read_artifact(path) for path in sorted(folder.glob("artifacts/*")) if path.is_dir()],
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not all(isinstance(record, dict) for record in found):
            raise ValueError("a line that is no object")
        return found
    except (ValueError, RecursionError) as error:
        raise InputError(f"one JSON object per line in {path.name}", got=str(error)) from error


def _read_artifact(folder: Path) -> Artifact:
    manifest, model = folder / "manifest.json", folder / "model.onnx"
    return Artifact(
        name=folder.name,
        manifest=read_json(manifest) if manifest.is_file() else None,
        size_bytes=model.stat().st_size if model.is_file() else None,
        measurements={path.name: read_json(path) for path in sorted(folder.glob("bench-*.json"))},
    )
