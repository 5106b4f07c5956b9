"""BAR in somebody's own loop: five lines, whatever criterion, and a budget that is met."""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bar_edge.config import BarConfig, DistillConfig
from bar_edge.errors import InputError
from bar_edge.methods import BAR
from bar_edge.methods.gating.hard_concrete import probability_open
from bar_edge.models import build
from bar_edge.network import Network, count, trace
from bar_edge.records import ChannelPlan
from bar_edge.surgery import slice_network
from tests.reference import difference, hooked_counts

STEPS = 30
SHAPE = (1, 8, 8)


def model() -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return build("wrn-10-1", input_shape=SHAPE, classes=4, model_args=("width=0.5",))


def batch(step: int, n: int = 8) -> tuple[Tensor, Tensor]:
    """Images whose class is the brightest quarter."""
    generator = torch.Generator().manual_seed(step)
    targets = torch.randint(4, (n,), generator=generator)
    images = torch.randn(n, *SHAPE, generator=generator) * 0.3
    for image, target in zip(images, targets.tolist(), strict=True):
        row, column = divmod(target, 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    return images, targets


Criterion = Callable[[Any, Tensor], Tensor]


def train(
    pruner: BAR, steps: range = range(STEPS), criterion: Criterion = F.cross_entropy, optimizer: Any = None
) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.AdamW(pruner.weights())
    for step in steps:
        images, targets = batch(step)
        outputs = pruner.network(images)
        loss = pruner.loss(criterion(outputs, targets), images, outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
    return optimizer


@functools.cache
def traced_model() -> Network:
    return trace(model(), torch.zeros(1, *SHAPE))


NOISY = BarConfig(gate_optimizer="adam")


def use_up(pruner: BAR) -> None:
    """Make what is open the whole budget."""
    limit = pruner.layout.cost(pruner.layout.kept(pruner.network.gates.opened()), pruner.budget.metric)
    pruner.schedule = dataclasses.replace(pruner.schedule, limit=limit)


def pruner_for(module: nn.Module | None = None, budget: str = "4x", steps: int = STEPS, **options: Any) -> BAR:
    return BAR(module or traced_model(), torch.zeros(1, *SHAPE), budget=budget, steps=steps, **options)


@pytest.mark.parametrize("budget", ["2x", "8x", "30%", "25%:params", "6x:flops", "2000act"])
def test_five_lines_meet_the_budget(budget: str) -> None:
    module = model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    pruner = pruner_for(module, budget)
    train(pruner)
    small = pruner.slice()
    metric = pruner.budget.metric
    limit = pruner.budget.limit(count(pruner.dense).of(metric))
    counts = count(small)
    assert counts.of(metric) <= limit
    measured = hooked_counts(small.eval(), torch.zeros(1, *SHAPE))
    assert measured == (counts.volume, counts.flops, counts.params)
    assert small(torch.zeros(3, *SHAPE)).shape == (3, 4)
    # the user's module is hers
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_finish_returns_folded_network_plan_and_forced() -> None:
    pruner = pruner_for(budget="16x")
    train(pruner)
    folded, plan, facts = pruner.finish()
    opened = pruner.layout.kept(pruner.network.gates.opened())
    assert facts["forced"] == sum(len({*ids} - {*plan.kept[name]}) for name, ids in opened.items())
    assert plan.network == folded.fingerprint == pruner.dense.fingerprint
    assert count(folded, plan).volume <= count(pruner.dense).volume / 16
    again = slice_network(folded, plan).eval()
    images = batch(0)[0]
    assert torch.equal(again(images), pruner.slice().eval()(images))


def test_what_is_sliced_is_what_was_gated() -> None:
    """Nothing forced and nothing left to use: the gated network's function, fold included."""
    pruner = pruner_for(budget="99%", config=NOISY)
    train(pruner, range(5))
    with torch.no_grad():
        pruner.network.gates.log_alpha.copy_(torch.linspace(-3, 3, pruner.layout.size))
        for ids, _ in pruner.protected:
            pruner.network.gates.log_alpha[ids[0]] = 3.0
        use_up(pruner)
        pruner.network.eval().double()
        pruner.dense.eval()
        images = batch(1)[0].double()
        assert pruner.finish()[2]["forced"] == 0
        assert difference(pruner.network(images), pruner.slice().eval()(images)) < 1e-9  # float64, another order


def test_kept_gates_can_be_one() -> None:
    pruner = pruner_for(config=dataclasses.replace(NOISY, kept_gate="one"))
    train(pruner, range(3))
    folded, _, _ = pruner.finish()
    assert all(torch.equal(a, b) for a, b in zip(folded.parameters(), pruner.dense.parameters(), strict=True))
    other = pruner_for(config=NOISY)
    train(other, range(3))
    assert not all(
        torch.equal(a, b) for a, b in zip(other.finish()[0].parameters(), other.dense.parameters(), strict=True)
    )


def test_a_custom_criterion_and_structured_outputs() -> None:
    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = model(), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"logits": logits, "scale": self.scale(logits)}

    def criterion(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return F.multi_margin_loss(outputs["logits"], targets) + 0.1 * outputs["scale"].square().mean()

    pruner = pruner_for(TwoOutputs())
    train(pruner, criterion=criterion)
    small = pruner.slice().eval()
    assert set(small(batch(0)[0])) == {"logits", "scale"}
    assert count(small).volume <= count(pruner.dense).volume / 4


def test_statistics_of_a_step() -> None:
    pruner = pruner_for(config=BarConfig(gate_optimizer="adam", slack=0.01, barrier_cap=20.0))
    seen = []
    for step in range(STEPS):
        before = pruner.network.gates.opened()
        p = probability_open(pruner.network.gates.log_alpha.detach())
        train(pruner, range(step, step + 1))
        stats = pruner.stats()
        assert stats["open"] == before.sum()
        assert stats["flips"] == (before != pruner.network.gates.opened()).sum()
        assert stats["volume"] == pruner.cost.hard(before)
        assert stats["sparsity"] == pytest.approx(pruner.cost.expected(p).item(), rel=1e-6)
        low, high, volume = pruner.schedule.lower, stats["budget"], stats["volume"]
        f = 0 if volume <= low else 20 if volume >= high else (volume - low) ** 2 / ((high - volume) * (high - low))
        assert stats["barrier"] == pytest.approx(min(20, f), rel=1e-9)
        seen.append(stats)
    full = count(pruner.dense).volume
    assert seen[0]["budget"] == pytest.approx(1.01 * full) and seen[0]["volume"] == full
    assert all(a["budget"] > b["budget"] for a, b in itertools.pairwise(seen))
    assert pruner.schedule.upper(STEPS) == pytest.approx(full / 4)
    assert set(seen[0]) >= {"volume", "budget", "barrier", "sparsity", "open", "flips", "data_loss"}


def test_the_loss_is_the_papers() -> None:
    """(1 - alpha) CE + alpha T^2 soft CE + lambda L_S f, written out."""
    teacher = model().train()
    with torch.no_grad():
        for value in teacher.parameters():
            value.mul_(1.5)
    pruner = pruner_for(teacher=teacher, distill=DistillConfig(alpha=0.7, temperature=3.0), config=NOISY)
    images, targets = batch(3)
    outputs = pruner.network(images)
    data = F.cross_entropy(outputs, targets)
    loss = pruner.loss(data, images, outputs)
    with torch.no_grad():
        target = torch.softmax(teacher.eval()(images) / 3, 1)
    soft = -(target * torch.log_softmax(outputs / 3, 1)).sum(1).mean()
    stats = pruner.stats()
    barrier_term = 31.13 / count(pruner.dense).volume * stats["sparsity"] * stats["barrier"]
    assert loss.item() == pytest.approx((0.3 * data + 0.7 * 9 * soft).item() + barrier_term, rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    with_alpha_0 = pruner_for(teacher=teacher, distill=DistillConfig(alpha=0.0), config=NOISY)
    assert with_alpha_0.loss(data.detach(), images, outputs).item() == pytest.approx(
        data.item() + barrier_term, rel=1e-5
    )


def test_a_protected_channel_stays_open_at_any_pressure() -> None:
    pruner = pruner_for(budget="16x", config=NOISY)
    with torch.no_grad():
        pruner.network.gates.log_alpha.fill_(-4.0)
    train(pruner, range(1))
    use_up(pruner)
    opened = pruner.network.gates.opened()
    for ids, least in pruner.protected:
        assert opened[ids].sum() == least == 1
    assert opened.sum() == len(pruner.protected)
    assert difference(pruner.network.eval()(batch(0)[0]), pruner.slice().eval()(batch(0)[0])) < 1e-5  # float32


@pytest.mark.parametrize("config", [BarConfig(), NOISY], ids=["closing", "adam"])
def test_stop_and_go_on_bit_for_bit(tmp_path: Any, config: BarConfig) -> None:
    whole, first = (pruner_for(seed=4, config=config) for _ in range(2))
    train(whole)
    optimizer = train(first, range(STEPS // 2))
    torch.save({"pruner": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = pruner_for(seed=4, config=config)
    second.load_state_dict(state["pruner"])
    optimizer = torch.optim.AdamW(second.weights())
    optimizer.load_state_dict(state["optimizer"])
    train(second, range(STEPS // 2, STEPS), optimizer=optimizer)
    assert torch.equal(whole.network.gates.log_alpha, second.network.gates.log_alpha)
    mine, theirs = whole.dense.state_dict(), second.dense.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert whole.finish()[1] == second.finish()[1]
    other = pruner_for(seed=5, config=NOISY)
    train(other)
    assert not torch.equal(whole.network.gates.log_alpha, other.network.gates.log_alpha)


def test_a_state_is_a_snapshot() -> None:
    pruner = pruner_for()
    train(pruner, range(2))
    state = pruner.state_dict()
    kept = copy.deepcopy(state)
    train(pruner, range(2, 4))
    assert torch.equal(state["log_alpha"], kept["log_alpha"]) and state["step"] == 2
    pruner.load_state_dict(kept)
    assert pruner.network.gates.step == 2
    assert torch.equal(pruner.network.gates.log_alpha, kept["log_alpha"])


def test_gradient_accumulation() -> None:
    """Two half batches add up: one step of gates and budget, other noise for each."""
    pruner = pruner_for(config=NOISY)
    optimizer = torch.optim.SGD(pruner.weights(), 0.01)
    for step in range(4):
        for half in range(2):
            images, targets = batch(2 * step + half)
            outputs = pruner.network(images)
            (pruner.loss(F.cross_entropy(outputs, targets), images, outputs) / 2).backward()
        assert pruner.network.gates.passes == 2 and pruner.network.gates.step == step
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        assert pruner.network.gates.log_alpha.grad is None
    assert pruner.network.gates.step == 4


def test_moving_average_by_deepcopy() -> None:
    pruner = pruner_for()
    average = copy.deepcopy(pruner.network)
    train(pruner, range(4))
    with torch.no_grad():
        for mine, theirs in zip(average.parameters(), pruner.network.parameters(), strict=True):
            assert mine is not theirs and mine.data_ptr() != theirs.data_ptr()
            mine.lerp_(theirs, 0.5)
        average.eval()
        pruner.network.eval()
        images = batch(0)[0]
        assert not torch.equal(average(images), pruner.network(images))
        average.load_state_dict(pruner.network.state_dict())
        assert torch.equal(average(images), pruner.network(images))


def test_torchs_own_moving_average() -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    pruner = pruner_for()
    average = AveragedModel(pruner.network, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    train(pruner, range(2))
    average.update_parameters(pruner.network)
    assert torch.isfinite(average.eval()(batch(0)[0])).all()


def test_frozen_parameters_and_frozen_norms() -> None:
    module = model()
    module.get_parameter("conv1.weight").requires_grad_(False)
    pruner = pruner_for(module, config=NOISY)
    frozen = pruner.dense.body.get_parameter("conv1.weight")
    assert not any(p is frozen for p in pruner.weights())
    assert len(pruner.weights()) == len(list(module.parameters())) - 1
    assert not any(p is pruner.network.gates.log_alpha for p in pruner.weights())
    norms = [m for m in pruner.network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
    before = [norm.running_mean.clone() for norm in norms]  # type: ignore[union-attr]
    kept, gates = frozen.clone(), pruner.network.gates.log_alpha.clone()
    train(pruner, range(3))
    assert norms and all(torch.equal(a, n.running_mean) for a, n in zip(before, norms, strict=True))  # type: ignore[arg-type]
    assert torch.equal(kept, frozen)
    assert not torch.equal(gates, pruner.network.gates.log_alpha)


def test_scaled_losses_move_the_gates_alike() -> None:
    """A GradScaler multiplies the gates' gradient too."""
    plain, scaled = (pruner_for(seed=1, steps=1) for _ in range(2))
    for pruner, factor in ((plain, 1.0), (scaled, 1024.0)):
        images, targets = batch(0)
        outputs = pruner.network(images)
        (pruner.loss(F.cross_entropy(outputs, targets), images, outputs) * factor).backward()
        pruner.step()
    torch.testing.assert_close(plain.network.gates.log_alpha, scaled.network.gates.log_alpha)
    assert not plain.network.gates.opened().all()


def test_gradients_that_are_not_finite_move_nothing() -> None:
    pruner = pruner_for(config=dataclasses.replace(NOISY, protect_floor=-4.0))
    images, targets = batch(0)
    outputs = pruner.network(images)
    (pruner.loss(F.cross_entropy(outputs, targets), images, outputs) * float("inf")).backward()
    before = pruner.network.gates.log_alpha.clone()
    pruner.step()
    assert torch.equal(before, pruner.network.gates.log_alpha)


def test_a_network_can_be_given_instead_of_a_module() -> None:
    network = trace(model(), torch.zeros(1, *SHAPE))
    before = copy.deepcopy(network.state_dict())
    pruner = BAR(network, budget="4x", steps=5)
    train(pruner, range(5))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert isinstance(pruner.slice(), Network)
    assert isinstance(pruner.finish()[1], ChannelPlan)


def test_one_step_and_no_step() -> None:
    for steps in (1, 0):
        pruner = pruner_for(steps=max(1, steps))
        train(pruner, range(steps))
        assert count(pruner.slice()).volume <= count(pruner.dense).volume / 4


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(InputError, match="smallest|at least"):
        pruner_for(budget="5000x")
    with pytest.raises(InputError):
        pruner_for(budget="8ms")
    with pytest.raises(InputError):  # no convolution: volume 0
        BAR(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), torch.zeros(1, *SHAPE), budget="2x", steps=5)


def test_norms_without_affine_are_pruned_too() -> None:
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    pruner = pruner_for(module, budget="2x")
    train(pruner)
    assert count(pruner.slice()).volume <= count(pruner.dense).volume / 2


def test_the_cost_follows_the_budget_by_construction() -> None:
    """The barrier as a wall: after every step V <= b, and what closed costs is what count counts."""
    pruner = pruner_for(budget="8x", steps=60)
    shares = []
    for step in range(60):
        train(pruner, range(step, step + 1))
        volume = count(pruner.dense, pruner.layout.plan(pruner.network.gates.opened())).volume
        shares.append((pruner.schedule.upper(step + 1) - volume) / pruner.schedule.full)
    assert min(shares) >= 0 and max(shares) <= 0.2  # a branch of this small network is 19 % of its volume
    assert pruner.finish()[2]["forced"] == 0


def test_gates_of_a_schedule_are_whole() -> None:
    """Without noise a gate is 1 or 0 in training, and the sliced network is the gated one."""
    pruner = pruner_for(budget="4x")
    train(pruner)
    use_up(pruner)
    images = batch(0)[0]
    sliced = pruner.slice().eval()
    assert difference(pruner.network.eval()(images), sliced(images)) < 1e-5  # float32
    assert set(pruner.network.gates.values().tolist()) == {0.0, 1.0}


def test_misuse_is_said() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if self.training else self.net(x) * 2

    with pytest.warns(UserWarning, match="self.training"):
        pruner_for(Both())
    with pytest.raises(InputError, match="BAR\\(model.module"):
        pruner_for(nn.DataParallel(model()))
    with pytest.raises(InputError, match="example input"):
        BAR(model(), budget="4x", steps=5)
    with pytest.raises(InputError, match="at least 1"):
        pruner_for(steps=0)
    pruner = pruner_for()
    with pytest.raises(InputError, match="before pruner.step"):
        pruner.step()
    with pytest.raises(InputError, match="another|a run for 8x in 30 steps"):
        pruner_for(budget="8x").load_state_dict(pruner.state_dict())
    with pytest.raises(InputError, match="in 31 steps"):
        pruner_for(steps=STEPS + 1).load_state_dict(pruner.state_dict())
    with torch.no_grad():
        next(pruner.dense.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="finite weights"):
        pruner.slice()


@pytest.mark.parametrize("config", [BarConfig(), NOISY], ids=["closing", "adam"])
def test_the_gated_network_can_be_saved(tmp_path: Any, config: BarConfig) -> None:
    pruner = pruner_for(config=config)
    train(pruner, range(STEPS))
    torch.save(pruner.network, tmp_path / "gated.pt")
    again = torch.load(tmp_path / "gated.pt", weights_only=False)
    images = batch(0)[0]
    for training in (True, False):
        mine, theirs = (network.train(training)(images) for network in (pruner.network, again))
        assert torch.equal(mine, theirs)
    assert torch.equal(pruner.network.gates.log_alpha, again.gates.log_alpha)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of what the graph breaks at
@pytest.mark.parametrize("config", [BarConfig(), NOISY], ids=["closing", "adam"])
def test_compiled_once(config: BarConfig) -> None:
    """What changes every step is no reason to compile again."""
    torch._dynamo.reset()
    pruner = pruner_for(config=config)
    compiled = torch.compile(pruner.network, backend="eager")
    for step in range(6):
        images, targets = batch(step)
        outputs = compiled(images)
        pruner.loss(F.cross_entropy(outputs, targets), images, outputs).backward()
        pruner.step()
        if step == 1:
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
