"""Files in which a system tells of itself."""

from __future__ import annotations

import glob
import re
from pathlib import Path


def numbers(pattern: str) -> list[int]:
    """Return the whole numbers in files of a pattern."""
    return [int(text) for text in read_all(pattern) if re.fullmatch(r"-?\d+", text)]


def read_all(pattern: str) -> list[str]:
    """Return what is in files of a pattern."""
    return [text for text in map(read, glob.glob(pattern)) if text]


def read(path: str) -> str | None:
    """Return a file's text, None where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
