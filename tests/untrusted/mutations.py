"""Files of ours, mutated: every loader says what is wrong with them, or reads them, within its time."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

#: what a value of JSON or TOML becomes
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.5, 1e308),
    *("", "x", "../../etc/passwd", "\x1b[31m", "aten.zeros.default", "é" * 50, "1" * 5000),
    *([], {}, [[]], [None], {"x": {}}, [1, 1, 1], [-1], list(range(50))),
)
SECONDS = 10


def mutated_json(data: Any, draw: random.Random) -> bytes:
    """Return JSON with one to three odd places."""
    data = copy.deepcopy(data)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(data))
        if not places:
            break
        parent, key = draw.choice(places)
        what = draw.random()
        if what < 0.2:
            del parent[key]
        elif what < 0.3 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif what < 0.4 and isinstance(parent, dict):
            parent[f"{key}x"] = parent.pop(key)
        elif what < 0.5:
            other, name = draw.choice(places)
            with contextlib.suppress(KeyError, IndexError):
                parent[key] = copy.deepcopy(other[name])
        else:
            parent[key] = draw.choice(ODD)
    text = json.dumps(data).encode()
    if draw.random() < 0.1:
        return mutated_bytes(text, draw)
    if draw.random() < 0.05:
        return draw.choice((b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b"Infinity", b"[]", b"null", b"\xff\xfe", b""))
    return text


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with some flipped, cut out, doubled or put in."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        if not found:
            break
        at, what = draw.randrange(len(found)), draw.random()
        if what < 0.5:
            found[at] ^= 1 << draw.randrange(8)
        elif what < 0.65:
            found[at] = draw.choice((0, 255, 127, 128))
        elif what < 0.75:
            del found[at : at + draw.randint(1, 40)]
        elif what < 0.85:
            found[at:at] = found[at : at + draw.randint(1, 40)]
        elif what < 0.95:
            found[at:at] = draw.randbytes(draw.randint(1, 8))
        else:
            del found[at:]
    return bytes(found)


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(items):
        yield data, key
        yield from _places(value)


@contextlib.contextmanager
def within_time() -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds."""

    def ring(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Loader:
    """A file, the folder that it lies in, and what reads it."""

    def __init__(self, folder: Path, name: str, load: Callable[[], object]) -> None:
        self.file, self.load = folder / name, load
        self.whole = self.file.read_bytes()
        self.is_json = self.file.suffix == ".json"

    def tried(self, seed: int) -> bytes:
        """Put a mutated file there, and return it."""
        draw = random.Random(seed)
        data = mutated_json(json.loads(self.whole), draw) if self.is_json else mutated_bytes(self.whole, draw)
        self.file.write_bytes(data)
        return data

    def restore(self) -> None:
        """Put the whole file back."""
        self.file.write_bytes(self.whole)


def png(width: int, height: int, shade: int = 128) -> bytes:
    """Return a grey image as PNG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("L", (width, height), shade).save(stream, "PNG")
    return stream.getvalue()
