"""What is kept of an interrupted epoch: the wish to stop, until a step is whole, and the generators' states."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch

#: Ctrl-C, what schedulers send, a terminal that closes
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stop:
    """Whether a signal has asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def ask(self, number: int, _: FrameType | None) -> None:
        """Note the signal; Ctrl-C for a second time does not wait."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextlib.contextmanager
def stop_between_steps() -> Iterator[Stop]:
    """Hold back signals that would stop the process; at the end of the block the one that came does what it does.

    A signal that is ignored (nohup) stays so, and in a thread nothing is held back: signals reach the main one only.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    held = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in held:
        signal.signal(number, stop.ask)
    try:
        yield stop
    finally:
        for number in held:
            signal.signal(number, before[number])
    if stop.signal is not None:
        signal.raise_signal(stop.signal)


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the states of all global generators, as tensors, numbers and tuples."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """Set all global generators to what `generator_states` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
