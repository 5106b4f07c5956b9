"""Which things belong together, found by joining two at a time."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Unions(Generic[T]):
    """Sets of things that were joined; a thing that was never joined is a set of its own."""

    def __init__(self) -> None:
        self._parent: dict[T, T] = {}

    def root(self, one: T) -> T:
        """Return the thing that stands for the set of another."""
        while (above := self._parent.get(one, one)) != one:
            self._parent[one] = self._parent.get(above, above)
            one = above
        return one

    def join(self, first: T, second: T) -> None:
        """Make two sets one, for which stands what stood for the first."""
        a, b = self.root(first), self.root(second)
        self._parent[b] = a
