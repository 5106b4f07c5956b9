"""Layers with some of their channels."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bar_edge.network.channels import CONVOLUTIONS, LEAVES, TRANSPOSED
from bar_edge.network.leaves import PartialNorm


def even_groups(groups: int, n_in: int, width: int, outs: Tensor, ins: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return the living groups of a grouped convolution, with as many inputs and outputs in each of them.

    n_in: inputs per dense group; width: all dense outputs. What a group lacks is filled with channels of
    its own that are not there: their inputs are zeros, their outputs are cut off again.
    """
    n_out = width // groups
    own_outs, own_ins = ([ids[ids // n == g] for g in range(groups)] for ids, n in ((outs, n_out), (ins, n_in)))
    alive = [g for g in range(groups) if len(own_outs[g])]

    def filled(own: list[Tensor], n: int) -> Tensor:
        most = max(len(own[g]) for g in alive)
        rows = []
        for g in alive:
            rest = torch.arange(g * n, (g + 1) * n)
            rest = rest[~torch.isin(rest, own[g])]
            rows.append(torch.cat([own[g], rest[: most - len(own[g])]]))
        return torch.cat(rows)

    return len(alive), filled(own_outs, n_out), filled(own_ins, n_in)


def copied(tensor: Tensor, part: Tensor | None = None) -> Tensor:
    """Return a copy of a tensor, or of a part of it, that is a parameter if the tensor is one."""
    values = (tensor if part is None else part).detach().clone()
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _take(module: nn.Module, name: str, part: Tensor | None) -> None:
    """Replace a parameter or buffer by a part of it in memory of its own; parameters stay parameters."""
    if part is not None:
        whole = getattr(module, name)
        part = part.detach().contiguous(memory_format=_memory_format(whole))
        is_parameter = isinstance(whole, nn.Parameter)
        setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad) if is_parameter else part)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Return in which order a tensor lies in memory: that of its axes, or with the channels last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    inside = last is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last)
    return last if last is not None and inside else torch.contiguous_format


def some(tensor: Tensor, axis: int, ids: Tensor) -> Tensor:
    """Return some indices of an axis, the tensor itself if they are all of them."""
    every = len(ids) == tensor.shape[axis] and torch.equal(ids, torch.arange(len(ids), device=ids.device))
    return tensor if every else tensor.index_select(axis, ids)


def _hollow(module: nn.Module) -> nn.Module:
    """Return a copy of a module that still shares its tensors (to be replaced one by one)."""
    memo: dict[int, Any] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, memo)


def slice_reader(module: nn.Module, outs: Tensor, ins: Tensor, groups: int, dense_groups: int) -> nn.Module:
    """Return a layer with some of its outputs and inputs; both in equal numbers per group, group by group."""
    new, transposed = _hollow(module), isinstance(module, TRANSPOSED)
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    outs, ins = outs.to(weight.device), ins.to(weight.device)
    first, second = (ins, outs) if transposed else (outs, ins)  # the axes of the weight
    if dense_groups == 1:
        part = some(some(weight.detach(), 0, first), 1, second)
        part = part.clone() if part.data_ptr() == weight.data_ptr() else part
    else:
        rows = zip(first.view(groups, -1), second.view(groups, -1) % weight.shape[1], strict=True)
        part = torch.cat([weight.detach()[a][:, b] for a, b in rows])
    _take(new, "weight", part)
    _take(new, "bias", bias[outs] if isinstance(bias, Tensor) else None)
    if isinstance(new, nn.Linear):
        new.out_features, new.in_features = len(outs), len(ins)
    else:
        new.out_channels, new.in_channels, new.groups = len(outs), len(ins), groups  # type: ignore[assignment]
    return new


def slice_alone(module: nn.Module, ids: Tensor, inputs: int) -> nn.Module:
    """Return the part of a module that works on each channel alone, for some channels."""
    new = _hollow(module)
    if isinstance(module, nn.Linear) or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
        return copy.deepcopy(module)  # the same for every channel
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if isinstance(module, TRANSPOSED) and name == "weight":  # (in, out of each, ...)
            filters = tensor.detach().flatten(0, 1)[ids.to(tensor.device)]
            _take(new, name, filters.view(inputs, len(ids) // inputs, *tensor.shape[2:]))
        else:
            _take(new, name, tensor[ids.to(tensor.device)] if tensor.ndim else tensor.clone())
    if isinstance(new, nn.modules.batchnorm._NormBase):
        new.num_features = len(ids)
    elif isinstance(new, nn.PReLU):
        new.num_parameters = len(ids)
    elif isinstance(new, CONVOLUTIONS + TRANSPOSED):
        new.groups, new.in_channels, new.out_channels = inputs, inputs, len(ids)
    else:
        assert not list(new.parameters()) and not isinstance(new, LEAVES)
    return new


def slice_norm(module: nn.Module, ids: Tensor) -> nn.Module:
    """Return a norm over channels of which only some are there."""
    if isinstance(module, PartialNorm):
        width, axis, membership = module.group_width, module.axis, torch.tensor(module.membership)
        whole, affine = len(module.membership), module.affine
    elif isinstance(module, nn.GroupNorm):
        width, axis, affine = module.num_channels // module.num_groups, 1, module.affine
        membership, whole = torch.arange(module.num_channels) // width, module.num_channels
    else:
        assert isinstance(module, nn.LayerNorm)
        whole = width = int(module.normalized_shape[0])
        axis, affine, membership = -1, module.elementwise_affine, torch.zeros(width, dtype=torch.int64)
    if len(ids) == whole:
        return copy.deepcopy(module)
    assert isinstance(module.eps, float)
    weight, bias = module.weight, module.bias
    new = PartialNorm(axis, width, tuple(membership[ids].tolist()), module.eps, affine, bias is not None)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if isinstance(tensor, nn.Parameter):
            setattr(new, name, copied(tensor, tensor[ids.to(tensor.device)]))
    return new.to(next((p.device for p in module.parameters()), torch.device("cpu")))
