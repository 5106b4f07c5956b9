"""What a user can get wrong, and what her machine can lack."""

from __future__ import annotations


class BarEdgeError(Exception):
    """An error that ends a command with a few lines on stderr instead of a traceback.

    required: what the command needs; got: what it found; consequence: what follows;
    remedy: what to do. `exit_code` is the process's exit status (design: contracts).
    """

    exit_code = 2

    def __init__(self, required: str, *, got: str, consequence: str = "", remedy: str = "") -> None:
        self.required, self.got, self.consequence, self.remedy = required, got, consequence, remedy
        lines = [f"required: {required}", f"got: {got}"]
        lines += [f"consequence: {consequence}"] if consequence else []
        lines += [f"remedy: {remedy}"] if remedy else []
        super().__init__("\n".join(lines))


class InputError(BarEdgeError):
    """Bad input or usage: exit code 2."""


class Terminated(SystemExit):
    """A signal has ended the command: exit code 128 and its number (143 for SIGTERM, 129 for SIGHUP)."""


class EnvironmentLacks(BarEdgeError):
    """The environment lacks something that was asked for (a package, a GPU, a host): exit code 3."""

    exit_code = 3
