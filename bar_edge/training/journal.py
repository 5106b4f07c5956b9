"""What training leaves in a run's folder, so that a run that was stopped goes on as if it had not been.

`metrics.jsonl` grows line by line; `checkpoints/PHASE.pt` is replaced after each epoch, every few minutes, and when a
signal stops the run, and says how many bytes of `metrics.jsonl` belong to it. Whatever a stopped run wrote after its
last checkpoint is cut off. The checkpoint before the last is kept as `PHASE.before.pt`, for the case that the last is
damaged: each is a ZIP file that holds a checksum of every part.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bar_edge.errors import InputError
from bar_edge.files import make_folder, remove_leftovers, write_bytes
from bar_edge.progress import Record


class Journal:
    """The metrics and checkpoints of one run; resume=False removes those of an earlier run in the folder.

    note: is told of what was damaged, and what that costs.
    """

    def __init__(self, folder: Path, *, resume: bool = False, note: Callable[[str], None] = lambda _: None) -> None:
        self.metrics = folder / "metrics.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.note = note
        self._valid_bytes = 0
        make_folder(self.checkpoints)
        remove_leftovers(self.checkpoints)
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
        self._valid_bytes = self.metrics.stat().st_size if self.metrics.is_file() else 0
        stream = io.BytesIO()
        torch.save({"metrics_bytes": self._valid_bytes, **state}, stream)
        last, before = self._paths(phase)
        if last.is_file():
            last.replace(before)
        write_bytes(last, stream.getbuffer())

    def load(self, phase: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the phase's last whole checkpoint, None if there is none: what is damaged is noted and passed over.

        settings: what must be as in the run that was stopped; raises InputError if it is not.
        """
        state = self._last_whole(phase)
        if state is None:
            # what finished phases wrote stays, though nobody loads their checkpoints
            others = {path.name.split(".")[0] for path in self.checkpoints.glob("*.pt")} - {phase}
            found = [other for name in sorted(others) if (other := self._last_whole(name)) is not None]
            self._valid_bytes = max([self._valid_bytes, *(other["metrics_bytes"] for other in found)])
            return None
        then, self._valid_bytes = state["settings"], state["metrics_bytes"]
        changed = [f"{key}={settings.get(key)}" for key in {**then, **settings} if then.get(key) != settings.get(key)]
        if changed:
            raise InputError(
                f"the options of the run that was stopped: {', '.join(f'{k}={v}' for k, v in then.items())}",
                got=", ".join(changed),
                consequence=f"phase {phase} cannot go on",
                remedy="give the same options, or another --out",
            )
        return state

    def rewind(self) -> None:
        """Cut metrics.jsonl back to what the last loaded or saved checkpoint, of any phase, stands for."""
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        if size < self._valid_bytes:
            self.note(f"metrics.jsonl has lost {self._valid_bytes - size} bytes: the page will lack what they said")
            self._valid_bytes = 1 + self.metrics.read_bytes().rfind(b"\n") if size else 0  # whole lines
        with self.metrics.open("ab") as file:
            file.truncate(self._valid_bytes)

    def _last_whole(self, phase: str) -> dict[str, Any] | None:
        found = [path for path in self._paths(phase) if path.is_file()]
        for i, path in enumerate(found, start=1):
            try:
                state = read_checkpoint(path)
                for damaged in found[: i - 1]:  # the next `save` would put it in the place of the whole one
                    damaged.unlink()
                return state
            except InputError as error:
                rest = "the one before is used" if i < len(found) else f"phase {phase} begins anew"
                self.note(f"checkpoints/{path.name} is damaged ({error.got}): {rest}")
        return None

    def _paths(self, phase: str) -> tuple[Path, Path]:
        """Return where the last checkpoint of a phase is, and the one before."""
        return self.checkpoints / f"{phase}.pt", self.checkpoints / f"{phase}.before.pt"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds; raises InputError unless it is whole by its checksums and holds numbers."""
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            if sum(part.file_size for part in parts.infolist()) > len(data):
                raise ValueError("parts larger than the file")
            if parts.testzip() is not None:
                raise ValueError("a checksum is wrong")
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        done, step, size = state["epochs_done"], state["step"], state["metrics_bytes"]
        last = state["settings"]["epochs"]
        if not 0 <= done <= last or step < 0 or size < 0:
            raise ValueError(f"epoch {done} of {last}, step {step}")
        for name in ("network", "optimizer", "ema", "pruner"):
            # infinity may be meant, in the mask of an attention
            if any(bool(t.isnan().any()) for t in pytree.tree_leaves(state[name]) if isinstance(t, Tensor)):
                raise ValueError(f"nan in {name}")
    except Exception as error:  # whatever is wrong with the file, it is no checkpoint
        got = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise InputError(f"a whole checkpoint at checkpoints/{path.name}", got=got) from error
    return state
