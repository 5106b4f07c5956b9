"""Grows random networks, block by block."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tests.network.random_networks.blocks import BLOCKS, HEADS
from tests.network.random_networks.case import Case, Option, Shape, Step
from tests.network.random_networks.steps import ACTIVATIONS, FROM_ZERO, KINDS, RandomNetwork, _part


class Grower:
    """Grows a network block by block; `maps` are the tensors that later blocks may read."""

    def __init__(self, seed: int, blocks: int) -> None:
        self.random = random.Random(seed)
        r = self.random
        self.rank = r.choices([4, 3, 5], [85, 10, 5])[0]
        largest = {3: 13, 4: 11, 5: 5}[self.rank]
        space = tuple(r.randint(5, largest) for _ in range(self.rank - 2))
        shapes = [(r.choice([1, 2, 3, 3, 4]), *space)]
        if r.random() < 0.15:
            shapes.append((r.randint(1, 4), *(space if r.random() < 0.5 else [r.randint(5, largest) for _ in space])))
        self.case = Case(tuple(shapes), (), ("x0",), seed, 0.0)
        self.network = RandomNetwork(self.case)
        self.maps = ["x0"]
        self.keep(self.normalised(self.conv("x0", r.randint(4, 8))))
        if len(shapes) > 1:
            other = self.normalised(self.conv(self.resize("x1", self.maps[0]), r.randint(4, 8)))
            self.keep(self.join(self.maps[-1], other))
        while blocks > 0:
            block = r.choices(list(BLOCKS), list(BLOCKS.values()))[0]
            x = self.maps[-1] if r.random() < 0.75 else r.choice(self.maps)
            made = block(self, x)
            if made is not None:
                self.keep(made)
                blocks -= 1
        self.finish()

    def do(self, kind: str, *sources: str, **options: Option) -> str:
        """Add a step and return its name."""
        step = Step(f"s{len(self.case.steps)}_{kind}", kind, sources, options)
        self.case = dataclasses.replace(self.case, steps=(*self.case.steps, step), outputs=(self.maps[-1],))
        tensors: dict[str, Any] = pytree.tree_map(torch.zeros, self.network.shapes, is_leaf=_is_shape)
        given = [_part(tensors, source) for source in sources]
        of = step.name if kind != "again" else str(options["of"])
        if kind != "again":
            self.network.add_module(of, KINDS[kind](*(tuple(t.shape) for t in given), **options).eval())
        with torch.no_grad():
            made = self.network.get_submodule(of).float()(*given)
        self.network.shapes[step.name] = pytree.tree_map(lambda t: tuple(t.shape), made)
        return step.name

    def shape(self, name: str) -> Shape:
        return _part(self.network.shapes, name)

    def keep(self, name: str) -> None:
        """Let later blocks read a map; a large one is made smaller first."""
        if self.shape(name)[1] > 14:
            name = self.conv(name, self.random.randint(4, 10), k=1)
        if max(self.shape(name)[2:]) > 13:
            name = self.do("pool", name, how="MaxPool", k=2, stride=2, ceil=False)
        if min(self.shape(name)[2:]) < 4:
            name = self.do("upsample", name, how="nearest")
        self.maps.append(name)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def width(self) -> int:
        return self.random.randint(3, 10)

    # ---------------------------------------------------------------------------------- small parts

    def conv(self, x: str, out: int, k: int | None = None, stride: int = 1) -> str:
        options: dict[str, Option] = {"out": out, "k": k or self.random.choice([1, 3, 3, 3]), "stride": stride}
        if self.chance(0.4):
            options["bias"] = False
        if self.chance(0.1):
            options["groups"] = self.random.choice([2, 3, 4])
        if self.chance(0.08) and stride == 1:
            options["dilation"] = 2
        if self.chance(0.05):
            options["mode"] = self.random.choice(["reflect", "replicate", "circular"])
        if k is None and "dilation" not in options and self.chance(0.04):
            options["k"] = 5
        if options.get("mode") == "reflect" and self.rank == 5:
            del options["mode"]
        return self.do("conv", x, **options)

    def norm(self, x: str) -> str:
        kind = self.random.choices(["batch_norm", "none", "group_norm", "instance_norm", "layer_norm", "map_norm"],
                                   [65, 20, 6, 4, 3, 1])[0]  # fmt: skip
        affine = self.chance(0.8)
        if kind == "none":
            return x
        if kind == "group_norm":
            return self.do(kind, x, groups=self.random.choice([1, 2, 3, 4]), affine=affine)
        if kind == "instance_norm":
            return self.do(kind, x, affine=affine, running=self.chance(0.3))
        if kind == "layer_norm":
            return self.do("to_first", self.do(kind, self.do("to_last", x), affine=affine))
        return self.do(kind, x) if kind == "map_norm" else self.do(kind, x, affine=affine)

    def act(self, x: str, private: bool = True) -> str:
        """An activation; in place only on a tensor that nobody else reads."""
        if self.chance(0.06):
            return self.do("prelu", x, each=self.chance(0.7))
        names = ["relu"] * 8 + [*ACTIVATIONS] if not self.chance(0.25) else FROM_ZERO
        name = self.random.choice([n for n in names if private or "place" not in n])
        return self.do("act", x, how=name)

    def normalised(self, x: str) -> str:
        """Norm and activation in one of the usual orders, each sometimes missing."""
        x = self.norm(x)
        x = self.act(x, private=not x.endswith(("to_first", "move"))) if self.chance(0.85) else x
        return self.do("dropout", x, whole=self.chance(0.5)) if self.chance(0.05) else x

    def block(self, x: str, out: int | None = None, stride: int = 1) -> str:
        return self.normalised(self.conv(x, out or self.width(), stride=stride))

    def resize(self, x: str, like: str) -> str:
        if self.shape(x)[2:] == self.shape(like)[2:]:
            return x
        return self.do("resize", x, like, how=self.random.choice(["nearest", "linear", "pool", "pad"]))

    def projected(self, x: str, like: str) -> str:
        """x with the shape of another map."""
        x = self.resize(x, like)
        out = self.shape(like)[1]
        return x if self.shape(x)[1] == out else self.norm(self.conv(x, out, k=1))

    def join(self, *parts: str) -> str:
        return self.do("cat", *(self.resize(part, parts[0]) for part in parts))

    def finish(self) -> None:
        """Add one to three heads and choose the outputs."""
        outputs = [self.random.choice(HEADS)(self, self.maps[-1])]
        while self.chance(0.2) and len(outputs) < 3:
            outputs.append(self.random.choice(HEADS)(self, self.random.choice(self.maps[1:])))
        if self.chance(0.04):
            outputs.append(self.random.choice(self.maps[1:]))
        self.case = dataclasses.replace(self.case, outputs=tuple(dict.fromkeys(outputs)))


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, int) for v in value)


def random_case(seed: int, removed: float, blocks: int | None = None) -> Case:
    """Return a random network with a share of its channels to remove; blocks: how long, at random if None."""
    chosen = random.Random(f"size {seed}")
    case = Grower(seed, blocks or chosen.randint(1, 7)).case
    return dataclasses.replace(case, removed=removed, dead=chosen.choice([0, 0, 0, 0.05, 0.2]))
