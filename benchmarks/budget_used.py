"""How much of a counted budget does the projection use? wrn-10-2, random scores; all shares, metrics, roundings.

    python -m benchmarks.budget_used

Of every run: the share of the budget used, and whether a closed bundle (`round_to` channels of one layer) would fit.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from bar_edge.files import write_json
from bar_edge.methods import GateLayout, smallest_cost
from bar_edge.methods.gating.projection import project
from bar_edge.models import build
from bar_edge.network import trace
from bar_edge.records import Metric

RESULTS = Path(__file__).parent / "results" / "budget_used.json"
METRICS: tuple[Metric, ...] = ("volume", "flops", "params")
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)


def used(layout: GateLayout, metric: Metric, share: float, seed: int) -> tuple[float, bool]:
    """Return the share of a budget that a projection uses, and whether one more bundle would fit."""
    full = layout.cost({}, metric)
    limit = max(share * full, smallest_cost(layout, metric))
    scores = torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    plan, _ = project(layout, scores, scores > -0.5, metric, limit)
    cost = layout.cost(plan.kept, metric)
    return cost / limit, cost < 0.97 * limit and fits_more(layout, dict(plan.kept), metric, limit)


def fits_more(layout: GateLayout, kept: dict[str, tuple[int, ...]], metric: Metric, limit: float) -> bool:
    """Tell whether a layer that is there could have `round_to` channels more."""
    for name, (_, n) in layout.offsets.items():
        closed = [i for i in range(n) if i not in kept[name]]
        if kept[name] and len(closed) >= layout.round_to:
            more = tuple(sorted((*kept[name], *closed[: layout.round_to])))
            if layout.cost(kept | {name: more}, metric) <= limit:
                return True
    return False


def main() -> None:
    """Run all, print each, and write the least."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    module = build("wrn-10-2", input_shape=(3, 16, 16), classes=10)
    network = trace(module, torch.zeros(2, 3, 16, 16))
    for round_to, metric, share in itertools.product((1, 4, 8), METRICS, SHARES):
        layout = GateLayout(network, round_to=round_to)
        of_budget, more = used(layout, metric, share, seed=len(rows))
        rows.append({"round_to": round_to, "metric": metric, "share": share, "used": of_budget, "one_more_fits": more})
        print(*rows[-1].values(), flush=True)
    least = min(row["used"] for row in rows)
    write_json(RESULTS, {"runs": rows, "least": least, "one_more_fits": sum(row["one_more_fits"] for row in rows)})
    print(f"least {least:.4f} of {len(rows)}; one more would fit in {sum(row['one_more_fits'] for row in rows)}")


if __name__ == "__main__":
    main()
