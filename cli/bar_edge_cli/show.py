"""What a command returned, as tables for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bar_edge.records import COSTS
from bar_edge.records.cost import write_cost


def show(answer: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a command's answer on stdout: tables for a run's result and for layers, anything else as it is."""
    if console is None:
        console = Console(highlight=False)
        # a file or a pipe has no width: nothing is cut there
        console.width = console.width if console.is_terminal else max(console.width, 160)
    parts = {"": answer} if "method" in answer else answer  # deploy's answer holds a run's result among other parts
    for name, part in parts.items():
        if isinstance(part, Mapping) and "method" in part:
            _show_result(part, console)
        elif name == "layers":
            _show_layers(part, console)
        else:
            _show_part(name, part, console)
    for warning in answer.get("warnings", ()):
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    verdict = answer.get("verdict")
    if verdict is not None:
        console.print("[green]verdict: yes[/]" if verdict else "[red]verdict: no[/]")


def _show_layers(layers: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table(title="convolutions and linear layers")
    for heading in ("name", "channels", "map", "volume", "FLOPs", "parameters", "prunable"):
        table.add_column(heading, justify="left" if heading in ("name", "prunable") else "right", overflow="fold")
    convolutions = [layer for layer in layers if layer["area"] or layer["gated"]]
    for layer in convolutions:
        table.add_row(
            layer["name"],
            f"{layer['in_channels']} to {layer['out_channels']}",
            *(number(layer[key]) for key in ("area", "volume", "flops", "params")),
            "yes" if layer["gated"] else f"no: {layer['reason']}",
        )
    console.print(table)
    console.print(f"and {len(layers) - len(convolutions)} other layers, which are not pruned by themselves")


def _show_result(result: Mapping[str, Any], console: Console) -> None:
    dense, sliced, metric = result["dense"], result["sliced"], result["metric"]
    table = Table(title=f"{result['model']} on {result['data']}, {result['method']}, seed {result['seed']}")
    table.add_column("")
    for heading in ("dense", "sliced", "factor"):
        table.add_column(heading, justify="right")
    for suffix, how in (("", ""), ("_regular", ", regular")):
        for key, cost in COSTS.items():
            if (after := sliced.get(key + suffix)) is not None:
                before = dense[key]
                table.add_row(cost.title + how, write_cost(before), write_cost(after), _factor(before, after))
    points = [None if side["metric"] is None else 100 * side["metric"] for side in (dense, sliced)]
    drop = "" if None in points else f"{points[1] - points[0]:+.2f} points"  # type: ignore[operator]
    table.add_row(metric["name"], *("-" if p is None else f"{p:.2f} %" for p in points), drop)
    console.print(table)
    console.print(budget_line(result["budget"], dense))
    parity = {k: v for k, v in (result.get("parity") or {}).items() if v is not None}
    if parity:
        console.print("parity: " + ", ".join(f"{k.replace('_', ' ')} {v:.1e}" for k, v in parity.items()))
    if result.get("report"):
        console.print(f"report: {result['report']}", markup=False, soft_wrap=True)


def budget_line(budget: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """Say a budget as text, limit, achieved and factor, and whether it is met.

    budget: of result.json; dense: the dense network's costs, for the factors.
    """
    key = str(budget["unit"])
    line = f"budget {budget['text']} = at most {COSTS[key].say(budget['limit'])}"
    if (achieved := budget.get("achieved")) is not None:
        line += f", achieved {write_cost(achieved)} ({_factor(dense.get(key), achieved)})"
    if budget.get("within") is not None:
        line += ": met" if budget["within"] else ": missed"
    return line


def number(value: object) -> str:
    """Write a number for a person; a dash for what has not been computed."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4g}"


def _factor(before: float | None, after: float | None) -> str:
    return f"{before / after:.2f}x" if before and after else "-"


def _show_part(name: str, part: object, console: Console) -> None:
    if name.strip() in ("verdict", "schema", "warnings") or part is None or part == []:
        return
    if isinstance(part, Mapping):
        if name:
            console.print(f"[bold]{_words(name)}[/]")
        for key, value in part.items():
            _show_part(" " * (2 + len(name) - len(name.lstrip())) + key if name else key, value, console)
    elif isinstance(part, Sequence) and part and all(isinstance(row, Mapping) for row in part):
        console.print(_table(name, part))
    else:
        console.print(f"{_words(name)}: {_plain(part)}", markup=False, soft_wrap=True)


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    headings = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=_words(name))
    for key in headings:
        numeric = all(isinstance(row.get(key), (int, float, type(None))) for row in rows)
        table.add_column(_words(key), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_plain(row.get(key)) for key in headings))
    return table


def _plain(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(v) for v in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else number(value)


def _words(name: str) -> str:
    return name.replace("_", " ")
