"""Latency tables: the record, what a network costs by one, and budgets in milliseconds."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from bar_edge.bench import Measurement
from bar_edge.errors import InputError
from bar_edge.latency_budget import profile_device as profiling
from bar_edge.latency_budget.operation_prices import Prober, chain, find_step, monotone
from bar_edge.latency_budget.profile_device import fit
from bar_edge.methods import BAR, GateLayout, budget_limit, random_plan, smallest_cost
from bar_edge.methods.gating.gate_cost import LatencyCost, gate_cost
from bar_edge.methods.gating.projection import project
from bar_edge.models import build
from bar_edge.network import Network, trace
from bar_edge.network.liveness import held_channels
from bar_edge.network.priced_operations import LAYERS, LatencyCounter, largest_widths, operations
from bar_edge.pipeline import profile
from bar_edge.records import Budget
from bar_edge.records.latency_table import Kind, LatencyTable, Prices, knots
from bar_edge.records.lowering import Lowering
from bar_edge.targets.table import forms_for
from tests.reference import random_kept


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return trace(build("resnet20", input_shape=(3, 8, 8), classes=10).eval(), torch.zeros(2, 3, 8, 8))


def made_up(network: Network, **fields: object) -> LatencyTable:
    """A device on which a layer takes 1 us and 0.1 us per product of widths, all else 1 us and 0.1 us per channel."""
    prices = {}
    for kind, widths in largest_widths(network).items():
        axes = tuple((0, *knots(n)) for n in widths)
        grid = np.stack(np.meshgrid(*axes, indexing="ij"))
        ms = np.where((grid > 0).all(0), made_up_ms(kind, grid), 0.0)
        prices[str(kind)] = Prices(widths=axes, ms=tuple(ms.ravel().tolist()))
    return LatencyTable(
        **{"lowering": Lowering.parse("gather:4"), "rounding": 4, "step": 16, "prices": prices, **fields}
    )  # type: ignore[arg-type]


def made_up_ms(kind: Kind, widths: np.ndarray) -> np.ndarray:
    return 1e-3 + 1e-4 * (widths.prod(0) if kind.op in LAYERS else widths[-1])


@pytest.fixture(scope="module")
def table(network: Network) -> LatencyTable:
    return made_up(network)


def opened_by(layout: GateLayout, kept: dict[str, tuple[int, ...]]) -> torch.Tensor:
    opened = torch.zeros(layout.size, dtype=torch.bool)
    for name, ids in kept.items():
        opened[[layout.offsets[name][0] + i for i in ids]] = True
    return opened


@pytest.mark.parametrize(
    "kind",
    [
        Kind(op="conv", kernel=(3, 3), stride=2, dilation=2, groups=4, shape=(32, 16)),
        Kind(op="conv", kernel=(1,), shape=(100,)),
        Kind(op="linear"),
        Kind(op="add", shape=(8, 8)),
    ],
)
def test_a_kind_is_read_as_it_was_written(kind: Kind) -> None:
    assert Kind.parse(str(kind)) == kind


def test_a_table_is_read_as_it_was_written(table: LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table


@pytest.mark.parametrize("change", [{"schema": 2}, {"prices": {"nonsense": {}}}, {"lines": None}, {"more": 1}])
def test_another_file_is_refused(table: LatencyTable, tmp_path: Path, change: dict[str, object]) -> None:
    table.save(tmp_path / "table.json")
    data = json.loads((tmp_path / "table.json").read_text())
    (tmp_path / "table.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(InputError, match="bar-edge profile"):
        LatencyTable.load(tmp_path / "table.json")


def test_every_convolution_is_priced_once(network: Network) -> None:
    kinds = [operation.kind for operation in operations(network)]
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(kind.op == "conv" for kind in kinds) == len(convolutions)
    assert sum(kind.op == "add" for kind in kinds) == 9
    assert sum(kind.op == "sum" for kind in kinds) == 6  # not where a stream begins
    assert sum(kind.op == "pad" for kind in kinds) == 18
    assert not any(kind.op == "norm" for kind in kinds)  # all part of the convolutions before them
    assert sum(kind.op == "each" for kind in kinds) == 10  # the activation behind each addition, and the pooling


def test_widths_cost_as_the_hardware_takes_them(network: Network, table: LatencyTable) -> None:
    assert [table.stepped(n) for n in (0, 1, 4, 5, 16, 17, 32, 33)] == [0, 4, 4, 8, 16, 32, 32, 48]
    counter = LatencyCounter(network, table)
    by_width = [counter.ms({first(network): range(n)}) for n in range(1, 17)]
    assert all(a <= b + 1e-12 for a, b in zip(by_width, by_width[1:], strict=False))
    assert len({round(ms, 9) for ms in by_width}) == 4


def first(network: Network) -> str:
    """The first layer inside a residual block."""
    return next(name for name, _ in GateLayout(network).offsets.items() if name.endswith(".conv1"))


def test_hard_is_the_count_where_nothing_dies(network: Network, table: LatencyTable) -> None:
    layout = GateLayout(network, table=table)
    kept = random_kept(network.body, 0.6, seed=2)
    cost = gate_cost(layout, "ms")
    assert isinstance(cost, LatencyCost)
    assert cost.hard(opened_by(layout, kept)) == pytest.approx(layout.cost(kept, "ms"), rel=1e-12)
    assert cost.hard(torch.ones(layout.size, dtype=torch.bool)) == pytest.approx(layout.cost({}, "ms"), rel=1e-12)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_price_by_hand(network: Network, table: LatencyTable, mixed: bool) -> None:
    """In the last block's second convolution 48 of 64 channels are kept, or all: its addition is mixed, or not."""
    layout = GateLayout(network, table=table)
    last = [name for name in layout.offsets if name.endswith("conv2")][-1]
    kept = {last: tuple(range(48))} if mixed else {}
    width = {node: int(channels.sum()) for node, channels in held_channels(network, kept).items()}
    total = 0.0
    for operation in operations(network):
        differ = [width[a] != width[b] for a, b in operation.mixed]
        there = not differ or (any(differ) and all(width[a] == width[b] for a, b in operation.whole))
        if there:
            total += float(made_up_ms(operation.kind, np.array([width[node] for node in operation.tensors])))
    added = {operation.kind.op for operation in operations(network) if operation.full is not None}
    assert added == {"pad"}  # 48 is a multiple of 4: no filter of zeros to spare
    # the image's three channels cost as four
    assert layout.cost(kept, "ms") == pytest.approx(total, rel=1e-3)


