"""A device behind the system's OpenSSH: files there and back with their hashes checked, programs run, nothing left.

One connection carries it all, with the user's own configuration, keys and known hosts. The remote command is a
constant, except for the Python that the user may name; file names and requests travel as data (see agent.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import secrets
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bar_edge.bench import agent
from bar_edge.errors import EnvironmentLacks, InputError

_TARGET = re.compile(
    r"ssh://(?:(?P<user>[\w.][\w.-]*)@)?(?P<host>[\w][\w.-]*|\[[0-9a-fA-F:.]+\])(?::(?P<port>\d{1,5}))?(?P<python>/[^\s\x00-\x1f]+)?"
)
#: reads the agent out of the connection; Python 2 and 3.0 understand it too, far enough to say that they are too old
_BOOTSTRAP = (
    'import sys; sys.version_info < (3, 8) and sys.exit("too old: Python " + sys.version.split()[0]); '
    "source = sys.stdin.buffer; exec(source.read(int(source.readline())))"
)
_OPTIONS = {
    "BatchMode": "yes",  # a question could be answered by nobody
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",
}
#: the connection is up and Python runs
_START_SECONDS = 40.0
#: the folder is removed
_CLOSE_SECONDS = 20.0
#: for files, besides a second per so many bytes
_FILE_SECONDS, _BYTES_PER_SECOND = 60.0, 100_000
#: that a line of an answer, and a file from there, may have
_LINE_BYTES, _FILE_BYTES = 64 * 2**20, 16 * 2**30
#: what our agent answers to each message, if it is no error
_ANSWERS: dict[str, dict[str, type]] = {
    "open": {"python": str, "machine": str},
    "put": {"sha256": str},
    "get": {"size": int, "sha256": str},
    "run": {"returncode": int, "stdout": str, "stderr": str, "timed_out": bool},
}
_NOTHING = "nothing was measured"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where `--on` points to."""

    text: str
    host: str
    user: str | None = None
    port: int | None = None
    #: the Python there; by default what the login shell finds as python3
    python: str = "python3"

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `ssh://[user@]host[:port][/path/to/python]`; raises InputError for anything else."""
        match = _TARGET.fullmatch(text)
        if match is None or not 0 < int(match["port"] or 22) < 65536:
            raise InputError(
                "local, or ssh://[user@]host[:port][/path/to/python]",
                got=repr(text),
                consequence=_NOTHING,
                remedy="put keys, jump hosts and the like into ~/.ssh/config",
            )
        port = int(match["port"]) if match["port"] else None
        host = match["host"].strip("[]")
        return cls(text=text, host=host, user=match["user"], port=port, python=match["python"] or "python3")

    def command(self) -> list[str]:
        """Return the ssh command that starts the agent there."""
        options = [part for name, value in _OPTIONS.items() for part in ("-o", f"{name}={value}")]
        options += ["-p", str(self.port)] if self.port else []
        options += ["-l", self.user] if self.user else []
        # the shell at the other end takes one text apart: constants, and the path quoted
        return ["ssh", "-axT", *options, "--", self.host, shlex.join([self.python, "-I", "-c", _BOOTSTRAP])]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A program that ended, or was ended."""

    returncode: int
    stdout: str
    stderr: str
    timed_out: bool = False


