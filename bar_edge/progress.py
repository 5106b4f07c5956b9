"""Who watches what takes long."""

from __future__ import annotations

from typing import Any, Protocol

#: a line of metrics.jsonl
Record = dict[str, Any]


class Progress(Protocol):
    """Is told how training goes; records hold the keys of a metrics.jsonl line."""

    def note(self, text: str) -> None:
        """Something to say before it starts, such as the budget in all units."""
        ...

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """A phase starts or goes on; steps: of all its epochs together."""
        ...

    def step(self, record: Record) -> None:
        """Some steps were done, record["step"] so far in this phase."""
        ...

    def epoch(self, record: Record) -> None:
        """An epoch was done, record["metric"] is the held-out metric."""
        ...

    def done(self) -> None:
        """The phase ended."""
        ...


class NoProgress:
    """Nobody watches."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """Do nothing."""

    def step(self, record: Record) -> None:
        """Do nothing."""

    def epoch(self, record: Record) -> None:
        """Do nothing."""

    def done(self) -> None:
        """Do nothing."""
