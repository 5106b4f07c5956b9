"""Yes or no: what was asked of a network or a file, and whether it holds."""

from __future__ import annotations

import dataclasses

from bar_edge.records.tolerance import DROP_TOLERANCE


def keeps_metric(drop_points: float, max_drop: float | None) -> bool:
    """Tell whether a drop of the metric is within what is allowed; exactly max_drop is, and None allows any.

    Both in percentage points. A drop that is not a number is within nothing.
    """
    return max_drop is None or drop_points <= max_drop + DROP_TOLERANCE


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The answers to what was asked; None where nobody asked."""

    #: the cost is within the budget
    within: bool | None = None
    #: it computes what it should
    right: bool | None = None
    #: the metric dropped by max_drop at most
    kept: bool | None = None
    #: it is faster than what it replaces
    faster: bool | None = None

    @property
    def yes(self) -> bool:
        """Whether no answer is no."""
        return False not in (self.within, self.right, self.kept, self.faster)
