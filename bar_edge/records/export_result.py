"""What an export came to."""

from __future__ import annotations

import dataclasses
from typing import Any

from bar_edge.records.json_data import json_data, read_record


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExportResult:
    """The artifact's folder, whether it will do, and what was measured of it; parts of the manifest as they are."""

    verdict: bool
    #: folder
    artifact: str
    lowering: str | None = None
    choice: dict[str, Any] | None = None
    #: sliced_vs_onnx, images, and the error of the precision
    parity: dict[str, Any] | None = None
    #: metric of the float file and of this one, and the drop in points
    held_out: dict[str, Any] | None = None
    settings: Any = None
    speedup_over_fp32: dict[str, Any] | None = None
    latency: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    volume_executed: int | None = None
    flops_executed: int | None = None
    #: size of the file; None if nothing was written
    bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        data: dict[str, Any] = json_data(self)
        return data

    @classmethod
    def from_json(cls, data: Any) -> ExportResult:
        """Read what `to_json` wrote; raises InputError for anything else."""
        return read_record(cls, data, "the result of an export")
