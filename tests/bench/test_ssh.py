"""Measuring behind OpenSSH, against a real server on the loopback; every failure is provoked, none is imitated."""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bar_edge.bench import bench_onnx, save_measurement, ssh
from bar_edge.bench.ssh import Device, Target
from bar_edge.errors import EnvironmentLacks, InputError
from bar_edge_cli.main import main
from tests.bench.test_bench import artifact, relu_file
from tests.latency_budget.test_latency import small_table

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@dataclasses.dataclass
class Server:
    """An OpenSSH server with keys of its own; what it runs for a login is a script that each test may write."""

    folder: Path
    port: int

    @property
    def target(self) -> str:
        return f"ssh://127.0.0.1:{self.port}"

    @property
    def tmp(self) -> Path:
        """What the device has as its folder for temporary files."""
        return self.folder / "tmp"

    def login_runs(self, script: str = "", last: str = 'exec sh -c "$SSH_ORIGINAL_COMMAND"') -> None:
        # the device's python3 is this one
        python = f"export PATH='{Path(sys.executable).parent}':/usr/bin:/bin TMPDIR='{self.tmp}'"
        (self.folder / "login").write_text(f"{python}\n{script}\n{last}\n")

    def allow(self, key: Path) -> None:
        forced = f'command="sh {self.folder}/login"'
        (self.folder / "authorized_keys").write_text(f"{forced} {key.read_text()}")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("no OpenSSH server here: apt install openssh-server")
    folder = tmp_path_factory.mktemp("sshd")
    with socket.create_server(("127.0.0.1", 0)) as free:
        server = Server(folder, free.getsockname()[1])
    for name in ("host_key", "user_key", "other_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {server.port}\nHostKey {folder}/host_key\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nPasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nUsePAM no\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # what its package makes at boot
    checked = subprocess.run([SSHD, "-t", "-f", folder / "sshd_config"], capture_output=True, text=True)
    if checked.returncode:
        pytest.skip(f"the OpenSSH server does not start here: {checked.stderr.strip()}")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", server.port)) == 0:
                    break
            time.sleep(0.05)
        yield server
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def server(running: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server as it should be, an `ssh` that knows it, and the proof that nothing was left on the device."""
    folder = running.folder
    shutil.rmtree(running.tmp, ignore_errors=True)
    running.tmp.mkdir()
    running.login_runs()
    running.allow(folder / "user_key.pub")
    key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{running.port} {key}")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "ssh"  # ssh reads no other configuration than the user's, wherever HOME points
    options = f"-F none -i '{folder}/user_key' -o IdentitiesOnly=yes -o UserKnownHostsFile='{folder}/known_hosts'"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} -o GlobalKnownHostsFile=none "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    yield running
    eventually(lambda: not list(running.tmp.iterdir()))


def eventually(true: object, seconds: float = 10.0) -> None:
    assert callable(true)
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def fake_onnxruntime(folder: Path, code: str) -> str:
    """Write a module that the device imports as its runtime; returns the line for the login script."""
    (folder / "lib").mkdir()
    (folder / "lib" / "onnxruntime.py").write_text(code)
    return f"export PYTHONPATH='{folder}/lib'"


def noting_pid(folder: Path) -> str:
    return f"import os, time\nopen('{folder}/pid', 'w').write(str(os.getpid()))"


# -------------------------------------------------------------------------------------- what works


def test_the_same_measurement_as_here(server: Server, tmp_path: Path) -> None:
    files = [artifact(tmp_path / "right"), artifact(tmp_path / "wrong", off=0.1)]
    right, wrong = bench_onnx(files, seconds=0.05, batch=2, on=server.target)
    (here,) = bench_onnx(files[:1], seconds=0.05, batch=2)
    assert right.environment.keys() == here.environment.keys() and right.conditions.keys() == here.conditions.keys()
    assert (right.name, right.environment["on"], right.environment["interleaved"]) == ("right", "ssh", 2)
    assert right.environment["model_sha256"] == here.environment["model_sha256"]
    assert len(right.samples_ms) == len(wrong.samples_ms) >= 10
    assert right.parity is not None and right.parity["within"]
    assert wrong.parity is not None and not wrong.parity["within"]
    path = save_measurement(files[0], right)
    assert path.name.startswith("bench-onnxruntime-cpu-t1-b2-") and path != save_measurement(files[0], here)
    for word in ("127.0.0.1", str(server.port), str(tmp_path), os.uname().nodename, "request.json"):
        assert word not in path.read_text()


def test_a_latency_table_of_a_device(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = small_table(tmp_path, monkeypatch, on=server.target)
    assert table.environment["on"] == "ssh"
    assert "127.0.0.1" not in (tmp_path / "table.json").read_text()


def test_fast_but_wrong_is_exit_1(server: Server, tmp_path: Path) -> None:
    wrong = artifact(tmp_path / "wrong", off=0.1)
    assert main(["bench", str(wrong), "--on", server.target, "--seconds", "0.05", "--budget", "1000ms", "--json"]) == 1


def test_a_login_that_greets_and_a_python_by_its_path(server: Server, tmp_path: Path) -> None:
    server.login_runs("echo Welcome; echo 'Last login: never' >&2; export PATH=/usr/bin:/bin")
    with Device(Target.parse(f"{server.target}{sys.executable}")) as device:
        assert device.facts["python"] == sys.version.split()[0]


def test_files_there_and_back_and_programs(server: Server, tmp_path: Path) -> None:
    big = os.urandom(3_000_000)
    with Device(Target.parse(server.target)) as device:
        device.send({"in": b"a line\n", "big": big})
        (folder,) = server.tmp.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        done = device.run(["sh", "-c", "cat; echo oops >&2; cp big out; exit 3"], stdin="in", timeout_s=20)
        assert (done.returncode, done.stdout, done.stderr, done.timed_out) == (3, "a line\n", "oops\n", False)
        device.fetch(["out"], tmp_path)
        assert (tmp_path / "out").read_bytes() == big
        script = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
        assert device.run(["python", "-c", script], stdin="in", timeout_s=20).returncode == -signal.SIGSEGV
        for name in ("../out", "a/b", "..", ""):
            with pytest.raises(EnvironmentLacks, match="no plain file name"):
                device.send({name: b""})


def test_a_program_that_does_not_end(server: Server) -> None:
    with Device(Target.parse(server.target)) as device:
        device.send({"in": b""})
        start = time.monotonic()
        done = device.run(["sh", "-c", "echo begun; sleep 100 & sleep 100"], stdin="in", timeout_s=0.5)
        assert done.timed_out and done.stdout == "begun\n" and time.monotonic() - start < 50


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_whoever_measures_is_killed(number: signal.Signals, status: int, server: Server, tmp_path: Path) -> None:
    """The device notices the end of the connection, stops the runner and removes its folder."""
    server.login_runs(fake_onnxruntime(tmp_path, f"{noting_pid(tmp_path)}\ntime.sleep(99)"))
    command = ["bench", str(relu_file(tmp_path / "a.onnx")), "--on", server.target]
    # a shell starts what runs in its background with interrupts ignored, and we may be that
    heeds = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"{heeds}; sys.path[:0] = {sys.path!r}\nfrom bar_edge_cli.main import main\nsys.exit(main({command!r}))"
    ours = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), seconds=60)
    os.kill(ours.pid, number) if number == signal.SIGKILL else os.killpg(ours.pid, number)  # as a terminal does
    assert ours.wait() == status
    eventually(functools.partial(gone, int((tmp_path / "pid").read_text())))


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# -------------------------------------------------------------------------------------- what fails


@pytest.fixture
def fails(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs the command, which must end with exit code 3 and these words."""

    def run(words: str, on: str = server.target) -> None:
        model = relu_file(tmp_path / "a.onnx")
        assert main(["bench", str(model), "--on", on, "--seconds", "0.05"]) == 3
        said = capsys.readouterr().err
        assert re.search(words, said, re.DOTALL), said

    return run


def test_unreachable(fails: Callable[..., None], server: Server, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fails("a host that answers.*refused", on=f"ssh://127.0.0.1:{port}")


def test_a_host_that_accepts_and_stays_silent(
    fails: Callable[..., None], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ssh._OPTIONS, "ConnectTimeout", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        on = f"ssh://127.0.0.1:{silent.getsockname()[1]}"
        fails("a host that answers.*timed out", on=on)


def test_key_refused(fails: Callable[..., None], server: Server, tmp_path: Path) -> None:
    server.allow(server.folder / "other_key.pub")
    fails("a key that it accepts.*Permission denied")


def test_host_key_unknown_or_changed(fails: Callable[..., None], server: Server, tmp_path: Path) -> None:
    known = server.folder / "known_hosts"
    other = (server.folder / "other_key.pub").read_text()
    for text in ("", f"[127.0.0.1]:{server.port} {other}"):
        known.write_text(text)
        fails("a host key that is known")


def test_no_python(fails: Callable[..., None], server: Server, tmp_path: Path) -> None:
    server.login_runs("PATH=/nowhere")
    fails("python3.*not found")


def test_python_too_old(fails: Callable[..., None], server: Server, tmp_path: Path) -> None:
    """No old Python is at hand: this one claims to be old, before the first line that it gets."""
    old = tmp_path / "old"
    old.mkdir()
    claim = 'import sys; sys.version_info = (3, 6, 9); sys.version = "3.6.9 (old)"; exec(sys.argv[3])'
    (old / "python3").write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{claim}' \"$@\"\n")
    (old / "python3").chmod(0o755)
    server.login_runs(f"PATH='{old}':/bin:/usr/bin")
    fails(r"Python 3\.8 or newer.*too old: Python 3\.6\.9")


FOREIGN = {"x86_64": 183, "aarch64": 62}  # ELF's number of the other machine


def foreign_program() -> bytes:
    machine = FOREIGN.get(os.uname().machine)
    if machine is None:
        pytest.skip("no foreign machine known for this one")
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + (2).to_bytes(2, "little") + machine.to_bytes(2, "little")
    return header + bytes(44)


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_python_of_another_architecture(fails: Callable[..., None], shell: str, server: Server, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    (tmp_path / "python3").write_bytes(foreign_program())
    (tmp_path / "python3").chmod(0o755)
    # bash reads .bashrc, which may set the path, when it thinks that it answers ssh
    server.login_runs(f"PATH='{tmp_path}'; unset SSH_CLIENT", f'exec {shutil.which(shell)} -c "$SSH_ORIGINAL_COMMAND"')
    fails("a python3 of the device's own architecture")


def test_runtime_of_another_architecture(fails: Callable[..., None], server: Server, tmp_path: Path) -> None:
    package = tmp_path / "lib" / "onnxruntime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from onnxruntime import native")
    (package / f"native{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(foreign_program())
    server.login_runs(f"export PYTHONPATH='{tmp_path}/lib'")
    fails(f"onnxruntime, built for Python .* on {os.uname().machine}")


def test_no_runtime(fails: Callable[..., None], server: Server, tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=False)
    on = f"{server.target}{tmp_path}/empty/bin/python"
    fails("the package numpy for Python.*pip install numpy", on=on)


def test_disk_full(fails: Callable[..., None], server: Server, tmp_path: Path) -> None:
    server.login_runs("ulimit -f 4")
    fails("room and rights.*File too large.*MB free")


def test_disk_full_for_real(fails: Callable[..., None], server: Server, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        server.login_runs(f"TMPDIR='{small}'")
        fails("room and rights.*No space left on device")
        eventually(lambda: not list(small.iterdir()))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_runner_is_killed(fails: Callable[..., None], server: Server, tmp_path: Path) -> None:
    server.login_runs(fake_onnxruntime(tmp_path, "import os\nos.kill(os.getpid(), 9)"))
    fails(r"killed by SIGKILL while loading a\.onnx on ssh://")


def test_the_agent_is_killed(fails: Callable[..., None], server: Server, tmp_path: Path) -> None:
    """Its runner dies with it, and a second connection removes the folder."""
    kill = "os.kill(os.getppid(), 9)"
    server.login_runs(fake_onnxruntime(tmp_path, f"{noting_pid(tmp_path)}\n{kill}\ntime.sleep(99)"))
    fails("a connection to .* that lasts.*ended in the middle")
    assert not list(server.tmp.iterdir())  # already
    eventually(functools.partial(gone, int((tmp_path / "pid").read_text())))


def test_the_runner_hangs(server: Server, tmp_path: Path) -> None:
    server.login_runs(fake_onnxruntime(tmp_path, "import time\ntime.sleep(99)"))
    with pytest.raises(EnvironmentLacks, match=r"no answer within 3 s( while loading a\.onnx)? on ssh://"):
        bench_onnx([relu_file(tmp_path / "a.onnx")], timeout_s=3, on=server.target)


def test_the_connection_hangs(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "_START_SECONDS", 1.0)
    server.login_runs(last="exec sleep 30")
    with pytest.raises(EnvironmentLacks, match="no answer within 1 s"), Device(Target.parse(server.target)):
        pass


FLIP = """
import os
while piece := os.read(0, 1 << 20):
    os.write(1, piece.replace(b"as it was", b"as it is!"))
"""


def test_hash_mismatch(server: Server, tmp_path: Path) -> None:
    (tmp_path / "flip.py").write_text(FLIP)
    flip, run = f"'{sys.executable}' '{tmp_path}/flip.py'", 'sh -c "$SSH_ORIGINAL_COMMAND"'
    server.login_runs(last=f"{flip} | {run}")
    with (
        pytest.raises(EnvironmentLacks, match="a file with the same SHA-256"),
        Device(Target.parse(server.target)) as device,
    ):
        device.send({"a file": b"this is as it was"})
    server.login_runs(last=f"{run} | {flip}")
    with Device(Target.parse(server.target)) as device:
        device.send({"a file": b"this is as it was"})
        with pytest.raises(EnvironmentLacks, match="a file with the same SHA-256"):
            device.fetch(["a file"], tmp_path)
        assert not (tmp_path / "a file").exists()


# -------------------------------------------------------------------------------- what is typed in


def test_targets() -> None:
    found = Target.parse("ssh://me@board.local:2222/opt/venv/bin/python")
    assert (found.user, found.host, found.port, found.python) == ("me", "board.local", 2222, "/opt/venv/bin/python")
    plain = Target.parse("ssh://jetson")
    assert (plain.user, plain.host, plain.port, plain.python) == (None, "jetson", None, "python3")
    assert Target.parse("ssh://[::1]:22").host == "::1"
    wrong = ("jetson", "ssh://", "ssh://-oProxyCommand=x", "ssh://a b", "ssh://-l@h", "ssh://h:0", "ssh://h:99999")
    for text in (*wrong, "ssh://h:x", "ssh://h/a b", "ssh://h\n", "ssh://h/a\x00", "http://h", "Local", ""):
        with pytest.raises(InputError, match="ssh://"):
            Target.parse(text)


def test_no_shell_reads_what_the_user_typed(server: Server, tmp_path: Path) -> None:
    for text in ("$(touch${IFS}pwned)", "';touch${IFS}pwned;'", "`touch${IFS}pwned`"):
        with pytest.raises(EnvironmentLacks, match="python3"), Device(Target.parse(f"{server.target}/{text}")):
            pass
    command = Target.parse("ssh://h/a;b").command()
    assert command[0] == "ssh" and command[command.index("--") + 1] == "h" and "'/a;b'" in command[-1]
    model = relu_file(tmp_path / "$(touch pwned);a.onnx")
    (found,) = bench_onnx([model], seconds=0.05, on=server.target)
    assert found.name == model.name
    assert not [*tmp_path.rglob("pwned"), *Path.home().glob("pwned"), *server.folder.rglob("pwned")]


def test_no_ssh_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentLacks, match="OpenSSH's ssh on this machine"), Device(Target.parse("ssh://h")):
        pass
