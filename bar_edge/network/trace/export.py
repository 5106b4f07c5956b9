"""torch.export, quietly: eval mode, a free batch, nothing compiled, and the user's module left as it was."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bar_edge.errors import InputError
from bar_edge.network.trace.refusals import check_answer, check_program, not_exported
from bar_edge.network.trace.regions import flatten


def plain(module: nn.Module) -> nn.Module:
    """Return the module inside torch.compile, DataParallel and DistributedDataParallel; refuse what is no such code.

    Raises InputError for TorchScript and for a network prepared for quantisation.
    """
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            break
        module = inner
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise InputError(
                "a module of Python code",
                got=f"TorchScript{f' in {name!r}' if name else ''}",
                consequence="its graph cannot be read",
                remedy="build it with its class and load the weights: model.load_state_dict(scripted.state_dict())",
            )
        if type(part).__module__.startswith("torch.ao."):
            raise InputError(
                "a network in floating point",
                got=f"one prepared for quantisation: {type(part).__name__} '{name}'",
                consequence="its rounding would be trained and counted as part of the network",
                remedy="prune the network before prepare_qat; `bar-edge export --precision int8` rounds afterwards",
            )
    return module


def export(module: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Return the module's program in eval mode for any batch, without regions, assertions and types.

    Raises InputError if torch.export does not accept it, or what it makes is no network.
    """
    device = next((p.device for p in module.parameters()), inputs[0].device)
    pair = tuple(x[:1].to(device).expand(2, *x.shape[1:]).clone() for x in inputs)
    with _quietly(module):
        try:
            program = torch.export.export(module, pair, dynamic_shapes=_free_batch(module, len(pair)), strict=False)
        except Exception as error:  # torch.export raises many kinds; all mean that this module cannot be traced
            check_answer(module, pair)
            raise not_exported(error) from error
    flatten(program)
    check_program(program)
    return program


def _free_batch(module: nn.Module, inputs: int) -> tuple[Any, ...]:
    free: tuple[Any, ...] = tuple({0: torch.export.Dim.AUTO} for _ in range(inputs))
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    named = [*kinds, inspect.Parameter.VAR_POSITIONAL].index(inspect.Parameter.VAR_POSITIONAL)
    return (*free[:named], free[named:]) if named < min(len(kinds), len(free)) else free


@contextlib.contextmanager
def _quietly(module: nn.Module) -> Iterator[None]:
    """Put the module into eval mode, without torch.compile and without torch's messages."""
    modes = {m: m.training for m in module.modules()}
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._dynamo", "torch.fx")]
    levels = [logger.level for logger in loggers]
    module.eval()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), _eagerly(module):
            warnings.simplefilter("ignore")
            yield
    finally:
        for m, training in modes.items():
            m.training = training
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _eagerly(module: nn.Module) -> Iterator[None]:
    """Run compiled parts as they were written: `torch.compile(part)` and `part.compile()`."""
    compiled = {m: m._compiled_call_impl for m in module.modules() if m._compiled_call_impl is not None}
    try:
        for part in compiled:
            part._compiled_call_impl = None
        with torch.compiler.set_stance("force_eager") if _is_compiled(module) else contextlib.nullcontext():
            yield
    finally:
        for part, call in compiled.items():
            part._compiled_call_impl = call


def _is_compiled(module: nn.Module) -> bool:
    return any(hasattr(part, "_orig_mod") for part in module.modules())
