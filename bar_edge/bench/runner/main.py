"""One request from stdin, one answer to stdout."""

from __future__ import annotations

import json
import os
import sys

from .measuring import measure
from .records import Problem
from .telling import end_with_parent


def main() -> None:
    """Answer one request; a user's mistake is an answer too."""
    end_with_parent()
    # a runtime that prints must not break the JSON: hand it stderr instead of stdout
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        answer = measure(json.load(sys.stdin))
    except Problem as problem:
        answer = {"error": problem.fields}
    with os.fdopen(answer_fd, "w", encoding="utf-8") as stream:
        json.dump(answer, stream)
