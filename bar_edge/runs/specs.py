"""What a SPEC on the command line names: a network, with or without weights, and its data."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from bar_edge.data import DataSource, load_data
from bar_edge.errors import InputError
from bar_edge.models import build, load_weights
from bar_edge.network import Network, is_network_folder, trace
from bar_edge.requests import PruneRequest
from bar_edge.training import Task, load_task

SAMPLE_IMAGES = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What a run works on: read, built and traced once."""

    task: Task
    data: DataSource
    #: with the weights that were given, else with those of its making
    network: Network


def read_material(config: PruneRequest) -> Material:
    """Import the task, read the data, and build and trace the model, in this order; seeds torch's generator."""
    task, data = load_task(config.task), read_data(config)
    torch.manual_seed(config.seed)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if config.weights:
        network = with_weights(config.model, config.model_arg, data, Path(config.weights))
    else:
        network = read_network(config.model, config.model_arg, data.input_shape, len(data.classes))
    return Material(task=task, data=data, network=network)


def portable(config: PruneRequest) -> PruneRequest:
    """Return the configuration with paths relative to the working directory: none of this machine's is written down."""
    named = {name: getattr(config, name) for name in ("model", "data", "weights", "teacher", "table")}
    paths = {name: os.path.relpath(value) for name, value in named.items() if value and os.path.isabs(value)}
    return dataclasses.replace(config, **paths)


def read_data(config: PruneRequest) -> DataSource:
    """Load the data of a run's configuration."""
    train = config.train
    return load_data(config.data, seed=config.seed, workers=train.workers, size=train.image_size or None)


def shape_and_classes(data: str | None, input_shape: tuple[int, ...] | None) -> tuple[tuple[int, ...], int]:
    """Return input shape and number of classes: those of the data, or 3x32x32 and 10; a given shape wins."""
    if data is None:
        return input_shape or (3, 32, 32), 10
    source = load_data(data)
    return input_shape or source.input_shape, len(source.classes)


def sample_images(data: DataSource, number: int = SAMPLE_IMAGES) -> Tensor:
    """Return the first held-out images, normalised, (number, C, H, W); training images where these are too few."""
    found: list[Tensor] = []
    for split in (data.held_out, data.fit):
        left = number - sum(map(len, found))
        if left > 0:
            batches = split.batches(left, train=False, seed=0, epoch=0, device="cpu", augment="none")
            found.append(next(iter(batches))[0])
    return torch.cat(found)


def read_network(
    model: str, model_args: tuple[str, ...] = (), input_shape: tuple[int, ...] = (3, 32, 32), classes: int = 10
) -> Network:
    """Return the network that a model SPEC names: a folder that bar-edge wrote, or something to trace."""
    folder = Path(model)
    for candidate in (folder, folder / "network"):
        if is_network_folder(candidate):
            network = Network.load(candidate)
            if network.input_shapes != (tuple(input_shape),):
                raise InputError(
                    f"inputs of shape {'x'.join(map(str, network.input_shapes[0]))}, as {folder.name} was traced",
                    got="x".join(map(str, input_shape)),
                    remedy="use data of that shape",
                )
            return network
    return trace_module(build_module(model, model_args, input_shape, classes), input_shape)


def build_module(model: str, model_args: tuple[str, ...], input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return the user's or the zoo's module for a SPEC."""
    return build(model, input_shape=input_shape, classes=classes, model_args=model_args)


def trace_module(module: nn.Module, input_shape: tuple[int, ...]) -> Network:
    """Trace a module for inputs (N, *input_shape); a wrong channel count is named."""
    try:
        return trace(module, torch.zeros(2, *input_shape))
    except InputError as error:
        first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
        if first is not None and first.in_channels != input_shape[0]:
            raise InputError(
                f"images of {first.in_channels} channels, as the model's first convolution reads",
                got=f"images of shape {'x'.join(map(str, input_shape))}",
                consequence="nothing was started",
                remedy="use other data, or a model for this number of channels",
            ) from error
        raise


def with_weights(model: str, model_args: tuple[str, ...], data: DataSource, weights: Path) -> Network:
    """Return the traced model with weights from a file, or the network of a folder that bar-edge wrote."""
    for candidate in (weights, weights / "dense"):
        if is_network_folder(candidate):
            return Network.load(candidate)
    module = build_module(model, model_args, data.input_shape, len(data.classes))
    load_weights(module, weights)
    return trace_module(module, data.input_shape)
