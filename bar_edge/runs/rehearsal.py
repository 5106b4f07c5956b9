"""The rehearsal: what could fail after the training is tried before it, on the untrained network, in seconds."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bar_edge.config import TrainConfig
from bar_edge.data import DataSource, Split
from bar_edge.errors import BarEdgeError, InputError
from bar_edge.lowering.lower import lower
from bar_edge.methods import GateLayout, random_plan
from bar_edge.network import Network
from bar_edge.network.trace import source_line
from bar_edge.records import ChannelPlan, Metric
from bar_edge.records.lowering import Lowering
from bar_edge.records.tolerance import PARITY_LIMIT, TOLERANCES
from bar_edge.surgery import masked_outputs, relative_difference, slice_network
from bar_edge.targets.onnx.file import export_onnx, parity_onnx
from bar_edge.training import Task, choose_device, choose_precision
from bar_edge.training.tasks import Checks

#: form in which the rehearsal exports: the user's operators and plain additions. Slices of a random plan would be
#: hundreds for every addition, over which torch's exporter takes minutes; the forms themselves need no rehearsal
FORM = Lowering.parse("regular")
_NOTHING = "nothing was started: this would have failed after the training"


def rehearse(layout: GateLayout, metric: Metric, limit: float, images: Tensor) -> None:
    """Plan, slice, compare, save, load and export a network once, before it is trained.

    metric, limit: of the budget that a random plan is made for; images: (2, ...). Raises InputError, with the operator
    and the line where they are known, for whatever fails. Torch's random numbers and the network stay as they were.
    """
    with torch.random.fork_rng(devices=[]):
        network = copy.deepcopy(layout.network).cpu().eval()
        with _named("a plan for this network", network):
            plan = random_plan(layout, metric, limit, 0)
        with _named("a network that can be sliced", network):
            sliced = slice_network(network, plan).eval()
        _compare(network, plan, sliced, images)
        with tempfile.TemporaryDirectory() as folder, _named("a network that can be saved and read back", network):
            for name, one in (("dense", network), ("network", sliced)):
                _save_and_load(one, Path(folder) / name)
        with tempfile.TemporaryDirectory() as folder, _named("a network that can be exported to ONNX", network):
            _export(sliced, Path(folder) / "model.onnx", images)


def rehearse_task(network: Network, task: Task, data: DataSource, config: TrainConfig) -> None:
    """Run one forward, one loss, one backward and one metric on two images of every split, as the training will.

    Raises InputError if the outputs do not fit the task or the targets. Nothing is changed.
    """
    bf16 = choose_precision(config.precision, choose_device(config.device)) == "bf16"
    with torch.random.fork_rng(devices=[]):
        trained = copy.deepcopy(network).cpu().train()
        for name, split in (("training", data.fit), ("held-out", data.held_out), ("test", data.test)):
            images, targets = two(split)
            with _fitting(name, images, targets):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                    outputs = trained(images) if split is data.fit else trained.eval()(images)
                outputs = pytree.tree_map(_as_trained, outputs)
                if isinstance(task, Checks):
                    task.check(outputs, split.all_targets())
                loss = task.loss(outputs, targets)
                if split is data.fit and loss.requires_grad:
                    torch.autograd.backward(loss)
                with torch.no_grad():
                    task.value(task.metric(outputs, targets))


def two(split: Split) -> tuple[Tensor, Any]:
    """Return the first two images of a split, or the one that it has, and their targets."""
    return next(split.batches(2, train=False, seed=0, epoch=0, device="cpu", augment="none"))


def _compare(network: Network, plan: ChannelPlan, sliced: Network, images: Tensor) -> None:
    with _named("a network that computes in float64", network), torch.no_grad():
        double = images.double()
        masked = masked_outputs(copy.deepcopy(network).double(), plan, double)
        difference = relative_difference(masked, copy.deepcopy(sliced).double()(double))
    if _finite(masked) and not difference <= PARITY_LIMIT:
        raise InputError(
            f"a sliced network that computes what the masked one does, to {PARITY_LIMIT:g}",
            got=f"a difference of {difference:.1e} under a random plan",
            consequence=_NOTHING,
            remedy="report the network: this is a fault of bar-edge; --keep LAYER may avoid it",
        )


def _save_and_load(network: Network, folder: Path) -> None:
    network.save(folder)
    found = Network.load(folder)
    if found.fingerprint != network.fingerprint or network.fingerprint != copy.deepcopy(network).double().fingerprint:
        raise InputError("a network that reads back as it was written", got="another fingerprint")


def _export(sliced: Network, file: Path, images: Tensor) -> None:
    export_onnx(lower(sliced, FORM), sliced.input_shapes, file)
    with torch.no_grad():
        finite = _finite(sliced(images))
    error = parity_onnx(sliced, file, images)
    if finite and not error <= TOLERANCES["fp32"]:
        raise InputError(
            f"an ONNX file that differs from the network by at most {TOLERANCES['fp32']:g}", got=f"{error:.3g}"
        )


def _as_trained(output: Any) -> Any:
    return output.float() if isinstance(output, Tensor) and output.dtype == torch.bfloat16 else output


def _finite(outputs: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in pytree.tree_leaves(outputs))


@contextlib.contextmanager
def _named(required: str, network: Network) -> Iterator[None]:
    """Turn whatever goes wrong inside into an InputError that names the operator and the user's line."""
    try:
        yield
    except InputError as error:
        consequence = error.consequence or _NOTHING
        raise InputError(error.required, got=error.got, consequence=consequence, remedy=error.remedy) from error
    except BarEdgeError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no text"]
        where = _operator(str(error), network)
        raise InputError(
            required,
            got=f"{type(error).__name__}: {lines[0][:200]}" + (f" at {where}" if where else ""),
            consequence=_NOTHING,
            remedy="rewrite that operation, or keep its layers whole with --keep; --debug shows the traceback",
        ) from error


def _operator(text: str, network: Network) -> str:
    """Return operator and line of the node that fx names in an error, empty if it names none."""
    for node in network.nodes:
        if node.op == "call_function" and (f"%{node.name} " in text or f"{node.name} = " in text):
            return f"{node.target}, {source_line(node)}"
    return ""


@contextlib.contextmanager
def _fitting(split: str, images: Tensor, targets: Any) -> Iterator[None]:
    try:
        yield
    except BarEdgeError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no text"]
        shapes = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in pytree.tree_leaves(targets)]
        raise InputError(
            "a network whose outputs fit the targets and the task",
            got=f"{type(error).__name__}: {lines[0][:200]}; two images of the {split} split {tuple(images.shape)}, "
            f"targets {', '.join(shapes)}",
            consequence=_NOTHING,
            remedy="give a --task package.module:Task for what the data set returns, or correct model or data; "
            "--debug shows the traceback",
        ) from error
