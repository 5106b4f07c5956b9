"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from bar_edge.errors import InputError
from bar_edge.files import make_folder

NAME = ".lock"


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes of ours out of a folder, made if need be; the lock ends with the process, however it ends.

    Raises InputError where another one is at work, or where nothing can be written.
    """
    new = not folder.exists()
    make_folder(folder)
    lock = FileLock(folder / NAME, mode=0o666)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            "a folder in which no other process is at work",
            got=folder.name,
            consequence="nothing was started, the other process goes on",
            remedy="wait for it, or choose another folder",
        ) from None
    except (OSError, NotImplementedError) as error:
        raise InputError("a folder that can be written", got=f"{folder.name}: {error}") from error
    try:
        yield
    finally:
        if new and [path.name for path in folder.iterdir()] == [NAME]:  # nothing was started
            (folder / NAME).unlink()
            folder.rmdir()
        lock.release()
