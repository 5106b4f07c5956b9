"""Entry of the console script: runs a command, prints what it returns, turns errors into lines and exit codes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, TextIO

import typer

from bar_edge.errors import BarEdgeError, EnvironmentLacks, Terminated
from bar_edge_cli.commands import app

INTERRUPTED = 130
#: what a file or a device may say to a terminal that is not text
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
#: an error of ours (EX_SOFTWARE)
BUG = 70
#: errors of the file system that a user can mend; any other OSError is a bug of ours
_USERS_OSERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE),
}
#: in what torch, CUDA and ONNX Runtime say when memory is short
_NO_MEMORY = ("out of memory", "can't allocate memory", "Failed to allocate memory", "bad_alloc")


def run() -> None:
    """Run the command of `sys.argv` and leave the process with its exit code."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code: 0 yes, 1 no (the verdict), 2 input, 3 environment, 70 a bug.

    128 and the number of a signal that ended it: 130 is Ctrl-C, 143 SIGTERM, 129 SIGHUP.
    """
    # read here and not from the parser, so that they also hold for what goes wrong while parsing
    as_json, debug = "--json" in argv, "--debug" in argv
    with _own_stdout(as_json) as out, _unwinding_signals():
        try:
            _check_alone()
            answer = typer.main.get_command(app)(list(argv), prog_name="bar-edge", standalone_mode=False)
            if answer == INTERRUPTED:  # typer caught it
                raise KeyboardInterrupt
            if not isinstance(answer, dict):  # after --help
                return int(answer or 0)
            if as_json:
                _write(answer, out)
            else:
                from bar_edge_cli.show import show  # rich's tables take a moment to load: not for --help

                show(answer)
            return 0 if answer.get("verdict") in (True, None) else 1
        except BrokenPipeError:  # the reader went away, as in `bar-edge inspect ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0
        except (KeyboardInterrupt, typer.Abort):
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except Terminated as error:
            print("terminated", file=sys.stderr)
            return int(str(error.code))
        except Exception as error:
            if debug:
                traceback.print_exc()
            code, lines = _explain(error)
            for part, text in lines.items():
                print(f"{part}: {_CONTROL.sub('?', text)}", file=sys.stderr)
            if as_json:
                _write({"error": lines, "exit_code": code}, out)
            return code


@contextlib.contextmanager
def _unwinding_signals() -> Iterator[None]:
    """Let the signals of schedulers and closed terminals unwind the command, so that it leaves nothing half-written."""

    def end(number: int, _: FrameType | None) -> None:
        raise Terminated(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # what is ignored, as under nohup, stays so; and only the main thread may have handlers
    alone = threading.current_thread() is threading.main_thread()
    held = [number for number in numbers if alone and signal.getsignal(number) == signal.SIG_DFL]
    for number in held:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in held:
            signal.signal(number, signal.SIG_DFL)


def _check_alone() -> None:
    """Raise EnvironmentLacks under torchrun with several processes, which would all do the same work."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EnvironmentLacks(
            "one process: bar-edge does not train on several yet",
            got=f"torchrun with {os.environ['WORLD_SIZE']} processes",
            consequence="nothing was started",
            remedy="start bar-edge without torchrun",
        )


def _explain(error: Exception) -> tuple[int, dict[str, str]]:
    if isinstance(error, BarEdgeError):
        parts = ("required", "got", "consequence", "remedy")
        return error.exit_code, {part: str(getattr(error, part)) for part in parts if getattr(error, part)}
    if hasattr(error, "format_message"):  # click's usage errors; typer carries a click of its own
        return 2, {"required": "options as `bar-edge COMMAND --help` lists them", "got": error.format_message()}
    if isinstance(error, ModuleNotFoundError) and not (error.name or "bar_edge").startswith("bar_edge"):
        return 3, {"required": f"the Python package {error.name}", "got": str(error), "remedy": "install it with pip"}
    if isinstance(error, OSError) and error.errno in _USERS_OSERRORS:
        return 2, {"required": "files and folders that can be read and written", "got": str(error)}
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return 3, {"required": "enough memory", "got": _first_line(error), "remedy": "use a smaller --batch"}
    bug = f"{type(error).__name__}: {error}"
    return BUG, {"bug in bar-edge": bug, "remedy": "run again with --debug and report what it prints"}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _write(answer: dict[str, Any], out: TextIO) -> None:
    out.write(json.dumps(answer, default=str) + "\n")
    out.flush()


@contextlib.contextmanager
def _own_stdout(wanted: bool) -> Iterator[TextIO]:
    """Keep stdout for one JSON object: whatever libraries print, C code included, goes to stderr meanwhile."""
    if not wanted:
        yield sys.stdout
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield out
        finally:
            out.flush()
            os.dup2(out.fileno(), 1)


if __name__ == "__main__":
    run()
