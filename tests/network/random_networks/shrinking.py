"""A case that fails, made smaller as long as it fails in the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from tests.network.random_networks.case import Case, Failure, Step
from tests.network.random_networks.proof import examine
from tests.network.random_networks.steps import RandomNetwork


def smaller(case: Case) -> Iterator[Case]:
    """Yield cases with fewer outputs, then with fewer steps: long runs of steps first, the last ones first."""
    if len(case.outputs) > 1:
        yield from (_reachable(dataclasses.replace(case, outputs=(name,))) for name in case.outputs)
    yield _reachable(case)
    length = len(case.steps)
    while length := length // 2:
        for start in range(len(case.steps) - length, -1, -length):
            shorter = case
            for step in reversed(case.steps[start : start + length]):
                shorter = _without(shorter, step)
            yield shorter


def _without(case: Case, gone: Step) -> Case:
    """Leave a step out: who reads it reads what it read first."""

    def renamed(name: str) -> str:
        return gone.sources[0] if name.partition(".")[0] == gone.name else name

    steps = [
        dataclasses.replace(step, sources=tuple(map(renamed, step.sources))) for step in case.steps if step != gone
    ]
    return dataclasses.replace(case, steps=tuple(steps), outputs=tuple(dict.fromkeys(map(renamed, case.outputs))))


def _reachable(case: Case) -> Case:
    """Leave out the steps that no output depends on."""
    wanted, steps = {name.partition(".")[0] for name in case.outputs}, []
    for step in reversed(case.steps):
        if step.name in wanted:
            steps.append(step)
            wanted |= {name.partition(".")[0] for name in [*step.sources, str(step.options.get("of", ""))]}
    return dataclasses.replace(case, steps=tuple(reversed(steps)))


def shrink(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Return a case that still fails and none of whose parts can be left out."""
    while True:
        size = (len(case.outputs), len(case.steps))
        better = (c for c in smaller(case) if (len(c.outputs), len(c.steps)) < size and _builds(c) and fails(c))
        found = next(better, None)
        if found is None:
            return case
        case = found


def _builds(case: Case) -> bool:
    try:
        RandomNetwork(case)
    except Exception:  # what is left does not fit together: not a smaller example
        return False
    return True


def shrunk(failure: Failure) -> Failure:
    """Return the same kind of failure of a small network."""
    kind, head = failure.kind, failure.detail.partition(":")[0]

    def same(other: Failure | None) -> bool:
        if other is None or other.kind != kind:
            return False
        return kind not in ("trace", "slice", "meaning", "file") or other.detail.partition(":")[0] == head

    case = shrink(failure.case, lambda c: same(examine(c, files=kind == "file").failure))
    return examine(case, files=kind == "file").failure or failure