class Device:
    """A folder on a device, for as long as the `with` block lasts; it is removed whatever happens.

    Every method raises EnvironmentLacks where the device, the connection or its disk fails.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._folder = f"bar-edge-{secrets.token_hex(8)}"
        #: python and machine, as the device says
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Device:
        if shutil.which("ssh") is None:
            raise EnvironmentLacks("OpenSSH's ssh on this machine", got="no such command", consequence=_NOTHING)
        try:
            self._connect()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._close() != 0:  # the agent was killed, or the connection was lost, before it could remove the folder
            with contextlib.suppress(EnvironmentLacks):
                self._connect()  # a new agent removes what it finds
            self._close()

    def send(self, files: Mapping[str, Path | bytes]) -> None:
        """Store files under plain names; each is read back there, and must have the hash that it has here."""
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            answer = self._ask({"do": "put", "name": name}, data, seconds=_file_seconds(len(data)))
            if answer["sha256"] != hashlib.sha256(data).hexdigest():
                raise self._changed(name)

    def run(self, command: Sequence[str], *, stdin: str, timeout_s: float) -> Finished:
        """Run a program in the folder with a file of it as its input; the word `python` names the Python there."""
        message = {"do": "run", "command": list(command), "stdin": stdin, "timeout_s": timeout_s}
        answer = self._ask(message, seconds=timeout_s + _START_SECONDS)
        return Finished(**{name: answer[name] for name in _ANSWERS["run"]})

    def fetch(self, names: Sequence[str], folder: Path) -> None:
        """Copy files of the folder there into a folder here, and check their hashes."""
        for name in names:
            answer = self._ask({"do": "get", "name": name})
            with self._patience(_file_seconds(answer["size"])):
                data = self._out.read(answer["size"])
            if len(data) < answer["size"]:
                raise self._lost()
            if hashlib.sha256(data).hexdigest() != answer["sha256"]:
                raise self._changed(name)
            (folder / name).write_bytes(data)

    # ---------------------------------------------------------------------------------- inside

    def _connect(self) -> None:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by _close
        self._ssh = subprocess.Popen(
            self.target.command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr
        )
        assert self._ssh.stdin is not None and self._ssh.stdout is not None
        self._in, self._out, self._expired = self._ssh.stdin, self._ssh.stdout, False
        source = Path(agent.__file__).read_bytes()
        with self._patience(_START_SECONDS):
            self._write(b"%d\n%s" % (len(source), source))
            greeting = b""
            while not greeting.endswith(agent.HELLO):
                line = self._out.readline()
                if not line:
                    raise self._refused()
                greeting = line
        self.facts = self._ask({"do": "open", "folder": self._folder})

    def _close(self) -> int | None:
        """End the connection; returns ssh's exit status, 0 where the agent ended by itself."""
        with contextlib.suppress(BrokenPipeError):
            self._in.close()
        try:
            return self._ssh.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            return self._ssh.wait()
        finally:
            self._out.close()
            self._stderr.close()

    def _ask(self, message: dict[str, Any], data: bytes = b"", *, seconds: float = _FILE_SECONDS) -> dict[str, Any]:
        with self._patience(seconds):
            self._write(json.dumps({**message, "size": len(data)}).encode() + b"\n" + data)
            line = self._out.readline(_LINE_BYTES)
        if len(line) == _LINE_BYTES:
            raise self._strange()
        if not line.endswith(b"\n"):
            raise self._lost()
        try:
            answer: dict[str, Any] = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._strange() from error
        if not _is_answer(answer, message["do"]):
            raise self._strange()
        if "error" in answer and message["do"] == "run":
            got = f"{message['command'][0]}: {answer['error']}"
            raise EnvironmentLacks(f"a program that starts on {self.target.text}", got=got, consequence=_NOTHING)
        if "error" in answer:
            raise EnvironmentLacks(
                f"room and rights for the files on {self.target.text}",
                got=f"{answer['error']} ({message.get('name', 'folder')}; {answer.get('free_mb')} MB free)",
                consequence=_NOTHING,
                remedy="free some space, or set TMPDIR there to a folder that has it",
            )
        return answer

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # the reader then finds the end and says why
            self._in.write(data)
            self._in.flush()

    @contextlib.contextmanager
    def _patience(self, seconds: float) -> Iterator[None]:
        """Kill the connection after so long: whoever waits for an answer then finds its end."""

        def expire() -> None:
            self._expired = True
            self._ssh.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _said(self) -> str:
        """Wait for ssh to end, and return what it and the shell wrote to stderr."""
        try:
            self._ssh.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
        self._stderr.seek(0)
        return self._stderr.read().decode("utf-8", "replace").strip()

    def _refused(self) -> EnvironmentLacks:
        """Say why no agent runs there."""
        said, status = self._said(), self._ssh.returncode
        last = (said.splitlines() or [f"exit status {status}"])[-1].strip()[:300]
        required, remedy = _reason(said, status)
        got = f"no answer within {_START_SECONDS:g} s" if self._expired else last
        return EnvironmentLacks(f"{self.target.text}: {required}", got=got, consequence=_NOTHING, remedy=remedy)

    def _lost(self) -> EnvironmentLacks:
        last = (self._said().splitlines() or [f"exit status {self._ssh.returncode}"])[-1].strip()[:300]
        return EnvironmentLacks(
            f"a connection to {self.target.text} that lasts",
            got="no answer in time" if self._expired else f"it ended in the middle: {last}",
            consequence=_NOTHING,
            remedy="look whether the device ran out of memory or power, and try again",
        )

    def _strange(self) -> EnvironmentLacks:
        return EnvironmentLacks(
            f"answers of our agent on {self.target.text}",
            got="another one: what it says is not used",
            consequence=_NOTHING,
            remedy="look what its login shell and Python print, and whether it is the device that you mean",
        )

    def _changed(self, name: str) -> EnvironmentLacks:
        return EnvironmentLacks(
            f"{name} with the same SHA-256 on {self.target.text} as here",
            got="another one",
            consequence=_NOTHING,
            remedy="try again; if it happens again, distrust the disk or the connection",
        )


#: what ssh or the shell writes -> what is required, what to do
_REASONS = {
    "Permission denied": ("a key that it accepts", "check user, key and agent: ssh -v with the same host"),
    "Host key verification failed": ("a host key that is known", "log in once with ssh, and compare the fingerprint"),
    "Could not resolve": ("a host that can be found", "check the name, or give it one in ~/.ssh/config"),
    "too old": ("Python 3.8 or newer", "install one there, and name it: ssh://HOST/path/to/python3"),
    "Exec format error": ("a python3 of the device's own architecture", "install the right one there"),
}


def _reason(said: str, status: int) -> tuple[str, str]:
    for words, reason in _REASONS.items():
        if words in said:
            return reason
    if status == 127:
        return "python3", "install Python 3.8 or newer there, or name one: ssh://HOST/path/to/python3"
    if status in (255, -9):
        return "a host that answers", "check name, port and network: ssh -v with the same host"
    return "a Python that starts", "try it there by hand"


def _is_answer(answer: Any, do: str) -> bool:
    """Tell whether a device answers as our agent would: another program may be at the other end."""
    if not isinstance(answer, dict):
        return False
    if "error" in answer:
        return isinstance(answer["error"], str)
    fits = all(isinstance(answer.get(name), kind) for name, kind in _ANSWERS[do].items())
    return fits and 0 <= answer.get("size", 0) <= _FILE_BYTES


def _file_seconds(size: int) -> float:
    return _FILE_SECONDS + size / _BYTES_PER_SECOND
