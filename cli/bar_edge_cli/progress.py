"""Progress of a training run on stderr: a live bar on a terminal, one line per epoch everywhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bar_edge.records.cost import write_cost

#: key of a record -> how it is written
_FIGURES: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.3f}".format,
    "metric": "metric {:.2%}".format,
    "volume": lambda value: f"V {write_cost(value)}",
    "budget": lambda value: f"b {write_cost(value)}",
    "open": "{} gates open".format,
}


class Terminal:
    """Shows phase, epoch, loss, metric, V against b and the time left; the training's `Progress`."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task: TaskID | None = None
        self._epochs = 0

    def __enter__(self) -> Terminal:
        # Fabric tells its precision again at every setup
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def phase(self, name: str, epochs: int, steps: int) -> None:
        """Begin, or go on with, a phase of `epochs` epochs and `steps` steps in all."""
        self._epochs = epochs
        self._task = self._live.add_task(name, total=steps, now="")

    def step(self, record: Mapping[str, Any]) -> None:
        """Show the figures of the steps just done (the keys of metrics.jsonl)."""
        if self._task is not None and not self._live.disable:
            now = "  ".join(figures(record))
            self._live.update(self._task, completed=record["step"], now=now, description=self._where(record))

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Print one finished epoch's figures."""
        line = "  ".join([f"{self._where(record):<12}", *figures(record)])
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def done(self) -> None:
        """Remove the phase's bar; its epochs' lines stay."""
        if self._task is not None:
            self._live.remove_task(self._task)
            self._task = None

    def _where(self, record: Mapping[str, Any]) -> str:
        return f"{record['phase']} {record['epoch']}/{self._epochs}"


def figures(record: Mapping[str, Any]) -> list[str]:
    """Write the figures of a record, only those that are there."""
    return [write(record[key]) for key, write in _FIGURES.items() if record.get(key) is not None]
