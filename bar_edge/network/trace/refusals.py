"""What cannot be a network: the refusals, with the user's own line."""

from __future__ import annotations

import os
import traceback
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bar_edge.errors import InputError

aten = torch.ops.aten

_WRAPPER = """hand over the part that has none, for a detector the backbone with its heads:
  class Part(torch.nn.Module):
      def __init__(self, whole): super().__init__(); self.backbone, self.head = whole.backbone, whole.head
      def forward(self, x): return self.head(self.backbone(x))"""


def not_exported(error: Exception) -> InputError:
    """Return what to say where torch.export gives up: the user's line, its reason, what to hand over instead."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return InputError(
        "a module that torch.export accepts for any batch size",
        got=f"{_users_line(error)}{type(error).__name__}: {' | '.join(lines[:2])}",
        consequence="the network cannot be read",
        remedy=f"remove control flow on data (if x.sum() > 0, nms, x.item(), x[mask]) from forward, or {_WRAPPER}",
    )


@torch.no_grad()
def check_answer(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raise InputError if a module that cannot be exported returns objects that torch.export cannot take apart."""
    try:
        answer = module(*inputs)
    except Exception:  # the error of torch.export says it better
        return
    odd = [part for part in pytree.tree_leaves(answer) if not isinstance(part, Tensor | int | float | None)]
    if odd:
        raise InputError(
            "a forward that returns tensors in tuples, lists and dictionaries",
            got=f"a {type(odd[0]).__name__}",
            consequence="torch.export does not know its parts",
            remedy="wrap the module: def forward(self, x): out = self.net(x); return out.logits, out.features",
        )


def _users_line(error: BaseException) -> str:
    """Return the last line outside torch and bar-edge in an error's traceback."""
    packages = [os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(os.path.dirname(__file__)))]
    ours = (*(package + os.sep for package in packages), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line}: " if frames else ""


def source_line(node: fx.Node) -> str:
    """Return where the user's code calls an operator, as `file.py:12: x = x.mean()`, else the module, as `'0.3'`."""
    if "source" in node.meta:
        return str(node.meta["source"])
    lines = (node.meta.get("stack_trace") or "").splitlines()
    places = [i for i, line in enumerate(lines) if line.strip().startswith('File "') and "/torch/nn/" not in line]
    if not places:
        owner = calling_module(node)
        return f"'{owner}'" if owner is not None else ""
    file, number, *_ = lines[places[-1]].strip().removeprefix('File "').replace('", line', ",").split(",")
    code = lines[places[-1] + 1].strip() if places[-1] + 1 < len(lines) else ""
    return f"{os.path.basename(file)}:{number.strip()}: {code}"


def calling_module(node: fx.Node) -> str | None:
    """Return the name of the module in whose forward an operator was called, "" for the network itself."""
    stack = [str(name) for name, _ in node.meta.get("nn_module_stack", {}).values()]
    return stack[-1] if stack else None


def check_program(program: torch.export.ExportedProgram) -> None:
    """Raise InputError for a fixed batch, complex numbers and operators across the images of a batch."""
    nodes = {node.name: node for node in program.graph.nodes}
    for name in program.graph_signature.user_inputs:
        size = nodes[name].meta["val"].shape[0]
        if not is_free(size):
            raise InputError(
                "a network that takes any batch size",
                got=f"a forward that fixes the batch of input '{name}' to {size}",
                consequence="it could not be trained or exported with another batch",
                remedy="replace the literal batch size in view/reshape by x.size(0) or -1",
            )
    for node in program.graph.nodes:
        _check_node(node)
    batch = nodes[program.graph_signature.user_inputs[0]].meta["val"].shape[0]
    for node in program.graph.output_node().all_input_nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and any(is_free(n) for n in value.shape) and str(value.shape[0]) != str(batch):
            raise mixed_batch(f"an output of shape {tuple(value.shape)}, made at {source_line(node)}")


def mixed_batch(got: str) -> InputError:
    """Return the refusal of a network whose answer for an image depends on the others of its batch."""
    return InputError(
        "a network that treats every image of a batch alone",
        got=got,
        consequence="its answer for an image would depend on the others, or be lost among theirs",
        remedy="keep the batch as the first axis (x.flatten(1)) and reduce over the others (x.mean((1, 2, 3)))",
    )


def _check_node(node: fx.Node) -> None:
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.is_complex():
        raise InputError(
            "a network of real numbers",
            got=f"{node.target} makes {value.dtype} at {source_line(node)}",
            consequence="the network cannot be pruned or exported",
            remedy="write the transform with real tensors, or leave it out of the module",
        )
    source = node.args[0] if node.args else None
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    batched = isinstance(before, Tensor) and before.ndim > 1 and is_free(before.shape[0])
    if node.op == "call_function" and batched and _across_batch(node, before.ndim):  # type: ignore[union-attr]
        raise mixed_batch(f"{node.target} over the batch at {source_line(node)}")


def is_free(size: Any) -> bool:
    """Tell whether a size is symbolic: the batch."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return a call's arguments by their schema names, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    values |= {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)}
    return values | dict(node.kwargs)


def _across_batch(node: fx.Node, rank: int) -> bool:
    """Tell whether an operator mixes the entries of the first axis."""
    if node.target in _OVER_ALL:
        return True
    if node.target not in _ALONG_AXES:
        return False
    dims = next((a for name, a in arguments(node).items() if name in ("dim", "dims")), None)
    listed = [dims] if isinstance(dims, int) else list(dims or range(rank))
    return any(int(d) % rank == 0 for d in listed)


_OVER_ALL = {
    aten.mean.default,
    aten.sum.default,
    aten.max.default,
    aten.min.default,
    aten.std.default,
    aten.var.default,
}
_ALONG_AXES = {
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
    aten.max.dim,
    aten.min.dim,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.cumsum.default,
    aten.std.dim,
    aten.var.dim,
    aten.std.correction,
    aten.var.correction,
    aten.sort.default,
    aten.flip.default,
    aten.roll.default,
}
