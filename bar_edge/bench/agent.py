"""The far end of `--on ssh://HOST`: keeps one folder, takes files, runs programs there, gives files back.

ssh.py sends this text through the connection; only the folder is ever on the device's disk, and it goes when the
connection ends, however it ends. Python 3.8, standard library only. A message is a line of JSON, followed by as
many raw bytes as its `size` says; each is answered by one.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

#: what stands before the first answer, because a login shell may print a greeting
HELLO = b"bar-edge agent 1\n"
PIECE = 1 << 20


def put(folder: str, message: dict[str, Any]) -> dict[str, Any]:
    """Store a file and return the hash of what the disk gives back."""
    data = sys.stdin.buffer.read(message["size"])
    if len(data) < message["size"]:
        raise EOFError
    path = _inside(folder, message["name"])
    with open(path, "wb") as stream:
        stream.write(data)
    return {"sha256": _hash(path)}


def get(folder: str, message: dict[str, Any]) -> dict[str, Any]:
    """Answer with a file's size and hash; its bytes follow."""
    path = _inside(folder, message["name"])
    return {"size": os.path.getsize(path), "sha256": _hash(path), "path": path}


def run(folder: str, message: dict[str, Any]) -> dict[str, Any]:
    """Run a program in the folder, `python` meaning this one, until it ends, its time is up or the connection does."""
    command = [sys.executable if word == "python" else word for word in message["command"]]
    with open(_inside(folder, message["stdin"]), "rb") as stdin:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "TMPDIR": folder},  # what a runtime leaves behind goes with the folder
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    printed: dict[Any, list[bytes]] = {process.stdout: [], process.stderr: []}
    still_open, end, timed_out = list(printed), time.monotonic() + message["timeout_s"], False
    try:
        while still_open:
            ready = select.select([*still_open, sys.stdin], [], [], max(0.0, end - time.monotonic()))[0]
            if sys.stdin in ready:  # nothing is sent while a program runs: the connection has ended
                raise EOFError
            timed_out = not ready
            if timed_out:
                break
            for stream in ready:
                piece = os.read(stream.fileno(), PIECE)
                printed[stream].append(piece)
                if not piece:
                    still_open.remove(stream)
    finally:
        if still_open:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    out, err = (b"".join(printed[stream]).decode("utf-8", "replace") for stream in (process.stdout, process.stderr))
    return {"returncode": process.returncode, "timed_out": timed_out, "stdout": out, "stderr": err}


def main() -> None:
    """Answer messages until the connection ends; the first one names the folder."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    sys.stdout.buffer.write(HELLO)
    sys.stdout.buffer.flush()
    folder = ""
    try:
        for line in sys.stdin.buffer:
            message = json.loads(line)
            try:
                if message["do"] == "open":
                    folder = os.path.join(tempfile.gettempdir(), message["folder"])
                    shutil.rmtree(folder, ignore_errors=True)  # of a connection that ended before its agent could
                    os.mkdir(folder, 0o700)
                    answer: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
                else:
                    answer = {"put": put, "get": get, "run": run}[message["do"]](folder, message)
            except OSError as error:
                answer = {"error": error.strerror or str(error), "errno": error.errno, "free_mb": _free_mb()}
            path = answer.pop("path", None)
            sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
            if path is not None:
                with open(path, "rb") as stream:
                    shutil.copyfileobj(stream, sys.stdout.buffer)
            sys.stdout.buffer.flush()
    except (EOFError, BrokenPipeError):
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _inside(folder: str, name: str) -> str:
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise OSError(f"no plain file name: {name!r}")
    return os.path.join(folder, name)


def _hash(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for piece in iter(lambda: stream.read(PIECE), b""):
            digest.update(piece)
    return digest.hexdigest()


def _free_mb() -> float:
    return round(shutil.disk_usage(tempfile.gettempdir()).free / 1e6, 1)


def _die_with_parent() -> None:
    """Have Linux kill the child when this process is killed: PR_SET_PDEATHSIG is 1."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main()
