"""Random CNNs as ordinary modules, random plans, and the proof: masked = sliced, and the widths are the plan's.

    python -m tests.network.random_networks --cases 2000 --first-seed 0

A network is a list of small steps, so that one that fails can be shrunk by leaving steps out. What a plan
means is `tests.meaning`; nothing here looks at bar_edge's channel rules except to count how often they are missing.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter

import torch

from tests.network.random_networks.case import Case
from tests.network.random_networks.grower import random_case
from tests.network.random_networks.proof import examine
from tests.network.random_networks.shrinking import shrunk


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, help="blocks per network; 1 to 7 at random if not given")
    parser.add_argument("--case", help="examine this case, the JSON that a failure prints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        finding = examine(Case.from_json(options.case), files=True)
        print(finding.failure or "exact")
        return int(finding.failure is not None)
    failures, blind, start = 0, 0, time.perf_counter()
    operators, opaque, example = Counter[str](), Counter[str](), dict[str, int]()
    for done, seed in enumerate(range(options.first_seed, options.first_seed + options.cases), start=1):
        removed = random.Random(f"removed {seed}").choice([0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9])
        finding = examine(random_case(seed, removed, options.blocks), files=seed % 10 == 0)
        operators, opaque, blind = operators + finding.operators, opaque + finding.opaque, blind + finding.blind
        example = dict.fromkeys(finding.opaque, seed) | example
        if finding.failure is not None:
            failures += 1
            print(f"FAILED seed {seed}: {shrunk(finding.failure)}", flush=True)
        if done % 50 == 0 or done == options.cases:
            seconds = (time.perf_counter() - start) / done
            print(f"{done} cases, {failures} failed, {blind} blind, {seconds:.2f} s each", flush=True)
    total, without = operators.total(), opaque.total()
    print(f"{without} of {total} operators without a rule ({without / max(1, total):.2%}):")
    for name, number in opaque.most_common():
        print(f"  {name}: {number} of {operators[name]}, first in seed {example[name]}")
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
