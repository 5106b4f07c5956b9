"""From the fields of a request to the options of a command: names, types, defaults and help stand in the record."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import typer

from bar_edge.methods.method import METHODS
from bar_edge.requests import fields

#: what a command returns
Answer = dict[str, Any]
#: of a parameter that must be given
_NONE_GIVEN: Any = inspect.Parameter.empty


def option(
    name: str,
    kind: Any,
    text: str,
    *,
    metavar: str | None = None,
    default: Any = _NONE_GIVEN,
    flag: str = "",
) -> inspect.Parameter:
    """Return one option; without a default it must be given. flag: as it stands on the command line."""
    info = typer.Option(flag or f"--{name.replace('_', '-')}", help=text, metavar=metavar)
    return _parameter(name, Annotated[kind, info], default)


def argument(name: str, kind: Any, text: str, *, metavar: str, default: Any = _NONE_GIVEN) -> inspect.Parameter:
    """Return one argument that stands without a name."""
    return _parameter(name, Annotated[kind, typer.Argument(metavar=metavar, help=text)], default)


def options(request: type, *names: str, unsaid: bool = False, without: Sequence[str] = ()) -> list[inspect.Parameter]:
    """Return the options of a request's fields, of all or of those named.

    unsaid: None where the user said nothing, for what a file may say; else the record's own defaults.
    """
    hints, known = typing.get_type_hints(request), fields(request)
    found = []
    for name in names or [name for name in known if name not in without]:
        field, said = known[name], known[name].metadata
        required = field.default is dataclasses.MISSING
        kind = _kind(hints[name])
        many = typing.get_origin(kind) is list
        default = None if unsaid or many else _NONE_GIVEN if required else field.default
        metavar = None if kind is bool else said["metavar"]
        kind = kind | None if default is None else kind
        found.append(option(name, kind, _text(said["help"]), metavar=metavar, default=default))
    return found


def command(
    app: typer.Typer,
    *groups: inspect.Parameter | Sequence[inspect.Parameter],
    name: str | None = None,
    epilog: str | None = None,
) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Register a function as a command with these parameters, besides --json and --debug, which every one has."""
    parameters = [p for group in groups for p in ([group] if isinstance(group, inspect.Parameter) else group)]
    parameters += [
        option("json", bool, "Write exactly one JSON object to stdout, all else to stderr.", default=False),
        option("debug", bool, "Show the traceback of an error.", default=False),
    ]

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        @functools.wraps(function)
        def run(**said: Any) -> Answer:
            return function(**{key: value for key, value in said.items() if key not in ("json", "debug")})

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name, epilog=epilog)(run)
        return function

    return register


def _text(help_: str) -> str:
    """Return a field's help text with the names that stand in a table."""
    return help_.replace("{methods}", "; ".join(f"{name}: {method.says}" for name, method in METHODS.items()))


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kind(hint: Any) -> Any:
    """Return the type by which the command line reads a field: one of several texts is checked by the record."""
    if typing.get_origin(hint) is Literal:
        return str
    if typing.get_origin(hint) is tuple:
        return list[str]
    inside = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return inside[0] if inside else hint
