"""How names and values are written in Python."""

from __future__ import annotations

import builtins
import keyword
import re
from typing import Any

WIDTH = 120


def path_of(name: str) -> str:
    """Return how self's part of a dotted name is written: layer1.0.conv1 -> self.layer1[0].conv1."""
    text = "self"
    for part in name.split(".") if name else []:
        if part.isdigit() and str(int(part)) == part:
            text += f"[{part}]"
        elif part.isidentifier() and not keyword.iskeyword(part) and not part.startswith("__"):
            text += f".{part}"
        else:
            text += f"[{part!r}]"
    return text


def block_of(name: str) -> str:
    """Return the block that a dotted name lies in, up to its first numbers: stages.0.1.body.2 -> stages.0.1."""
    parents = name.split(".")[:-1]
    end = next((i for i, part in enumerate(parents) if part.isdigit()), len(parents))
    while end < len(parents) and parents[end].isdigit():
        end += 1
    return ".".join(parents[:end])


def one_number(value: Any) -> Any:
    """Return the one number that all axes share, else the value itself."""
    if isinstance(value, list | tuple) and value and all(type(v) in (int, float) and v == value[0] for v in value):
        return value[0]
    return value


def short_tuple(value: tuple[Any, ...]) -> str:
    """Write a tuple of numbers, shorter where they follow a rule."""
    if len(value) > 3 and len(set(value)) == 1:
        return f"({value[0]!r},) * {len(value)}"
    return f"tuple(range({len(value)}))" if len(value) > 3 and value == tuple(range(len(value))) else repr(value)


def tuple_of(texts: list[str]) -> str:
    """Write a tuple of what is written."""
    return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"


def colon(start: str, stop: str, step: str) -> str:
    """Write a slice without its brackets."""
    return f"{start}:{stop}" + (f":{step}" if step else "")


def wrapped(line: str) -> str:
    """Break a long line at commas, unless it holds strings."""
    if len(line) <= WIDTH or "'" in line or '"' in line or "(" not in line:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    head, inner = line[: line.index("(") + 1], line[line.index("(") + 1 : line.rindex(")")]
    lines = [indent]
    for piece in inner.split(", "):
        if len(lines[-1]) + len(piece) + 2 > WIDTH:
            lines[-1] = lines[-1].rstrip()
            lines.append(indent)
        lines[-1] += f"{piece}, "
    lines[-1] = lines[-1].removesuffix(", ")
    return "\n".join([head, *lines, f"{indent[4:]}{line[line.rindex(')') :]}"])


def identifier(text: str) -> str:
    """Return a name that is near a text, and none of Python's own."""
    name = re.sub(r"\W", "_", text, flags=re.ASCII)
    name = f"y_{name}" if not name.isidentifier() else name
    return "y" if hasattr(builtins, name) else name
