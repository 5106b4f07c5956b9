"""The order of a stream's channels: by first write, and within that in as few runs per write as possible.

By first write, what a block reads is a prefix (no gather). A write whose channels lie in runs is a few
slices and additions instead of one per channel.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor, fx

from bar_edge.network.channels import Passage, Passages
from bar_edge.network.liveness import Held
from bar_edge.surgery.union_find import Unions

#: classes of at most so many different channels are ordered exactly
EXACT = 6
#: improvements of a heuristic order: at most so many exchanges times channels squared
EFFORT = 40_000_000


def is_identity(passage: Passage) -> bool:
    """Tell whether a tensor has its channels one by one from one input."""
    return (
        passage.kind in ("map", "norm")
        and len(passage.links) == 1
        and torch.equal(passage.links[0].inputs, passage.links[0].outputs)
    )


def joins(passage: Passage) -> bool:
    """Tell whether a tensor's channels are those of its inputs: sums, products, operators on each channel."""
    first, last = (passage.links[0], passage.links[-1]) if passage.links else (None, None)
    halves = first is not None and last is not None and first.source is last.source  # glu
    halves = halves and not torch.equal(passage.links[0].inputs, passage.links[-1].inputs)
    return (passage.kind in ("add", "any", "mul") and not halves) or is_identity(passage)


def streams(found: Passages) -> dict[fx.Node, fx.Node]:
    """Map every tensor to the first tensor of its stream: those joined by additions and per-channel operators."""
    unions = Unions[fx.Node]()
    for node, passage in found.items():
        if joins(passage):
            for link in passage.links:
                if passage.kind != "mul" or found[link.source].width == passage.width:
                    unions.join(link.source, node)
    return {node: unions.root(node) for node in found}


@dataclasses.dataclass(frozen=True, slots=True)
class Stream:
    """The tensors that sums, products and per-channel operators join, in graph order.

    channels: for every tensor, which of the `width` channels of the whole stream it holds, in its own order.
    Channels that meet are one channel; they are numbered by first appearance.
    """

    width: int
    channels: dict[fx.Node, tuple[int, ...]]


def joined_streams(found: Passages) -> list[Stream]:
    """Return the streams in which tensors meet, in graph order."""
    stream = streams(found)
    meet = {stream[node] for node, passage in found.items() if passage.kind in ("add", "mul")}
    unions, start = Unions[int](), 0
    own: dict[fx.Node, list[int]] = {}
    for node, passage in found.items():
        if stream[node] not in meet:
            continue
        if is_identity(passage) and passage.width == found[passage.links[0].source].width:
            own[node] = own[passage.links[0].source]
            continue
        own[node] = list(range(start, start + passage.width))
        for link in passage.links if joins(passage) else ():
            if stream[link.source] is stream[node]:
                for i, o in zip(link.inputs.tolist(), link.outputs.tolist(), strict=True):
                    unions.join(own[link.source][i], start + o)
        start += passage.width
    number: dict[fx.Node, dict[int, int]] = {}
    channels: dict[fx.Node, dict[fx.Node, tuple[int, ...]]] = {}
    for node, ids in own.items():
        numbers = number.setdefault(stream[node], {})
        numbered = tuple(numbers.setdefault(unions.root(i), len(numbers)) for i in ids)
        channels.setdefault(stream[node], {})[node] = numbered
    return [Stream(len(number[first]), tensors) for first, tensors in channels.items()]


def first_write_ranks(found: Passages, held: Held) -> dict[fx.Node, Tensor]:
    """Return for every tensor of a stream the ranks (width,) of its channels in the order of `stream_order`.

    Channels that nobody wrote come last. What is not in the result lies in the order of its numbers.
    """
    ranks: dict[fx.Node, Tensor] = {}
    for stream in joined_streams(found):
        places = {node: torch.tensor(channels) for node, channels in stream.channels.items()}
        writers = [node for node in places if not joins(found[node])]
        writes = torch.zeros(len(writers), stream.width, dtype=torch.bool)
        for mask, node in zip(writes, writers, strict=True):
            mask[places[node][held[node]]] = True
        rank = torch.argsort(stream_order(writes))
        ranks |= {node: rank[place] for node, place in places.items()}
    return ranks


