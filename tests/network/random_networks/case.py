"""Records: a network as a list of steps, what can fail in it, and what was found."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

Shape = tuple[int, ...]
Option = int | float | str | bool | list[int]


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation: its name, its kind in KINDS, the names of what it reads ("a.1" is part 1 of a), settings."""

    name: str
    kind: str
    sources: tuple[str, ...]
    options: dict[str, Option]

    def __str__(self) -> str:
        return (
            f"{self.name} = {self.kind}({', '.join([*self.sources, *(f'{k}={v}' for k, v in self.options.items())])})"
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and what is removed from it: inputs are named x0, x1, ..., (N, *shape) each."""

    shapes: tuple[Shape, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    seed: int
    removed: float
    #: share of layers that lose all their channels
    dead: float = 0.0

    def __str__(self) -> str:
        heading = (
            f"inputs {self.shapes}, outputs {self.outputs}, seed {self.seed}, removed {self.removed}, dead {self.dead}"
        )
        return "\n".join([heading, *(f"  {step}" for step in self.steps)])

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        data = json.loads(text)
        steps = [Step(s["name"], s["kind"], tuple(s["sources"]), s["options"]) for s in data.pop("steps")]
        shapes, outputs = tuple(map(tuple, data.pop("shapes"))), tuple(data.pop("outputs"))
        return cls(shapes=shapes, steps=tuple(steps), outputs=outputs, **data)


@dataclasses.dataclass(frozen=True)
class Failure:
    """What went wrong with a case: trace, slice, answer, count, width, file, or meaning (the reference itself)."""

    kind: str
    detail: str
    case: Case

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}\n{self.case}\n  {self.case.to_json()}"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a case showed; blind: the answer does not depend on the inputs; operators, opaque: nodes by operator."""

    failure: Failure | None
    blind: bool = False
    operators: Counter[str] = dataclasses.field(default_factory=Counter)
    opaque: Counter[str] = dataclasses.field(default_factory=Counter)
