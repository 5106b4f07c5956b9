"""One RUN folder on its way: dense, pruned, sliced, tuned, judged; every stage that is done is not done again."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import itertools
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bar_edge.config import PHASES, TrainConfig, read_toml, to_toml
from bar_edge.data import Split
from bar_edge.data.source import Targets
from bar_edge.errors import InputError
from bar_edge.files import make_folder, read_json, write_bytes, write_json
from bar_edge.lowering.widen import regular_form
from bar_edge.methods import GateLayout, budget_limit
from bar_edge.methods.distillation import soft_cross_entropy
from bar_edge.methods.gating.projection import plan_within
from bar_edge.methods.method import Context, Pruner, Scored, find_method
from bar_edge.network import Network, count, is_network_folder, layers
from bar_edge.progress import Progress
from bar_edge.records import Budget, ChannelPlan
from bar_edge.records.latency_table import LatencyTable
from bar_edge.records.result import (
    BudgetResult,
    InputResult,
    LayerResult,
    Metric,
    Parity,
    Result,
    Side,
)
from bar_edge.requests import PruneRequest, anchored, prune_request
from bar_edge.runs.rehearsal import rehearse, rehearse_task, two
from bar_edge.runs.specs import Material, portable, sample_images, with_weights
from bar_edge.surgery import masked_outputs, relative_difference, slice_network
from bar_edge.training import Distills, Journal, Phase, evaluate, train
from bar_edge_calibration import reestimate_batchnorm

T = TypeVar("T")
STATISTICS_BATCHES = 50


class Run:
    """One RUN folder on its way; every stage is skipped if an interrupted run had finished it."""

    def __init__(
        self, config: PruneRequest, material: Material, out: Path, *, resume: bool, progress: Progress
    ) -> None:
        self.task, self.data, self.network = material.task, material.data, material.network
        train = config.train.chosen(len(self.data.fit))
        if train != config.train:
            epochs = ", ".join(f"{phase} {getattr(train, phase)}" for phase in PHASES)
            images = f"{len(self.data.fit):,}"
            progress.note(f"by the number of training images, {images}: epochs {epochs}; batch {train.batch}")
        config = portable(dataclasses.replace(config, train=train))
        self.config, self.out, self.progress = config, out, progress
        self.batch, self.epochs = train.batch or 1, {phase: int(getattr(train, phase) or 0) for phase in PHASES}
        self.method = find_method(config.method)
        self.table = LatencyTable.load(Path(config.table)) if config.table else None
        self.layout = self.layout_of(self.network)
        self.budget = Budget.parse(config.budget)
        self.limit = budget_limit(self.layout, self.budget)
        if not is_network_folder(out / "dense"):  # nothing is trained yet
            rehearse_task(self.network, self.task, self.data, config.train)
            rehearse(self.layout, self.budget.metric, self.limit, two(self.data.held_out)[0])
        _prepare_folder(out, config)
        self.journal = Journal(out, resume=resume, note=progress.note)

    def finished(self) -> Pruned | None:
        """Return what the folder holds of a finished run of this configuration, None if there is none."""
        return self._whole(self.out / "result.json", lambda: Pruned.load(self.out))

    def _whole(self, file: Path, load: Callable[[], T]) -> T | None:
        """Return what a finished stage left, None if it left no file yet or, which is noted, a damaged one."""
        if not file.is_file():
            return None
        try:
            return load()
        except InputError as error:
            self.progress.note(
                f"{file.relative_to(self.out)} or what belongs to it is damaged: made anew ({error.got})"
            )
            return None

    def dense(self) -> Network:
        """Return the trained dense network, RUN/dense; given weights are not trained again."""
        folder = self.out / "dense"
        kept = self._whole(folder / "network.json", lambda: Network.load(folder))
        if kept is not None:
            return kept
        network = copy.deepcopy(self.network)
        if not self.config.weights:
            self._train(network, "dense")
        network.save(folder)
        return network

    def teacher(self, dense: Network) -> nn.Module:
        """Return whom the student learns from: --teacher, or the dense network."""
        if not self.config.teacher:
            return copy.deepcopy(dense).eval()
        return with_weights(self.config.model, self.config.model_arg, self.data, Path(self.config.teacher)).eval()

    def pruned(self, dense: Network, teacher: nn.Module) -> tuple[Network, ChannelPlan, int]:
        """Return the sliced network before fine-tuning, its plan and how many gates the projection closed."""
        folder, plan_file = self.out / "checkpoints" / "sliced", self.out / "plan.json"
        kept = self._whole(plan_file, lambda: self._read_pruned(folder, plan_file))
        if kept is not None:
            return kept
        scored = self._scored(dense, teacher)
        plan, forced = plan_within(self.layout_of(scored.network), scored, self.budget.metric, self.limit)
        sliced = self._sliced(scored.network, plan, teacher)
        sliced.save(folder)
        write_json(folder / "state.json", {"parity": self.parity, "forced": forced})
        write_json(plan_file, plan.to_json())
        return sliced, plan, forced

    def _read_pruned(self, folder: Path, plan_file: Path) -> tuple[Network, ChannelPlan, int]:
        """Read what `pruned` left; raises InputError if it is damaged."""
        state = read_json(folder / "state.json")
        try:
            self.parity, forced = float(state["parity"]), int(state["forced"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("the parity and the forced gates", got=type(error).__name__) from error
        return Network.load(folder), ChannelPlan.from_json(read_json(plan_file)), forced

    def corrected(self, limit: float) -> tuple[Network, ChannelPlan, int]:
        """Project the scores that training left onto another limit in ms, slice, fine-tune for a third of the epochs.

        A lower limit leaves channels out of the plan before, a higher one adds those that were closed last.
        """
        dense = self.dense()
        shorter = dataclasses.replace(self.config.train, tune=-(-self.epochs["tune"] // 3))
        teacher = self.teacher(dense)
        scored = self._scored(dense, teacher)
        plan, forced = plan_within(self.layout_of(scored.network), scored, self.budget.metric, limit, reopen=True)
        sliced = self._sliced(scored.network, plan, teacher, again=shorter)
        self.tune(sliced, teacher, shorter)
        write_json(self.out / "plan.json", plan.to_json())
        return sliced, plan, forced

    def _scored(self, dense: Network, teacher: nn.Module) -> Scored:
        """Return what the method leaves; from checkpoints/, if it has been done."""
        file, folder = self.out / "checkpoints" / "gates.safetensors", self.out / "checkpoints" / "folded"
        kept = self._whole(file, lambda: _read_scored(file, folder))
        if kept is not None:
            return kept
        scored = self.method.score(dense, self._context(dense, teacher))
        scored.network.save(folder)
        left = {"scores": scored.scores, "opened": scored.opened, "forced": torch.tensor(scored.forced)}
        write_bytes(file, save({name: value.cpu() for name, value in left.items() if value is not None}))
        return scored

    def _context(self, dense: Network, teacher: nn.Module) -> Context:
        distills = isinstance(self.task, Distills)
        return Context(
            config=self.config,
            layout=self.layout_of(dense),
            budget=self.budget,
            limit=self.limit,
            steps=self.data.fit.n_batches(self.batch, True) * self.epochs["prune"],
            teacher=teacher if distills else None,
            loss=self.task.loss,
            soft_loss=self.task.distill if isinstance(self.task, Distills) else soft_cross_entropy,
            train=lambda network, pruner: self._train(network, "prune", pruner=pruner),
            batches=self._batches,
        )

    def _sliced(
        self, network: Network, plan: ChannelPlan, teacher: nn.Module, again: TrainConfig | None = None
    ) -> Network:
        """Slice, note the parity, and train for the epochs of the prune phase if the method has not used them."""
        sliced = slice_network(network, plan)
        self.parity = masked_parity(network, plan, sliced, self._images())
        if not self.method.trains:
            self._train(sliced, "prune", teacher=teacher, again=again)
        return sliced

    def layout_of(self, network: Network) -> GateLayout:
        """Return the gates of a network, as the run's options have them."""
        return GateLayout(network, keep=self.config.keep, round_to=self.config.round_to, table=self.table)

    def tune(self, sliced: Network, teacher: nn.Module, again: TrainConfig | None = None) -> None:
        """Fine-tune in place; without epochs, re-estimate BatchNorm and keep that if held-out images prefer it.

        again: how, for a second time, which leaves no trace in the journal.
        """
        self.reestimated = False
        if self.epochs["tune"]:
            self._train(sliced, "tune", teacher=teacher, again=again)
            return
        before, kept = copy.deepcopy(sliced.state_dict()), self.evaluate(sliced, "held_out")
        self._reestimate(sliced)
        better = self.evaluate(sliced, "held_out") - kept
        self.reestimated = better > 0 if self.task.higher_is_better else better < 0
        if not self.reestimated:
            sliced.load_state_dict(before)

    def _reestimate(self, network: nn.Module) -> None:
        """Measure BatchNorm statistics anew on training images."""
        device = next(network.parameters()).device
        reestimate_batchnorm(network, (images for images, _ in self._batches(device)))

    def _batches(self, device: torch.device) -> Iterator[tuple[Tensor, Targets]]:
        """Yield training images for statistics: not augmented, always the same."""
        batches = self.data.fit.batches(self.batch, train=True, seed=0, epoch=0, device=device, augment="none")
        return itertools.islice(batches, STATISTICS_BATCHES)

    def judged(self, dense: Network, sliced: Network, plan: ChannelPlan, forced: int) -> Pruned:
        """Read the test split once, write network/ and result.json, and return what the run came to."""
        sliced.save(self.out / "network")
        result = Result(
            method=self.config.method,
            model=self.config.model,
            data=self.data.name,
            seed=self.config.seed,
            metric=Metric(name=self.task.metric_name, higher_is_better=self.task.higher_is_better),
            budget=self._budget_result(plan),
            dense=Side.of(count(dense), self.evaluate(dense, "test")),
            sliced=Side.of(count(sliced), self.evaluate(sliced, "test"), count(regular_form(sliced))),
            parity=Parity(masked_vs_sliced=self.parity),
            layers=_layer_results(dense, plan),
            end_of_pruning={"forced": forced},
            batchnorm_reestimated=self.reestimated,
            max_drop=self.config.max_drop,
            input=InputResult(
                shape=self.data.input_shape, mean=self.data.mean, std=self.data.std, classes=self.data.classes
            ),
            versions=versions(),
        )
        write_result(self.out, result)
        return Pruned(result=result, plan=plan, dense=dense.cpu().eval(), network=sliced.cpu().eval())

    def _budget_result(self, plan: ChannelPlan) -> BudgetResult:
        achieved = self.layout.cost(plan.kept, self.budget.metric)
        return BudgetResult(
            text=self.config.budget,
            unit=self.budget.metric,
            limit=self.limit,
            achieved=achieved,
            within=achieved <= self.limit,
            basis=self.budget.cost.basis,
            words=describe_budget(self.layout, self.budget)["words"],
        )

    def evaluate(self, network: nn.Module, split: str) -> float:
        """Return the task's metric of a network on a split."""
        train = self.config.train
        part: Split = getattr(self.data, split)
        return evaluate(network, part, self.task, batch=self.batch, device=train.device, precision=train.precision)

    def _train(
        self,
        network: nn.Module,
        phase: Phase,
        *,
        teacher: nn.Module | None = None,
        pruner: Pruner | None = None,
        again: TrainConfig | None = None,
    ) -> None:
        train(
            network,
            self.data,
            self.task,
            again or self.config.train,
            phase,
            seed=self.config.seed,
            teacher=teacher,
            distill=self.config.distill,
            pruner=pruner,
            journal=None if again else self.journal,
            progress=self.progress,
        )

    def _images(self) -> Tensor:
        return sample_images(self.data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a finished run hands on: its result, and the networks before and after, on the CPU and in eval mode."""

    result: Result
    plan: ChannelPlan
    dense: Network
    network: Network

    @classmethod
    def load(cls, folder: Path) -> Pruned:
        """Read a RUN folder; raises InputError unless `prune` has finished it."""
        if not (folder / "result.json").is_file() or not is_network_folder(folder / "network"):
            raise InputError(
                "a RUN folder that prune has finished",
                got=f"{folder.name} without result.json or network",
                remedy="give the folder of `bar-edge prune --out`, or finish it with --resume",
            )
        return cls(
            result=read_result(folder),
            plan=ChannelPlan.from_json(read_json(folder / "plan.json")),
            dense=Network.load(folder / "dense"),
            network=Network.load(folder / "network"),
        )


def _read_scored(file: Path, folder: Path) -> Scored:
    """Read what a method left; raises InputError if it is damaged."""
    try:
        gates = load_file(file)
        scores, forced = gates["scores"], int(gates.get("forced", 0))
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise InputError("the scores of a method", got=type(error).__name__) from error
    return Scored(network=Network.load(folder), scores=scores, opened=gates.get("opened"), forced=forced)


def read_result(folder: Path) -> Result:
    """Return the result of a RUN folder; raises InputError if its file is none."""
    return Result.from_json(read_json(folder / "result.json"))


def write_result(folder: Path, result: Result) -> None:
    """Write result.json."""
    write_json(folder / "result.json", result.to_json())


def _layer_results(dense: Network, plan: ChannelPlan) -> tuple[LayerResult, ...]:
    after = {layer.name: layer for layer in layers(dense, plan)}
    return tuple(
        LayerResult(
            name=layer.name,
            kind=layer.kind,
            width=layer.out_channels,
            kept=after[layer.name].out_channels,
            area=layer.area,
        )
        for layer in layers(dense)
        if layer.area
    )


def _prepare_folder(out: Path, config: PruneRequest) -> None:
    """Make the RUN folder; refuses to resume a run with other options."""
    file, here = out / "config.toml", anchored(config, out)
    if not file.is_file():
        make_folder(out)
        write_bytes(file, to_toml(here).encode())
        return
    # runs of before kept paths as seen from where they were started
    if prune_request(read_toml(file)) not in (here, config):
        raise InputError(
            "the options of the run that was stopped",
            got=f"options that differ from {out.name}/config.toml",
            consequence="nothing was started, the earlier run is intact",
            remedy=f"give the same options, or --config {out.name}/config.toml",
        )


def masked_parity(folded: Network, plan: ChannelPlan, sliced: Network, images: Tensor) -> float:
    """Return the difference between the masked and the sliced network on real images, in float64."""
    double = images.double().cpu()
    masked = masked_outputs(copy.deepcopy(folded).cpu().double(), plan, double)
    with torch.no_grad():
        return relative_difference(masked, copy.deepcopy(sliced).cpu().double().eval()(double))


def describe_budget(layout: GateLayout, budget: Budget) -> dict[str, Any]:
    """Return a budget in all units, with what a uniform scaling of all widths would cost."""
    limit = budget_limit(layout, budget)
    factor = layout.cost({}, budget.metric) / limit
    words = f"{factor:.4g}x {budget.metric} = {limit:,.0f}"
    if budget.cost.of_device:
        words = f"{limit:g} {budget.cost.unit}, {factor:.4g}x below the whole network by the table"
        if factor <= 1:
            words = f"{limit:g} {budget.cost.unit}, and the whole network takes {factor * limit:.4g} by the table: "
            words += "nothing to prune"
    if budget.cost.by_width:
        words += f", expect about {factor**2:.3g}x FLOPs if all widths shrink alike"
    return {"text": budget.text, "unit": budget.metric, "limit": limit, "factor": factor, "words": words}


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in ("bar-edge", "torch", "onnx", "onnxruntime", "onnxsim", "lightning-fabric", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
