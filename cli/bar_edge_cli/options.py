"""From the command line to a PruneRequest: command line over TOML over preset over defaults."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bar_edge.config import PHASES, overlay, read_toml
from bar_edge.errors import InputError
from bar_edge.records import Budget
from bar_edge.requests import PruneRequest, check_trusted, located, prune_request


def resolve(
    config_file: Path | None, given: Mapping[str, Any], assignments: Iterable[str] = (), *, trust: bool = False
) -> PruneRequest:
    """Build the run's request.

    given: nested values of the first-class options, None where the user said nothing; assignments:
    `--set` texts, which win over them. trust: whether the code that a stored run names may be imported. Raises
    InputError for an unknown name, a wrong type, a missing model, or code of a stored run that is not trusted.
    """
    typed = _said(given)
    for text in assignments:
        typed = overlay(typed, assignment(text))
    stored = read_toml(config_file) if config_file else {}
    if config_file and is_stored_run(config_file.parent):
        stored = located(stored, config_file.parent)
        if not trust:
            check_trusted(stored, typed)
    return prune_request(overlay(stored, typed))


def is_stored_run(folder: Path) -> bool:
    """Tell whether a folder is a RUN, whose config.toml is data like the rest of it."""
    parts = ("result.json", "plan.json", "checkpoints", "dense", "network")
    return (folder / "config.toml").is_file() and any((folder / part).exists() for part in parts)


def given(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the run's options out of a command's parameters, nested as in TOML; None where the user said nothing."""
    run = {f.name for f in dataclasses.fields(PruneRequest)} & parameters.keys()
    train = epochs(parameters["epochs"]) | {name: parameters[name] for name in ("batch", "device")}
    return {name: parameters[name] for name in run} | {"train": train}


def split_budgets(texts: Iterable[str]) -> tuple[str | None, str | None]:
    """Tell the budget to train for from the one in ms to judge by; raises InputError for two of a kind."""
    found: dict[bool, str] = {}
    for text in texts:
        in_ms = Budget.parse(text).cost.of_device
        if in_ms in found:
            raise InputError(
                "at most one --budget to train for and one in ms to judge by", got=f"{found[in_ms]} and {text}"
            )
        found[in_ms] = text
    return found.get(False), found.get(True)


def epochs(text: str | None) -> dict[str, int]:
    """Read `dense=90,prune=80,tune=50` (any of them) into epochs per phase."""
    found = {}
    for part in text.split(",") if text else ():
        name, _, number = part.strip().partition("=")
        if name not in PHASES or not re.fullmatch(r"\d+", number):
            raise InputError(
                "--epochs dense=90,prune=80,tune=50, any of the three, whole numbers",
                got=repr(part),
                remedy="correct the option; 0 trains nothing in that phase",
            )
        found[name] = int(number)
    return found


def shape(text: str | None) -> tuple[int, ...] | None:
    """Read an input shape such as `3x32x32`, without the batch."""
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise InputError("--input CxHxW, such as 3x32x32 (without the batch)", got=repr(text))
    return tuple(int(size) for size in text.split("x"))


def assignment(text: str) -> dict[str, Any]:
    """Read `train.lr_prune=0.01`: a dotted name and a TOML value, or bare text."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", name.strip()):
        raise InputError("--set NAME=VALUE, such as train.lr_prune=0.01", got=repr(text))
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for part in reversed(name.strip().split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def settable() -> list[str]:
    """List every field of the configuration's tables with its default, as `--set` takes it."""
    defaults = dataclasses.asdict(PruneRequest(model=""))
    found = [
        (f"{table}.{name}", value) for table, v in defaults.items() if isinstance(v, dict) for name, value in v.items()
    ]
    return [name if value is None else f"{name}={value}" for name, value in found]


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    nested = {k: _said(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    return {k: v for k, v in nested.items() if v is not None and v != {} and v != []}
