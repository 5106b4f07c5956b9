"""The arms of `equal_latency` that Torch-Pruning 1.6.1 cuts: pip install --no-deps torch-pruning==1.6.1."""

from __future__ import annotations

import copy
import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bar_edge.errors import EnvironmentLacks
from bar_edge.network import Network
from bar_edge.training import load_task

if TYPE_CHECKING:
    from benchmarks.equal_latency.bed import Bed

TASK = load_task("classification")
#: strength of the group-norm regulariser, as in Torch-Pruning's own CIFAR recipe
STRENGTH = 5e-4


def torch_pruning() -> Any:
    """Return Torch-Pruning; raises EnvironmentLacks without it."""
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise EnvironmentLacks(
            "Torch-Pruning for the arms named tp-",
            got="it is not installed",
            remedy="pip install --no-deps torch-pruning==1.6.1, or other --arms",
        ) from error


def tp_pruner(bed: Bed, module: nn.Module, ratio: float, kind: str) -> Any:
    """Return Torch-Pruning's pruner of a module; the classifier's outputs stay."""
    tp = torch_pruning()
    options: dict[str, Any] = {"pruning_ratio": ratio, "ignored_layers": [classifier(module)]}
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    make = tp.pruner.BasePruner
    if kind == "tp-l2-global":
        options |= {"global_pruning": True, "max_pruning_ratio": 0.95}
    if kind.startswith("tp-l2-round"):
        options["round_to"] = int(kind.removeprefix("tp-l2-round"))
    if kind == "tp-groupnorm":
        make, options["reg"], options["global_pruning"] = tp.pruner.GroupNormPruner, STRENGTH, True
        options["max_pruning_ratio"] = 0.95
    return make(module.eval(), torch.zeros(2, *bed.data.input_shape), importance=importance, **options)


def classifier(module: nn.Module) -> nn.Module:
    """Return the last linear layer."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]


def cut(bed: Bed, module: nn.Module, ratio: float, kind: str) -> Network:
    """Return a copy of a module after Torch-Pruning has cut it by a ratio."""
    copied = copy.deepcopy(module)
    tp_pruner(bed, copied, ratio, kind).step()
    return bed.traced(copied)


def torch_pruned(bed: Bed, share: float, kind: str) -> Network:
    """Cut by Torch-Pruning at once."""
    module = bed.module()
    return bed.matched(lambda ratio: cut(bed, module, ratio, kind), share, 0.0, 0.95)


def group_norm(bed: Bed, share: float) -> Network:
    """Train sparsely under Torch-Pruning's group norm for the epochs in which ours prunes, then cut."""
    module = bed.module()
    pruner = tp_pruner(bed, module, 0.5, "tp-groupnorm")
    optimizer = torch.optim.SGD(module.parameters(), lr=bed.train.rate("prune"), momentum=0.9, weight_decay=5e-4)
    module.train()
    pruner.update_regularizer()
    for epoch in range(bed.options.prune):
        for images, targets in bed.data.fit.batches(bed.batch, train=True, seed=bed.seed, epoch=epoch, device="cpu"):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = module(images)
            loss = TASK.loss(outputs.float(), targets)
            optimizer.zero_grad()
            loss.backward()
            pruner.regularize(module)
            optimizer.step()
    return bed.matched(lambda ratio: cut(bed, module, ratio, "tp-groupnorm"), share, 0.0, 0.95)