def test_expected_is_differentiable_and_falls_with_every_gate(network: Network, table: LatencyTable) -> None:
    cost = gate_cost(GateLayout(network, table=table), "ms")
    p = torch.full((cost.layout.size,), 0.6, dtype=torch.float64, requires_grad=True)
    expected = cost.expected(p)
    (gradient,) = torch.autograd.grad(expected, p)
    assert 0 < expected.item() < cost.full
    assert bool((gradient > 0).all())
    step = 1e-6
    with torch.no_grad():
        moved = p.clone()
        moved[5] += step
        assert (cost.expected(moved) - expected).item() / step == pytest.approx(gradient[5].item(), rel=1e-3)


def test_expected_takes_all_additions_for_mixed(network: Network, table: LatencyTable) -> None:
    layout = GateLayout(network, table=table)
    cost = gate_cost(layout, "ms")
    everything = torch.ones(layout.size)
    kept = {name: range(n - 1) for name, (_, n) in layout.offsets.items() if name.endswith("conv2")}
    assert cost.full == cost.expected(everything).item() > layout.cost({}, "ms")
    assert layout.cost(kept, "ms") < cost.full
    assert layout.cost({}, "ms") == cost.hard(everything.bool())


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_the_projection_meets_the_budget(network: Network, table: LatencyTable, share: float) -> None:
    layout = GateLayout(network, table=table)
    limit = share * layout.cost({}, "ms")
    scores = torch.randn(layout.size, generator=torch.Generator().manual_seed(1))
    plan, _ = project(layout, scores, torch.ones(layout.size, dtype=torch.bool), "ms", limit)
    assert 0.8 * limit < layout.cost(plan.kept, "ms") <= limit


