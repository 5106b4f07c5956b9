"""What training leaves in a run's folder, so that a run that was stopped goes on as if it had not been.

`metrics.jsonl` grows line by line; `checkpoints/PHASE.pt` is replaced after each epoch and says how many
bytes of `metrics.jsonl` belong to it. Whatever a stopped run wrote after its last checkpoint is cut off.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bar_edge.errors import InputError
from bar_edge.progress import Record


class Journal:
    """The metrics and checkpoints of one run; resume=False removes those of an earlier run in the folder."""

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        self.metrics = folder / "metrics.jsonl"
        self.checkpoints = folder / "checkpoints"
        self._valid_bytes = 0
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if not resume:
            for stale in self.checkpoints.glob("*.pt"):
                stale.unlink()
            self.metrics.unlink(missing_ok=True)

    def append(self, record: Record) -> None:
        """Add one line to metrics.jsonl; raises ValueError for a number that JSON lacks (nan, infinity)."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(line)

    def save(self, phase: str, state: Mapping[str, Any]) -> None:
        """Replace the phase's checkpoint; a stop at any moment leaves the old one or the new one."""
        self._valid_bytes = self.metrics.stat().st_size
        path = self._path(phase)
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file:
            torch.save({"metrics_bytes": self._valid_bytes, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, phase: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the phase's last checkpoint, None if there is none.

        settings: what must be as in the run that was stopped. Raises InputError if it is not, or if the
        file is damaged.
        """
        path = self._path(phase)
        if not path.exists():
            # what finished phases wrote stays, though nobody loads their checkpoints
            others = [self._read(other)["metrics_bytes"] for other in self.checkpoints.glob("*.pt")]
            self._valid_bytes = max([self._valid_bytes, *others])
            return None
        state = self._read(path)
        then, self._valid_bytes = state["settings"], state["metrics_bytes"]
        changed = [f"{key}={settings.get(key)}" for key in {**then, **settings} if then.get(key) != settings.get(key)]
        if changed:
            raise InputError(
                f"the options of the run that was stopped: {', '.join(f'{k}={v}' for k, v in then.items())}",
                got=", ".join(changed),
                consequence=f"phase {phase} cannot go on",
                remedy="give the same options, or start without --resume",
            )
        return state

    def rewind(self) -> None:
        """Cut metrics.jsonl back to what the last loaded or saved checkpoint, of any phase, stands for."""
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        if size < self._valid_bytes:
            raise InputError(
                f"the metrics.jsonl of the run that was stopped, {self._valid_bytes} bytes at least",
                got=f"{size} bytes",
                remedy="restore the file, or start without --resume",
            )
        with self.metrics.open("ab") as file:
            file.truncate(self._valid_bytes)

    def _read(self, path: Path) -> dict[str, Any]:
        """Return a checkpoint; raises InputError if the file is damaged."""
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            _ = state["settings"], state["metrics_bytes"]
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise InputError(
                f"a whole checkpoint at checkpoints/{path.name}",
                got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no text'}",
                remedy="delete the file to train this phase anew, or start without --resume",
            ) from error
        return state

    def _path(self, phase: str) -> Path:
        return self.checkpoints / f"{phase}.pt"
