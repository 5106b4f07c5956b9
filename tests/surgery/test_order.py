"""The order of a stream: first writes first, in as few runs as any such order has."""

import itertools

import pytest
import torch
from torch import Tensor

from bar_edge.surgery import stream_order as order
from bar_edge.surgery.stream_order import runs, stream_order


def random_writes(seed: int, writers: int = 0, width: int = 0, share: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    writers = writers or int(torch.randint(1, 6, (), generator=generator))
    width = width or int(torch.randint(1, 8, (), generator=generator))
    return torch.rand(writers, width, generator=generator) < share


def first_writers(writes: Tensor) -> list[int]:
    return [next((w for w in range(len(writes)) if writes[w, c]), len(writes)) for c in range(writes.shape[1])]


def fewest_runs(writes: Tensor) -> int:
    first = first_writers(writes)
    orders = itertools.permutations(range(writes.shape[1]))
    return min(
        sum(1 for row in writes for inside, group in itertools.groupby(row[list(o)].tolist()) if inside)
        for o in orders
        if all(first[a] <= first[b] for a, b in itertools.pairwise(o))
    )


@pytest.mark.parametrize("seed", range(40))
def test_as_few_runs_as_brute_force(seed: int) -> None:
    writes = random_writes(seed)
    found = stream_order(writes)
    assert sorted(found.tolist()) == list(range(writes.shape[1]))
    first = first_writers(writes)
    assert all(first[a] <= first[b] for a, b in itertools.pairwise(found.tolist()))
    assert runs(writes, found) == fewest_runs(writes)


@pytest.mark.parametrize("seed", range(20))
def test_the_heuristic_is_near(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = random_writes(seed, writers=5, width=7)
    monkeypatch.setattr(order, "EXACT", 0)
    found = stream_order(writes)
    first = first_writers(writes)
    assert all(first[a] <= first[b] for a, b in itertools.pairwise(found.tolist()))
    assert runs(writes, found) <= 1.2 * fewest_runs(writes)


def test_wide_streams_have_far_fewer_runs_than_in_the_order_of_their_numbers() -> None:
    writes = random_writes(0, writers=12, width=768, share=0.1)
    plain = torch.argsort(torch.tensor(first_writers(writes)), stable=True)
    assert runs(writes, stream_order(writes)) < 0.7 * runs(writes, plain)
