"""Files that are whole or not there: a temporary name, then a rename."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from bar_edge.errors import InputError

#: larger than any file of ours
JSON_LIMIT_BYTES = 256 * 2**20


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write to a temporary name beside `path`, then rename: the old file stays whole until then.

    Raises InputError where that cannot be done; nothing half-written stays behind.
    """
    temporary = path.with_name(f".{os.getpid()}.tmp")  # short: the name itself may be as long as names can be
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a machine that dies leaves the old file or the new one, not an empty one
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"a place to write {path.name}",
            got=error.strerror or type(error).__name__,
            consequence="no file was written",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there; raises InputError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            "a folder that can be written",
            got=f"{folder.name}: {error.strerror}",
            consequence="nothing was written",
            remedy="choose another place",
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left; only for who alone writes in the folder."""
    for stale in folder.glob(".*.tmp"):
        stale.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON as `write_bytes` does."""
    write_bytes(path, (json.dumps(data, indent=1, sort_keys=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; raises InputError if the file is missing, too large, nested too deep, or holds what JSON has not."""
    try:
        with path.open("rb") as file:
            data = file.read(JSON_LIMIT_BYTES + 1)
        if len(data) > JSON_LIMIT_BYTES:
            raise ValueError(f"more than {JSON_LIMIT_BYTES >> 20} MiB")
        return json.loads(data.decode("utf-8-sig"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        got = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise InputError(f"a JSON file at {path.name}", got=str(got), remedy="correct the path") from error


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