def stream_order(writes: Tensor) -> Tensor:
    """Return an order (width,) of a stream's channels in which its writes lie in few runs.

    writes: (writers, width) bool, in the order of time. Channels come in the order of their first writer;
    those of one first writer are a path through their patterns of later writes, as short as possible:
    the Hamming distance of neighbours counts the runs that begin or end between them. Exact where no
    class has more than EXACT different channels, else nearest neighbours improved by reversals (2-opt).
    """
    writers, width = writes.shape
    first = torch.where(writes.any(0), writes.int().argmax(0), writers)
    classes, members = [], []
    for writer in range(writers):
        ids = (first == writer).nonzero().flatten()
        if len(ids):
            patterns, place = torch.unique(writes[:, ids].t(), dim=0, return_inverse=True)
            classes.append(patterns.float())
            members.append([ids[place == i] for i in range(len(patterns))])
    paths = _exact(classes) if max(map(len, classes), default=0) <= EXACT else _heuristic(classes)
    ordered = [members[i][j] for i, path in enumerate(paths) for j in path]
    return torch.cat([*ordered, (first == writers).nonzero().flatten()])


def runs(writes: Tensor, order: Tensor) -> int:
    """Return into how many runs of neighbouring channels all writes (writers, width) fall in an order."""
    inside = torch.nn.functional.pad(writes[:, order].int(), (1, 1))
    return int((inside.diff(dim=1) == 1).sum())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, p=1)


def _exact(classes: list[Tensor]) -> list[list[int]]:
    """Return the best path through each class, over all of them together: by permutations, keeping the best per end."""
    best: dict[int, tuple[float, list[list[int]]]] = {}
    for i, patterns in enumerate(classes):
        steps = _distances(patterns, patterns).tolist()
        entry = (_distances(classes[i - 1], patterns) if i else patterns.sum(1, keepdim=True).t()).tolist()
        arrivals = [
            min(((cost + entry[end][j], paths) for end, (cost, paths) in best.items()), key=lambda way: way[0])
            if i
            else (entry[0][j], [])
            for j in range(len(patterns))
        ]
        best = {}
        for path in itertools.permutations(range(len(patterns))):
            cost = arrivals[path[0]][0] + sum(steps[a][b] for a, b in itertools.pairwise(path))
            if path[-1] not in best or cost < best[path[-1]][0]:
                best[path[-1]] = cost, [*arrivals[path[0]][1], list(path)]
    closing = classes[-1].sum(1).tolist() if classes else []
    return min(((cost + closing[end], paths) for end, (cost, paths) in best.items()), default=(0.0, []))[1]


def _heuristic(classes: list[Tensor]) -> list[list[int]]:
    """Return a good path through each class, one after the other, each from where the last one ended."""
    paths: list[list[int]] = []
    here: Tensor | None = None
    for i, patterns in enumerate(classes):
        steps = _distances(patterns, patterns)
        entry = patterns.sum(1) if here is None else _distances(here.unsqueeze(0), patterns)[0]
        leave = _distances(patterns, classes[i + 1]).amin(1) if i + 1 < len(classes) else patterns.sum(1)
        path = _improved(_nearest(steps, entry), steps, entry, leave)
        here = patterns[path[-1]]
        paths.append(path)
    return paths


def _nearest(steps: Tensor, entry: Tensor) -> list[int]:
    free, path = entry.clone(), list[int]()
    taken = torch.zeros_like(entry)
    for _ in range(len(entry)):
        path.append(int((free + taken).argmin()))
        taken[path[-1]] = torch.inf
        free = steps[path[-1]]
    return path


def _improved(path: list[int], steps: Tensor, entry: Tensor, leave: Tensor) -> list[int]:
    """Reverse the piece of a path that shortens it most, until none does or the effort is spent."""
    n, order = len(path), torch.tensor(path)
    for _ in range(min(n, EFFORT // max(1, n * n))):
        before = torch.cat([entry[order[:1]], steps[order[:-1], order[1:]]])  # the edge into every place
        after = torch.cat([before[1:], leave[order[-1:]]])  # the edge out of it
        into = torch.cat([entry[order].unsqueeze(0), steps[order[:-1]][:, order]])  # [i, j]: j comes to place i
        out_of = torch.cat([steps[order][:, order[1:]], leave[order].unsqueeze(1)], 1)  # [i, j]: i comes to place j
        change = (into + out_of - before.unsqueeze(1) - after.unsqueeze(0)).triu(1)
        least = int(change.argmin())
        i, j = least // n, least % n
        if change[i, j] >= -1e-6:
            break
        order[i : j + 1] = order[i : j + 1].flip(0)
    return order.tolist()
