"""Blocks and heads that a random network is grown of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.network.random_networks.grower import Grower


# each block reads a map and returns a map, or None if it does not fit there


def plain(g: Grower, x: str) -> str:
    stride = 2 if min(g.shape(x)[2:]) > 5 and g.chance(0.3) else 1
    if g.chance(0.1):  # an even kernel: the map grows smaller
        x = g.conv(x, g.width(), k=2)
    return g.block(x, stride=stride)


def residual(g: Grower, x: str) -> str:
    stride = 2 if min(g.shape(x)[2:]) > 5 and g.chance(0.2) else 1
    out = g.shape(x)[1] if g.chance(0.6) and x != "x0" else g.width()
    y = x if g.chance(0.7) else g.act(g.norm(x), private=False)
    y = g.block(y, stride=stride)
    y = g.norm(g.conv(y, out))
    y = squeeze_excite(g, y) if g.chance(0.15) else y
    y = g.do("per_channel", y, how="scale", form=g.random.choice(["thin", "full"])) if g.chance(0.1) else y
    skip = g.projected(x, y)
    both = (y, skip) if g.chance(0.8) else (skip, y)
    in_place = g.chance(0.3) and both[0] == y
    z = g.do("add_" if in_place else "sub" if g.chance(0.05) else "add", *both)
    return g.act(z) if g.chance(0.6) else z


def inverted(g: Grower, x: str) -> str:
    """Expand, depthwise, project, as MobileNetV2 and V3 do."""
    y = g.normalised(g.conv(x, 2 * g.shape(x)[1] if g.shape(x)[1] < 7 else g.shape(x)[1] + 2, k=1))
    y = g.do("depthwise", y, times=g.random.choice([1, 1, 2]), k=g.random.choice([3, 5]), bias=g.chance(0.5))
    y = g.normalised(y)
    y = squeeze_excite(g, y) if g.chance(0.4) else y
    y = g.norm(g.conv(y, g.shape(x)[1], k=1))
    return g.do("add", x, y) if g.chance(0.7) else y


def separable(g: Grower, x: str) -> str:
    return g.block(g.do("depthwise", x, times=g.random.choice([1, 2]), bias=g.chance(0.5)))


def grouped(g: Grower, x: str) -> str:
    """The bottleneck of ResNeXt."""
    groups = g.random.choice([2, 3, 4])
    y = g.normalised(g.conv(x, groups * g.random.randint(1, 3), k=1))
    y = g.normalised(g.do("conv", y, out=groups * g.random.randint(1, 3), groups=groups, bias=g.chance(0.5)))
    y = g.norm(g.conv(y, g.shape(x)[1], k=1))
    return g.act(g.do("add", y, x)) if g.chance(0.7) else y


FLAT = ["features", "view", "largest with its place"]


def squeeze_excite(g: Grower, x: str) -> str:
    width, hidden = g.shape(x)[1], max(2, g.shape(x)[1] // 2)
    gate = {"how": g.random.choice(["sigmoid", "hardsigmoid", "tanh"])}
    if g.chance(0.5):
        how = g.random.choice(["AdaptiveAvgPool", "mean", "sum", "largest", "AdaptiveMaxPool"])
        y = g.do("conv", g.do("squeeze", x, how=how), out=hidden, k=1)
        y = g.do("act", g.do("conv", g.do("act", y, how=g.random.choice(["relu", "silu"])), out=width, k=1), **gate)
    else:
        y = g.do("linear", g.do("squeeze", x, how=g.random.choice(FLAT)), out=hidden)
        y = g.do("act", g.do("linear", g.do("act", y, how="relu"), out=width, bias=g.chance(0.7)), **gate)
        y = g.do("to_map", y, rank=g.rank, how=g.random.choice(["view", "index"]))
    return g.do("mul", x, y) if g.chance(0.7) else g.do("mul", y, x)


def add_broadcast(g: Grower, x: str) -> str:
    y = g.do("squeeze", x, how=g.random.choice(["AdaptiveAvgPool", "mean"]))
    return g.do("add", g.conv(x, g.shape(x)[1]), g.do("conv", y, out=g.shape(x)[1], k=1))


def dense_block(g: Grower, x: str) -> str:
    parts = [x]
    for _ in range(g.random.randint(1, 3)):
        y = g.do("cat", *parts) if len(parts) > 1 else x
        y = g.act(g.norm(y), private=False) if g.chance(0.6) else y
        parts.append(g.conv(y, g.random.randint(2, 4)) if g.chance(0.5) else g.block(y, g.random.randint(2, 4)))
    return g.do("cat", *(parts if g.chance(0.5) else parts[::-1]))


def inception(g: Grower, x: str) -> str:
    parts = [g.block(x, g.random.randint(2, 5)), g.block(g.block(x), g.random.randint(2, 5))]
    if g.chance(0.6):
        pooled = g.do("pool", x, how=g.random.choice(["MaxPool", "AvgPool"]), k=3, stride=1, ceil=False)
        parts.append(g.block(pooled, g.random.randint(2, 4)) if g.chance(0.8) else pooled)
    return g.do("cat", *parts)


def halves(g: Grower, x: str) -> str | None:
    """Chunk, process one half, join, shuffle: ShuffleNetV2."""
    width = g.shape(x)[1]
    if width < 4 or width % 2:
        return None
    y = g.do("split", x, sizes=[width // 2] * 2, how=g.random.choice(["chunk", "split", "slices"]))
    a, b = (f"{y}.0", f"{y}.1") if g.chance(0.5) else (f"{y}.1", f"{y}.0")
    b = g.block(g.norm(g.do("depthwise", g.block(b))), g.shape(a)[1]) if g.chance(0.5) else g.block(b)
    z = g.do("cat", a, b)
    return channel_shuffle(g, z) if g.chance(0.7) else z


def uneven(g: Grower, x: str) -> str | None:
    """Split into unequal parts; process some, drop or keep others."""
    width = g.shape(x)[1]
    if width < 5:
        return None
    first = g.random.randint(1, width - 3)
    second = g.random.randint(1, width - first - 1)
    y = g.do("split", x, sizes=[first, second, 0], how=g.random.choice(["split", "slices"]))
    parts = [g.block(f"{y}.{i}", g.random.randint(2, 4)) if g.chance(0.5) else f"{y}.{i}" for i in range(3)]
    g.random.shuffle(parts)
    return g.do("cat", *parts[: g.random.choice([2, 3])])


def take(g: Grower, x: str) -> str | None:
    if g.shape(x)[1] < 3:
        return None
    how = g.random.choice(["first", "last", "every second", "narrow", "select"])
    y = g.do("take", x, how=how, number=g.random.randint(1, g.shape(x)[1] - 2))
    return g.block(y) if g.chance(0.6) else g.join(y, g.block(x))


def channel_shuffle(g: Grower, x: str) -> str:
    ways = ["view", "reshape", "parts", "function"]
    return g.do("channel_shuffle", x, groups=g.random.choice([2, 3, 4]), how=g.random.choice(ways))


def shuffled(g: Grower, x: str) -> str:
    return g.block(channel_shuffle(g, g.block(x, g.random.choice([4, 6, 8, 9]))))


def pixels(g: Grower, x: str) -> str | None:
    if g.rank != 4:
        return None
    how = "view" if g.chance(0.25) else "function"
    y = g.do("pixel_shuffle", g.normalised(g.conv(x, 4 * g.random.randint(1, 3))), how=how)
    y = g.act(y) if g.chance(0.4) else y
    y = g.do("pixel_unshuffle", y, how="function") if max(g.shape(y)[2:]) > 12 or g.chance(0.2) else y
    return g.normalised(g.conv(y, g.width(), stride=2 if g.chance(0.5) else 1))


def unshuffled(g: Grower, x: str) -> str | None:
    if g.rank != 4 or g.shape(x)[1] > 5:
        return None
    height, width = g.shape(x)[2:]
    even = g.do("pad", x, amounts=[0, width % 2, 0, height % 2], mode="constant") if height % 2 or width % 2 else x
    return g.block(g.do("pixel_unshuffle", even, how=g.random.choice(["function", "slices"])))


def gate(g: Grower, x: str) -> str:
    """a * sigmoid(b) of the two halves of one convolution, or of two convolutions."""
    out = g.width()
    if g.chance(0.6):
        y = g.do("split", g.norm(g.conv(x, 2 * out)), sizes=[out, out], how=g.random.choice(["chunk", "slices"]))
        a, b = f"{y}.0", f"{y}.1"
    else:
        a, b = g.norm(g.conv(x, out)), g.norm(g.conv(x, out))
    return g.do("mul", a, g.do("act", b, how=g.random.choice(["sigmoid", "tanh", "silu", "relu"])))


def spatial_gate(g: Grower, x: str) -> str:
    y = g.do("act", g.do("conv", x, out=1, k=3), how="sigmoid")
    return g.do("mul", g.conv(x, g.width()), y)


def per_channel(g: Grower, x: str) -> str:
    y = g.conv(x, g.width()) if g.chance(0.7) else x
    for _ in range(g.random.randint(1, 2)):
        form = g.random.choice(["thin", "full", "viewed"])
        y = g.do("per_channel", y, how=g.random.choice(["scale", "shift"]), form=form)
    return g.act(y) if g.chance(0.5) and y != x else y


def pool(g: Grower, x: str) -> str:
    if g.chance(0.3):
        how = g.random.choice(["AdaptiveAvgPool", "AdaptiveMaxPool"])
        return g.do("adaptive", x, how=how, size=g.random.randint(4, 6))
    stride = 2 if min(g.shape(x)[2:]) > 7 else 1
    return g.do("pool", x, how=g.random.choice(["MaxPool", "AvgPool"]), k=3, stride=stride, ceil=g.chance(0.3))


def pad(g: Grower, x: str) -> str:
    mode = g.random.choice(["constant", "constant", "reflect", "replicate", "circular"])
    if mode == "reflect" and g.rank == 5:
        mode = "constant"
    amounts = [g.random.randint(0, 2) for _ in range(2 * (g.rank - 2))]
    y = g.do("pad", x, amounts=amounts, mode=mode, value=g.random.choice([0.0, 0.0, 0.5, -1.0]))
    return g.normalised(g.do("conv", y, out=g.width(), k=3)) if g.chance(0.7) else y


def upsample(g: Grower, x: str) -> str:
    if max(g.shape(x)[2:]) > 6:
        x = g.do("pool", x, how="MaxPool", k=2, stride=2, ceil=True)
    if g.chance(0.5):
        k, stride = g.random.choice([(2, 2), (3, 2), (3, 1), (4, 2)])
        groups = g.random.choice([1, 1, 1, 2])
        return g.normalised(g.do("transposed", x, out=g.width(), k=k, stride=stride, groups=groups, bias=g.chance(0.6)))
    return g.block(g.do("upsample", x, how=g.random.choice(["nearest", "linear", "corners"])))


def unet(g: Grower, x: str) -> str:
    """Down, up again, joined with what was there."""
    y = g.block(g.do("pool", g.block(x), how="MaxPool", k=2, stride=2, ceil=False))
    y = g.normalised(g.do("transposed", y, out=g.width())) if g.chance(0.5) else g.do("upsample", y, how="nearest")
    y = g.resize(y, x)
    return g.block(g.do("cat", x, y)) if g.chance(0.8) else g.do("cat", y, x)


def island(g: Grower, x: str) -> str:
    """The channels-last block of ConvNeXt."""
    y = g.do("depthwise", x, k=g.random.choice([3, 5])) if g.chance(0.8) else g.conv(x, g.shape(x)[1])
    y = g.do("layer_norm", g.do("to_last", y), affine=g.chance(0.9)) if g.chance(0.8) else g.do("to_last", y)
    y = g.do("act", g.do("linear", y, out=g.random.randint(4, 12)), how=g.random.choice(["gelu", "relu", "sigmoid"]))
    y = g.do("linear", y, out=g.shape(x)[1])
    y = g.do("per_channel", y, how="scale", form="last") if g.chance(0.7) else y
    return g.do("add", x, g.do("to_first", y)) if g.chance(0.8) else g.do("to_first", y)


def twice(g: Grower, x: str) -> str:
    """The same layers called again: in a row, on two tensors, at two sizes."""
    first = len(g.case.steps)
    y = g.normalised(g.conv(x, g.shape(x)[1]))
    layers = g.case.steps[first:]

    def again(z: str) -> str:
        names = {x: z}
        for step in layers:
            sources = [names[source] for source in step.sources]
            owns = any(True for _ in g.network.get_submodule(step.name).parameters())
            options = {"of": step.name} if owns else step.options
            names[step.name] = g.do("again" if owns else step.kind, *sources, **options)
        return names[y]

    sized = any(step.kind == "map_norm" for step in layers) or g.shape(y) != g.shape(x)
    how = g.random.choice(["row", "tensors", "sizes"])
    if how == "row" and g.shape(y) == g.shape(x):
        return again(y)
    if how == "sizes" and not sized and min(g.shape(x)[2:]) > 5:
        return g.join(y, again(g.do("pool", x, how="AvgPool", k=2, stride=2, ceil=False)))
    return g.do(g.random.choice(["add", "cat"]), y, again(g.conv(x, g.shape(x)[1])))


def unused(g: Grower, x: str) -> str:
    g.block(g.block(x))
    return g.block(g.do("unused", x))


def move(g: Grower, x: str) -> str:
    ways = ["flip channels", "flip", "roll channels", "roll", "there and back", "swap", "expand"]
    ways += ["repeat"] if g.shape(x)[1] < 7 else []
    y = g.do("move", x, how=g.random.choice(ways))
    return g.normalised(y) if g.chance(0.5) else g.block(y)


def two_ways(g: Grower, x: str) -> str:
    """Two branches of one shape, added plainly or over a new axis, or joined along space; then a third one added."""
    out = g.width()
    a, b = g.norm(g.conv(x, out)), g.block(x, out)
    how = g.random.choice(["add", "add", "sub", "stack_sum", "cat_space"])
    z = g.do(how, a, g.resize(b, a))
    if how == "cat_space":
        return g.block(z)
    return g.do("add", z, g.projected(g.random.choice(g.maps[1:]), z))


def from_features(g: Grower, x: str) -> str:
    """A decoder: features become a map."""
    size = [2] * (g.rank - 2)
    y = g.do("linear", g.do("squeeze", x, how="features"), out=3 * math.prod(size))
    return g.join(g.block(x), g.conv(g.do("unflatten", y, shape=[3, *size]), g.random.randint(2, 4), k=1))


def larger(g: Grower, x: str) -> str:
    """The larger of two convolutions, or one half of one by the other."""
    out = g.width()
    if g.chance(0.5):
        return g.do("glu", g.norm(g.conv(x, 2 * out)))
    return g.do("maximum", a := g.block(x, out), g.resize(g.block(x, out), a))


def without_rule(g: Grower, x: str) -> str:
    how = g.random.choice(["softmax", "channel_mean", "cumsum"])
    if how == "channel_mean":
        return g.do("add", x, g.do(how, x))
    return g.block(g.do(how, x))


BLOCKS: dict[Callable[[Grower, str], str | None], float] = {
    plain: 8, residual: 12, inverted: 5, separable: 4, grouped: 6, squeeze_excite: 5, add_broadcast: 2, dense_block: 6,
    inception: 5, halves: 5, uneven: 4, take: 3, shuffled: 4, pixels: 4, unshuffled: 2, gate: 4, spatial_gate: 2,
    per_channel: 3, pool: 3, pad: 3, upsample: 4, unet: 4, island: 5, twice: 4, unused: 2, move: 3, two_ways: 4,
    from_features: 2, larger: 3, without_rule: 4,
}  # fmt: skip


def pooled_head(g: Grower, x: str) -> str:
    y = g.do("squeeze", x, how=g.random.choice([*FLAT, "AdaptiveAvgPool"]))
    y = g.do("flatten", y, how=g.random.choice(["module", "reshape"])) if len(g.shape(y)) > 2 else y
    return classifier(g, y)


def classifier(g: Grower, y: str) -> str:
    if g.chance(0.4):
        y = g.do("linear", y, out=g.width())
        y = g.do("batch_norm", y) if g.chance(0.4) else y
        y = g.do("act", y, how=g.random.choice(["relu", "sigmoid", "hardswish"]))
        y = g.do("dropout", y) if g.chance(0.3) else y
    return g.do("linear", y, out=g.random.randint(2, 5))


def flat_head(g: Grower, x: str) -> str:
    y = g.do("adaptive", x, how="AdaptiveAvgPool", size=2) if g.rank == 5 or g.chance(0.5) else x
    y = g.normalised(y) if y != x and g.chance(0.3) else y
    return classifier(g, g.do("flatten", y, how=g.random.choice(["module", "reshape"])))


def conv_head(g: Grower, x: str) -> str:
    y = g.block(x) if g.chance(0.5) else x
    y = g.do("conv", y, out=g.random.randint(2, 5), k=1)
    return g.do("act", y, how="sigmoid") if g.chance(0.3) else y


HEADS = [pooled_head, pooled_head, flat_head, conv_head]
