"""Kernels under Triton's interpreter against the definition, on random shapes and index sets; a process of its own.

TRITON_INTERPRET=1 python tests/kernels/interpreted.py 500      prints the largest relative difference of each kind
"""

import json
import random
import sys
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from bar_edge_kernels import mixed_convolution
from bar_edge_kernels.convolution import DEFAULTS, candidate_blocks, launch
from bar_edge_kernels.operator import How, MixedConvolution
from bar_edge_kernels.stage import Stage, Step


def exact_dot(dot: Any) -> Any:
    """Return the interpreter's product with operands in float32: of bf16 it multiplies the bits as integers (3.9)."""

    def of_floats(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(
            builder,
            *(builder.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)),
            *rest,
        )

    return of_floats


interpreter.InterpreterBuilder.create_dot = exact_dot(interpreter.InterpreterBuilder.create_dot)

TYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)


def index(rng: random.Random, width: int) -> list[int]:
    """One channel, all, none, a run, or scattered ones in any order."""
    kind, n = rng.choice(("one", "all", "none", "run", "scattered", "scattered")), rng.randint(1, width)
    if kind == "run":
        first = rng.randint(0, width - n)
        return list(range(first, first + n))
    return {"one": [rng.randrange(width)], "all": list(range(width)), "none": []}.get(kind, rng.sample(range(width), n))


def nhwc(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def differs(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1))


def convolution(rng: random.Random) -> tuple[str, float]:
    dtype, kernel, stride = rng.choice(TYPES), rng.choice((1, 3)), rng.choice((1, 2))
    batch, height, width = rng.choice((1, 2, 7)), rng.randint(1, 9), rng.randint(1, 9)
    if batch == 7:
        height, width = min(height, 4), min(width, 4)
    read, written = index(rng, wide_in := rng.randint(1, 20)), index(rng, wide_out := rng.randint(1, 40))
    weight = torch.randn(len(written), len(read), kernel, kernel).div(1 + len(read) ** 0.5 * kernel).to(dtype)
    bias = torch.randn(len(written)) if rng.random() < 0.5 else None
    affine = torch.randn(2, len(read)) if rng.random() < 0.5 else None
    flags = {name: rng.random() < 0.5 for name in ("relu_in", "relu_out", "accumulate")}
    how = How(bias=bias, affine=affine, stride=stride, padding=kernel // 2, **flags)
    module = MixedConvolution(weight, torch.tensor(read).long(), torch.tensor(written).long(), how)
    x = nhwc(batch, wide_in, height, width, dtype=dtype)
    small = (-(-height // stride), -(-width // stride))
    out = nhwc(batch, wide_out, *small, dtype=dtype)
    wanted = mixed_convolution(
        out.double(),
        x.double(),
        weight.double(),
        None if bias is None else bias.double(),
        torch.tensor(read).long(),
        torch.tensor(written).long(),
        stride=stride,
        padding=kernel // 2,
        affine=affine,
        **flags,
    )
    untouched = [c for c in range(wide_out) if c not in written]
    before = out.clone()
    if rng.random() < 0.3:
        blocks = rng.choice([*DEFAULTS, *candidate_blocks(len(read), len(written))])
        launch(out, x, module.weight, module.index_in, module.index_out, module.how, blocks)
    else:
        with torch.inference_mode():
            module(out, x)
    assert torch.equal(out[:, untouched], before[:, untouched]), "a channel that is not written has changed"
    return str(dtype), differs(out, wanted)


def stage(rng: random.Random) -> tuple[str, float]:
    batch, height, width, channels = rng.choice((1, 3)), rng.randint(1, 6), rng.randint(1, 6), rng.randint(1, 12)
    stream = nhwc(batch, channels, height, width, dtype=torch.float32)
    wanted, steps = stream.double(), list[Step]()
    for _ in range(rng.randint(1, 3)):
        kernel, n = rng.choice((1, 3)), rng.randint(1, 6)
        read, written = index(rng, channels) or [0], index(rng, channels) or [0]
        inner = list(range(n))
        affine, bias = torch.randn(2, len(read)), torch.randn(n)
        first = torch.randn(n, len(read), kernel, kernel) / (1 + len(read) ** 0.5 * kernel)
        second = torch.randn(len(written), n, 3, 3) / (1 + n**0.5 * 3)
        how = How(bias=bias, affine=affine, padding=kernel // 2, relu_in=True, relu_out=True, accumulate=False)
        ends = rng.random() < 0.5
        ids_read, ids_inner, ids_written = map(torch.tensor, (read, inner, written))
        steps += [
            Step(convolution=MixedConvolution(first, ids_read, ids_inner, how), source=0, target=1),
            Step(
                convolution=MixedConvolution(second, ids_inner, ids_written, How(padding=1, relu_out=ends)),
                source=1,
                target=0,
            ),
        ]
        between = mixed_convolution(
            torch.zeros(batch, n, height, width).double(),
            wanted,
            first.double(),
            bias.double(),
            ids_read,
            ids_inner,
            padding=kernel // 2,
            affine=affine,
            relu_in=True,
            relu_out=True,
            accumulate=False,
        )
        wanted = mixed_convolution(
            wanted, between, second.double(), None, ids_inner, ids_written, padding=1, relu_out=ends
        )
    Stage(steps)(stream)
    return "stage", differs(stream, wanted)


def main() -> None:
    largest: dict[str, float] = {}
    number, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for case in range(number):
        rng = random.Random(f"{seed}/{case}")
        torch.manual_seed(1000 * seed + case)
        kind, difference = stage(rng) if case % 10 == 9 else convolution(rng)
        largest[kind] = max(largest.get(kind, 0.0), difference)
    print(json.dumps(largest))


if __name__ == "__main__":
    main()
