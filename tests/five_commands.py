"""A network through the five commands, as a user types them: what the zoo (benchmarks/zoo.py) and its tests share."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bar_edge_cli.main import main

CLASSES, TRAINING, TESTING = 3, 8, 2
#: what the commands are given besides the network
BUDGET, LOWERING = "2x:flops", "slices"
NOTHING_TRAINED = "dense=0,prune=0,tune=0"


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What one command did: its name, exit code, JSON answer and processor seconds, those of its children too."""

    command: str
    code: int
    answer: dict[str, Any]
    seconds: float

    @property
    def words(self) -> str:
        """Return an error's lines, or why the verdict is no, as one line."""
        lines = self.answer.get("error") or {key: self.answer.get(key) for key in ("parity", "checks", "warnings")}
        return "; ".join(f"{part}: {text}" for part, text in lines.items() if text)


def five_commands(
    model: str, data: Path, folder: Path, shape: tuple[int, int, int], model_args: Sequence[str] = ()
) -> Iterator[Answer]:
    """Yield what inspect, prune, slice, export and verify answer, up to the first that fails.

    model, model_args: a SPEC and KEY=VALUE texts; data: a folder of images of `shape`; folder: where RUN is written.
    """
    named = ["--model", model, *(word for argument in model_args for word in ("--model-arg", argument))]
    run, size = folder / "run", "x".join(map(str, shape))
    training = ["--epochs", NOTHING_TRAINED, "--batch", "8", "--device", "cpu", "--set", "train.threads=1"]
    for command in (
        ["inspect", *named, "--input", size],
        ["prune", *named, "--data", str(data), "--method", "random", "--budget", BUDGET, *training, "--out", str(run)],
        ["slice", *named, "--data", str(data), "--plan", str(run / "plan.json"), "--out", str(folder / "sliced")],
        ["export", str(run), "--lowering", LOWERING],
        ["verify", str(run / "artifacts" / "onnx-fp32")],
    ):
        done = answer_of(command)
        yield done
        if done.code != 0:
            return


def answer_of(arguments: Sequence[str]) -> Answer:
    """Run one command in this process, as the console script does, and return what it wrote to stdout."""
    sys.stdout.flush()
    start, own = sum(os.times()[:4]), os.dup(1)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        try:
            code = main([*arguments, "--json", "--debug"])
        finally:
            os.dup2(own, 1)
            os.close(own)
        file.seek(0)
        return Answer(arguments[0], code, json.loads(file.read()), sum(os.times()[:4]) - start)


def write_images(folder: Path, shape: tuple[int, int, int]) -> Path:
    """Write noise as class folders of PNG files, train/CLASS and test/CLASS; returns the folder."""
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", TRAINING), ("test", TESTING)):
        for label in range(CLASSES):
            home = folder / split / f"class{label}"
            home.mkdir(parents=True)
            for index in range(number):
                pixels = torch.randint(0, 256, (*shape[1:], shape[0]), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.squeeze(-1).numpy()).save(home / f"{index}.png")
    return folder


class TorchFlops(TorchDispatchMode):
    """Counts as torch's own FlopCounterMode does, apart by what bar-edge's convention says of an operation.

    convolutions: all kinds; positions: linear layers at many positions, 1x1 convolutions; other: products of one vector
    per image (classifiers, squeeze branches) and of activations with each other (attention), which are not counted.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.found = {"convolutions": 0, "positions": 0, "other": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self.found[self._kind(packet, args)] += int(flops) // self.batch
        return out

    def _kind(self, packet: Any, args: Any) -> str:
        if packet == torch.ops.aten.convolution:
            return "convolutions"
        rows = {torch.ops.aten.mm: 0, torch.ops.aten.addmm: 1}.get(packet)
        return "positions" if rows is not None and args[rows].shape[0] > self.batch else "other"


def torch_flops(module: torch.nn.Module, shape: tuple[int, ...], batch: int = 2) -> dict[str, int]:
    """Return torch's FLOPs of one input (C, H, W), by kind; see `TorchFlops`."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # attention as one operator, of which torch counts nothing
    try:
        with torch.no_grad(), TorchFlops(batch) as counter:
            module.eval()(torch.zeros(batch, *shape, dtype=next(module.parameters()).dtype))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.found
