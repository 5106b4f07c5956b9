"""Which channels stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bar_edge.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChannelPlan:
    """Which output channels of every gated convolution stay.

    network: fingerprint of the dense network's graph; kept: module name -> sorted original indices.
    """

    network: str
    kept: dict[str, tuple[int, ...]]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON data (schema 1)."""
        return {"schema": 1, "network": self.network, "kept": {k: list(v) for k, v in self.kept.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ChannelPlan:
        """Read a plan; raises InputError if the data is not one."""
        try:
            if data["schema"] != 1:
                raise ValueError(f"schema {data['schema']}")
            kept = {str(name): tuple(ids) for name, ids in data["kept"].items()}
            for name, ids in kept.items():
                if not all(type(i) is int for i in ids) or list(ids) != sorted(set(ids)) or (ids and ids[0] < 0):
                    raise ValueError(f"{name} keeps what is no rising list of channels")
            return cls(network=str(data["network"]), kept=kept)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError("a plan.json of schema 1", got=f"{type(error).__name__}: {error}") from error
