"""From the user's module to a Network: torch.export, then every operation with parameters becomes a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bar_edge.errors import InputError
from bar_edge.network.batch_independence import mixing_node
from bar_edge.network.network import Network, structure_of
from bar_edge.network.trace.build import GraphBuilder
from bar_edge.network.trace.export import export, plain
from bar_edge.network.trace.refusals import mixed_batch, source_line
from bar_edge.network.trace.simpler import name_pixel_shuffles
from bar_edge.records.tolerance import TRACE_TOLERANCE

__all__ = ["source_line", "trace"]


def trace(module: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> Network:
    """Return the module as a Network with copies of its weights; the module itself is left as it was.

    What forward computes of parameters alone (a weight norm, an exponentiated scale) is computed once and is a
    parameter from here on: the network's `notes` name each. What it computes of constants alone is a buffer.

    example_inputs: one tensor or a tuple, (N, ...) each; only their shapes without N count.
    Raises InputError if torch.export does not accept the module, N cannot be left free, numbers are complex or
    an image's answer depends on the others of its batch.
    """
    module = plain(module)
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    program = export(module, inputs)
    builder = GraphBuilder(module, program)
    body = builder.build()
    shapes = tuple(tuple(x.shape[1:]) for x in inputs)
    spec = program.call_spec.out_spec
    assert spec is not None
    structure = structure_of(pytree.tree_unflatten(range(spec.num_leaves), spec))
    network = Network(body, shapes, structure)
    if name_pixel_shuffles(network):
        network = Network(body, shapes, structure)
    network.notes = tuple(
        f"'{name}' was computed of parameters at {line}: what it came to is its parameter from here on"
        for name, line in builder.baked.items()
    )
    mixing = mixing_node(network.eval())
    if mixing is not None:
        raise mixed_batch(f"{mixing.target} over the batch at {source_line(mixing)}")
    if builder.writes.pieces:
        _check_writes(module, network)
    return network.train(module.training)


@torch.no_grad()
def _check_writes(module: nn.Module, network: Network) -> None:
    """Raise InputError if a network in which pieces of tensors were written to answers otherwise than its module."""
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    if like.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(2, *shape, generator=generator).to(like) for shape in network.input_shapes]
    modes = {part: part.training for part in module.modules()}
    wanted = pytree.tree_leaves(module.eval()(*(x.clone() for x in images)))
    for part, training in modes.items():
        part.training = training
    for a, b in zip(wanted, pytree.tree_leaves(network(*images)), strict=True):
        if isinstance(a, Tensor) and not _close(a.to(b), b):
            raise InputError(
                "a forward whose writes in place can be said as a graph of values",
                got="a network that answers otherwise than the module",
                remedy="write the result to a new tensor: y = relu(x[:, :2]) instead of x[:, :2].relu_()",
            )


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=TRACE_TOLERANCE, atol=TRACE_TOLERANCE * float(b.abs().max()))