@pytest.mark.parametrize("opened", [0.5, 1.0])
def test_channels_open_again_where_the_hardwares_steps_leave_room(
    network: Network, table: LatencyTable, opened: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = GateLayout(network, table=table)
    limit = 0.6 * layout.cost({}, "ms")
    scores = torch.randn(layout.size, generator=torch.Generator().manual_seed(1))
    gates = scores > scores.quantile(1 - opened)
    more, forced = project(layout, scores, gates, "ms", limit)
    monkeypatch.setattr("bar_edge.methods.gating.projection.REFILLS", 0)
    fewer, most_forced = project(layout, scores, gates, "ms", limit)
    assert all(set(fewer.kept[name]) <= set(more.kept[name]) for name in fewer.kept)
    assert sum(map(len, more.kept.values())) > 1.1 * sum(map(len, fewer.kept.values()))
    assert layout.cost(fewer.kept, "ms") <= layout.cost(more.kept, "ms") <= limit
    assert forced < most_forced or opened < 1


def test_bar_ends_within_milliseconds(network: Network, table: LatencyTable) -> None:
    limit = round(0.5 * GateLayout(network, table=table).cost({}, "ms"), 3)
    torch.manual_seed(0)
    pruner = BAR(network, budget=f"{limit}ms", steps=3, table=table)
    for _ in range(3):
        outputs = pruner.network(images := torch.randn(4, 3, 8, 8))
        pruner.loss(outputs.square().mean(), images, outputs).backward()
        pruner.step()
    _, plan, _ = pruner.finish()
    assert pruner.layout.cost(plan.kept, "ms") <= limit
    assert pruner.stats()["sparsity"] > 0


def test_an_infeasible_budget_names_the_smallest_latency(network: Network, table: LatencyTable) -> None:
    layout = GateLayout(network, table=table)
    least = smallest_cost(layout, "ms")
    with pytest.raises(InputError) as caught:
        budget_limit(layout, Budget.parse(f"{0.9 * least:.6f}ms"))
    named = caught.value.required.split("at least ")[1].split()[0]
    assert float(named) == pytest.approx(least, abs=1e-3)
    assert budget_limit(layout, Budget.parse(f"{named}ms")) == float(named)


def test_where_narrow_layers_are_slower_the_whole_network_is_the_fastest(network: Network, table: LatencyTable) -> None:
    prices = {
        text: dataclasses.replace(p, ms=tuple(1.0 if 0 < ms < max(p.ms) else ms for ms in p.ms))
        for text, p in table.prices.items()
    }
    layout = GateLayout(network, table=dataclasses.replace(table, prices=prices))
    full = layout.cost({}, "ms")
    assert smallest_cost(layout, "ms") == full
    limit = budget_limit(layout, Budget.parse(f"{1.001 * full}ms"))
    plan, forced = project(layout, torch.zeros(layout.size), torch.zeros(layout.size, dtype=torch.bool), "ms", limit)
    assert forced == 0 and plan == layout.plan(torch.ones(layout.size, dtype=torch.bool))


def test_milliseconds_need_a_table(network: Network) -> None:
    with pytest.raises(InputError, match="bar-edge profile"):
        budget_limit(GateLayout(network), Budget.parse("8ms"))


def test_a_table_of_another_network_is_refused(network: Network) -> None:
    other = trace(
        build("vgg16", input_shape=(3, 32, 32), classes=10, model_args=("width=0.125",)).eval(),
        torch.zeros(2, 3, 32, 32),
    )
    with pytest.raises(InputError, match="table of this network"):
        GateLayout(network, table=made_up(other))


def test_monotone() -> None:
    values = np.array([[3.0, 1.0, 2.0], [1.0, 4.0, 6.0]])
    found = monotone(values)
    assert (np.diff(found, axis=0) >= 0).all()
    assert (np.diff(found, axis=1) >= 0).all()
    assert np.array_equal(monotone(found), found)


@pytest.mark.parametrize("step", [4, 8, 16, 32])
def test_steps_are_found(step: int) -> None:
    rng, widths = np.random.default_rng(0), list(range(4, 69, 4))
    ms = [(-(-n // step) * step + 5) * float(rng.normal(1, 0.01)) for n in widths]
    assert find_step([{"widths": widths, "ms": ms}]) == step


def test_fit_finds_scale_and_constant(network: Network, table: LatencyTable) -> None:
    layout = GateLayout(network, table=table)
    full = layout.cost({}, "ms")
    plans = [random_plan(layout, "ms", share * full, seed) for seed, share in enumerate((0.9, 0.5, 0.2))]
    measured = [(plan, 1.3 * layout.cost(plan.kept, "ms") + 0.05) for plan in plans]
    fitted = fit(table, network, measured)
    again = GateLayout(network, table=fitted)
    for plan, ms in measured:
        assert again.cost(plan.kept, "ms") == pytest.approx(ms, rel=0.02)
    assert fitted.typical_error is not None
    assert fitted.typical_error < 0.05


@pytest.mark.parametrize("lowering", ["regular:16@2x2", "slices:4-16", "paper"])
def test_a_lowering_whose_layers_have_no_prices_alone_is_refused_at_once(
    network: Network, tmp_path: Path, lowering: str
) -> None:
    with pytest.raises(InputError, match="a lowering"):
        profiling.profile_network(network, tmp_path / "table.json", model="resnet8", lowering=Lowering.parse(lowering))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("faster", [0, 1])
def test_the_faster_of_two_forms_is_profiled(monkeypatch: pytest.MonkeyPatch, faster: int) -> None:
    forms = forms_for("onnxruntime-cpu", "fp32").candidates[:2]
    monkeypatch.setattr(
        profiling, "_measured", lambda _, __, pairs: [1.0 if form == forms[faster] else 2.0 for _, form in pairs]
    )
    network = trace(build("resnet8", input_shape=(1, 8, 8), classes=10).eval(), torch.zeros(2, 1, 8, 8))
    assert profiling._faster(Prober(Path("unused"), lambda _: None), network, forms) == forms[faster]


def test_what_else_the_device_does_is_not_in_the_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole processes run slower by a factor: the yardstick in each shows it, and what stands out is measured again."""
    slower = itertools.chain([1.0, 1.05, 2.0, 1.0, 1.5, 1.6, 1.4], itertools.repeat(1.0))
    sizes: list[int] = []

    def bench_onnx(files: list[Path], **_: object) -> list[Measurement]:
        factor = next(slower)
        sizes.append(len(files))
        return [
            Measurement(
                name="made up",
                samples_ms=(factor * len(onnx.load(str(file)).graph.node) * 0.01,) * 5,
                warmup_runs=0,
                batch=1,
                environment={"threads": 2, "runtime": "made up"},
            )
            for file in files
        ]

    monkeypatch.setattr("bar_edge.latency_budget.operation_prices.bench_onnx", bench_onnx)
    prober, kind = Prober(tmp_path / "part", lambda _: None), Kind.parse("conv 3x3 @8x8")
    points = [(kind, (n, 8)) for n in range(1, 61)]
    prober.measure(points)
    prices = [prober.price(*point) for point in points]
    assert prices == pytest.approx([prices[0]] * 60) and prices[0] == pytest.approx(0.01 * 2, rel=0.06)
    assert sizes == [26] * 8  # five batches; the third was measured twice, the fourth three times
    again = Prober(tmp_path / "part", lambda _: None)
    assert (again.known, again.yardsticks) == (prober.known, prober.yardsticks)


def test_a_relu_is_part_of_a_layer_and_another_activation_is_not() -> None:
    network = trace(build("mobilenetv2", input_shape=(3, 32, 32), classes=10).eval(), torch.zeros(2, 3, 32, 32))
    kinds = [str(operation.kind) for operation in operations(network)]
    clips = [kind for kind in kinds if kind.startswith("clip")]
    assert len(clips) == sum("hardtanh" in str(node.target) for node in network.nodes)
    assert clips[0] == "clip @32x32"


@pytest.mark.parametrize(
    ("text", "widths"),
    [
        ("conv 3x3 /2 @8x8", (8, 16)),
        ("conv 3x3 g4 @8x8", (8, 16)),
        ("transposed 2x2 /2 @8x8", (8, 16)),
        ("depthwise 3x3 @8x8", (16,)),
        ("linear @", (8, 10)),
        ("norm @8x8", (8,)),
        ("each @8x8", (8,)),
        ("handover @8x8", (8,)),
        ("clip @8x8", (8,)),
        ("add @8x8", (4, 16)),
        ("sum @8x8", (16,)),
        ("pad @8x8", (16,)),
    ],
)
def test_chains_run(text: str, widths: tuple[int, ...]) -> None:
    import onnxruntime

    kind = Kind.parse(text)
    session = onnxruntime.InferenceSession(chain(kind, widths, 3), providers=["CPUExecutionProvider"])
    value = session.get_inputs()[0]
    (output,) = session.run(None, {"input": np.zeros(value.shape, np.float32)})
    assert np.isfinite(output).all()


SMALL = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        return self.linear(self.relu(self.second(x) + x).mean((2, 3)))
"""


def small_table(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> LatencyTable:
    """Profile a small network with a residual connection, quickly, and return the table."""
    monkeypatch.setattr("bar_edge.latency_budget.operation_prices.SECONDS", 0.01)
    monkeypatch.setattr("bar_edge.latency_budget.profile_device.CHECK_S", 0.02)
    monkeypatch.setattr("bar_edge.latency_budget.profile_device.SHARES", (1.0, 0.5, 0.2))
    (folder / "small.py").write_text(SMALL)
    out = folder / "table.json"
    answer = profile(f"{folder / 'small.py'}:Net", out=out, input_shape=(3, 8, 8), **options)
    table = LatencyTable.load(out)
    assert {Kind.parse(text).op for text in table.prices} == {"conv", "handover", "add", "pad", "each", "linear"}
    assert len(table.checks) == 3 and answer["typical_error"] == table.typical_error
    assert 0 < answer["smallest_ms"] <= answer["full_ms"]
    assert (folder / "table.svg").stat().st_size and not (folder / ".table.json.part").exists()
    return table


@pytest.mark.parametrize(
    ("options", "lowerings"),
    [
        ({"threads": 2}, forms_for("onnxruntime-cpu", "fp32").candidates[:2]),
        ({"lowering": "slices"}, (Lowering.parse("slices"),)),
        ({"runtime": "openvino-cpu"}, forms_for("openvino-cpu", "fp32").candidates[:2]),
    ],
)
def test_a_table_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], lowerings: tuple[Lowering, ...]
) -> None:
    if "openvino" in str(options):
        pytest.importorskip("openvino")
    table = small_table(tmp_path, monkeypatch, **options)
    assert table.lowering in lowerings
    assert (table.environment["runtime"], table.environment["threads"]) == (
        options.get("runtime", "onnxruntime-cpu"),
        options.get("threads", 1),
    )
