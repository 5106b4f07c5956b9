"""Every number of the methods sheet, section 1: gates, barrier, budget, distillation, the paper's networks."""

import math

import pytest
import torch
from torch import Tensor, nn

from bar_edge.config import BarConfig, DistillConfig
from bar_edge.methods import BAR, GateLayout, smallest_cost
from bar_edge.methods.bar.barrier import BudgetSchedule, barrier, transition
from bar_edge.methods.distillation import distillation_loss, soft_cross_entropy
from bar_edge.methods.gating import hard_concrete as hc
from bar_edge.methods.gating.gate_cost import GateCost
from bar_edge.models import build
from bar_edge.network import Network, count, trace
from tests.reference import hooked_counts

CIFAR = (3, 32, 32)
V_F = 3_112_960  # WRN-28-12 at 32x32


def float64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# ------------------------------------------------------------------------------------- 1.2 the gate

#: log alpha, P(z > 0), P(z = 1), deterministic gate, gate at u = 1/2, E[z]
TABLE = [
    (-5.0, 0.032252, 0.001360, 0.0, 0.0, 0.0089),
    (-3.0, 0.197594, 0.009966, 0.0, 0.0, 0.0604),
    (-2.3978952728, 0.310176, 0.018048, 0.0, 0.0, 0.1027),
    (-2.0, 0.400975, 0.026633, 0.043044, 0.0, 0.1426),
    (-1.5985968485, 0.500000, 0.039271, 0.101814, 0.0, 0.1943),
    (-1.0, 0.645335, 0.069229, 0.222730, 0.118911, 0.2929),
    (0.0, 0.831822, 0.168178, 0.5, 0.5, 0.5),
    (0.005, 0.832520, 0.168878, 0.501500, 0.502250, 0.5011),
    (1.0, 0.930771, 0.354665, 0.777270, 0.881089, 0.7070),
    (2.3978952728, 0.981952, 0.689824, 1.0, 1.0, 0.8973),
    (5.0, 0.998640, 0.967748, 1.0, 1.0, 0.9911),
]


@pytest.mark.parametrize(("a", "p_open", "p_one", "louizos", "median", "mean"), TABLE)
def test_table_of_the_gate(a: float, p_open: float, p_one: float, louizos: float, median: float, mean: float) -> None:
    log_alpha, printed = float64(a), 1e-6  # one unit of the sixth decimal: the sheet cuts some and rounds others
    assert hc.probability_open(log_alpha).item() == pytest.approx(p_open, abs=printed)
    assert hc.deterministic(log_alpha, "louizos").item() == pytest.approx(louizos, abs=printed)
    assert hc.deterministic(log_alpha, "median").item() == pytest.approx(median, abs=printed)
    # midpoint rule over the noise: frequencies are exact to one of n cells, the mean to far below that
    n = 400_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    z = hc.sample(log_alpha.expand(n), u)
    assert ((z >= 0) & (z <= 1)).all()
    assert (z > 0).double().mean().item() == pytest.approx(p_open, abs=1 / n + printed)
    assert (z == 1).double().mean().item() == pytest.approx(p_one, abs=1 / n + printed)
    assert z.mean().item() == pytest.approx(mean, abs=1e-4)  # one unit of the fourth decimal


@pytest.mark.parametrize(("u", "a", "z"), [(0.3, 0.5, 0.347157042858), (0.05, -1.0, 0.0), (0.9, 1.0, 1.0)])
def test_samples(u: float, a: float, z: float) -> None:
    assert hc.sample(float64(a), float64(u)).item() == pytest.approx(z, abs=1e-12)


def test_shift_and_thresholds() -> None:
    assert pytest.approx(1.5985968485, abs=5.1e-11) == hc.OPEN_SHIFT
    assert hc.THRESHOLD["louizos"] == pytest.approx(-2.3978952728, abs=5.1e-11)
    assert hc.THRESHOLD["median"] == pytest.approx(-1.5985968485, abs=5.1e-11)


@pytest.mark.parametrize("decision", ["louizos", "median"])
def test_open_is_where_the_deterministic_gate_is_above_zero(decision: hc.GateDecision) -> None:
    edge = hc.THRESHOLD[decision]
    near = torch.tensor([-8, edge - 1e-6, edge + 1e-6, 0, 8], dtype=torch.float64)
    assert hc.is_open(near, decision).tolist() == [False, False, True, True, True]
    assert (hc.deterministic(near, decision) > 0).tolist() == hc.is_open(near, decision).tolist()


@pytest.mark.parametrize("a", [-2.0, 0.0, 1.5])
def test_frequency_of_open_gates(a: float) -> None:
    n = 200_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    p = hc.probability_open(float64(a)).item()
    opened = (hc.sample(float64(a).expand(n), u) > 0).double().mean().item()
    assert opened == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))  # four standard deviations


def test_symmetry() -> None:
    u = torch.rand(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a = torch.linspace(-6, 6, 1000, dtype=torch.float64)
    torch.testing.assert_close(hc.sample(-a, u), 1 - hc.sample(a, 1 - u), rtol=0, atol=1e-12)


def test_gradient_of_a_sample() -> None:
    a = torch.linspace(-4, 4, 81, dtype=torch.float64, requires_grad=True)
    u = torch.full_like(a, 0.4).detach()
    hc.sample(a, u).sum().backward()
    s = torch.sigmoid((math.log(0.4) - math.log(0.6) + a.detach()) * 1.5)
    stretched = s * 1.2 - 0.1
    expected = torch.where((stretched > 0) & (stretched < 1), 1.2 * s * (1 - s) * 1.5, 0.0)
    assert a.grad is not None
    torch.testing.assert_close(a.grad, expected, rtol=1e-9, atol=0)
    assert (expected == 0).any() and (expected > 0).any()


def test_noise_at_its_ends_is_finite() -> None:
    a = torch.zeros(2, requires_grad=True)
    z = hc.sample(a, torch.tensor([0.0, 1.0]))
    z.sum().backward()
    assert z.tolist() == [0.0, 1.0] and a.grad is not None and a.grad.isfinite().all()


# ----------------------------------------------------------------------- 1.5 barrier, 1.6 transition


@pytest.mark.parametrize(
    ("cost", "low", "high", "f"),
    [(0.5, 0, 1, 0.5), (0.9, 0, 1, 8.1), (0.99, 0, 1, 98.01), (1.5, 1, 2, 0.5), (1, 1, 2, 0), (0.2, 1, 2, 0)],
)
def test_barrier(cost: float, low: float, high: float, f: float) -> None:
    assert barrier(cost, low, high) == pytest.approx(f, rel=1e-12)


def test_barrier_at_and_above_the_budget() -> None:
    assert barrier(2, 1, 2) == math.inf and barrier(3, 1, 2) == math.inf
    assert barrier(2, 1, 2, cap=20) == 20 == barrier(1.9999999, 1, 2, cap=20)


@pytest.mark.parametrize("wanted", [0.1, 1.0, 20.0, 1e4])
def test_barrier_inverse(wanted: float) -> None:
    c = (-wanted + math.sqrt(wanted**2 + 4 * wanted)) / 2
    assert barrier(c, 0, 1) == pytest.approx(wanted, rel=1e-6)
    assert wanted != 1.0 or c == pytest.approx(0.618034, abs=5e-7)


def test_barrier_starts_flat() -> None:
    assert barrier(1e-6, 0, 1) == pytest.approx(1e-12, rel=1e-5)


@pytest.mark.parametrize(
    ("t", "value"),
    [(0, 0), (0.1, 0.01144658), (0.2, 0.04128566), (0.25, 0.07010372), (0.3, 0.11403653), (0.4, 0.26580658), (0.5, 0.5),
     (0.75, 0.92989628), (0.9, 0.98855342), (0.99, 0.99929183), (1, 1)],
)  # fmt: skip
def test_transition(t: float, value: float) -> None:
    assert transition(t) == pytest.approx(value, abs=5.1e-9)
    assert transition(1 - t) == pytest.approx(1 - value, abs=5.1e-9)


def test_transition_slope_and_limits() -> None:
    assert transition(1e-7) / 1e-7 == pytest.approx(0.06738253, rel=1e-6)
    for t in (0.1, 0.37, 0.9):
        assert transition(t, "sigmoid", 0) == t == transition(t, "linear")
        assert transition(t, "sigmoid", 1e-4) == pytest.approx(t, abs=1e-6)
    assert transition(0.49, steepness=500) < 1e-2 and transition(0.51, steepness=500) > 1 - 1e-2


def test_exponential_transition_is_fast_first() -> None:
    values = [transition(t / 20, "exponential") for t in range(21)]
    assert values[0] == 0 and values[-1] == pytest.approx(1, abs=1e-15)
    steps = [b - a for a, b in zip(values, values[1:], strict=False)]
    assert all(a > b > 0 for a, b in zip(steps, steps[1:], strict=False))


@pytest.mark.parametrize(
    ("k", "low", "uppers", "fs"),
    [
        (2, 1_556_168.704, (3_003_844.97, 2_334_720, 1_665_595.03), (3.026905, 1.634547, 0)),
        (16, 194_248.704, (2_908_369.31, 1_653_760, 399_150.69), (7.439261, 6.938721, 3.328250)),
    ],
)
def test_budget_of_wrn_28_12(
    k: int, low: float, uppers: tuple[float, float, float], fs: tuple[float, float, float]
) -> None:
    schedule = BudgetSchedule(full=V_F, limit=V_F / k, steps=1000, slack=0)
    assert schedule.lower == pytest.approx(low, abs=1e-6)
    assert schedule.upper(0) == V_F and schedule.upper(1000) == pytest.approx(V_F / k, abs=1e-6)
    for t, upper, f in zip((250, 500, 750), uppers, fs, strict=True):
        b = schedule.upper(t)
        assert b == pytest.approx(upper, abs=0.0051)  # printed with two decimals
        assert barrier(0.9 * b, schedule.lower, b) == pytest.approx(f, abs=5.1e-7)


def test_slack_makes_the_first_step_finite() -> None:
    schedule = BudgetSchedule(full=V_F, limit=V_F / 2, steps=1000, slack=0.01)
    assert schedule.upper(0) == pytest.approx(1.01 * V_F, rel=1e-12)
    # the sheet's margin is 1 % wider, hence three digits
    assert barrier(V_F, schedule.lower, schedule.upper(0)) == pytest.approx(49.03, rel=1e-3)
    assert schedule.upper(137) > V_F > schedule.upper(140)  # used up at t = 0.138


# ----------------------------------------------------------------------------- 1.8 distillation, 1.9


def test_distillation_vector() -> None:
    student = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    data = nn.functional.cross_entropy(student, torch.tensor([0]))
    assert data.item() == pytest.approx(0.1698460196, abs=5.1e-11)
    assert soft_cross_entropy(student, teacher, 4.0).item() / 16 == pytest.approx(1.1219700995, abs=5.1e-11)
    loss = distillation_loss(data, student, teacher, DistillConfig(alpha=0.9, temperature=4.0))
    assert loss.item() == pytest.approx(16.1733540340, abs=5.1e-10)
    # the KL form is lower by alpha T^2 times the teacher's entropy
    target = torch.softmax(teacher / 4, 1)
    entropy = -(target * target.log()).sum()
    assert (loss - 0.9 * 16 * entropy).item() == pytest.approx(0.4473195515, abs=5.1e-10)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = torch.tensor([[0.42054394, -0.23378189, -0.18676205]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=5.1e-9)


def test_distillation_is_a_mean_over_the_batch() -> None:
    student, teacher = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[1.0, 1.0, 0.0]])
    one_by_one = torch.stack([soft_cross_entropy(s[None], teacher, 4.0) for s in student]).mean()
    torch.testing.assert_close(soft_cross_entropy(student, teacher.expand(5, 3), 4.0), one_by_one)


# ------------------------------------------------------------------------------ 1.12 the paper's nets


def traced(name: str, shape: tuple[int, int, int], *arguments: str) -> Network:
    """Trace on the meta device: no memory, no arithmetic."""
    with torch.device("meta"):
        module = build(name, input_shape=shape, classes=10, model_args=arguments).eval()
        return trace(module, torch.empty(2, *shape))


def hooked(name: str, shape: tuple[int, int, int], *arguments: str) -> tuple[int, int, int]:
    with torch.device("meta"):
        module = build(name, input_shape=shape, classes=10, model_args=arguments).eval()
        return hooked_counts(module, torch.empty(1, *shape))


@pytest.fixture(scope="module")
def wrn() -> Network:
    return traced("wrn-28-12", CIFAR)


@pytest.fixture(scope="module")
def resnet50() -> Network:
    return traced("resnet50", (3, 128, 128))


def test_wrn_28_12(wrn: Network) -> None:
    assert (count(wrn).volume, count(wrn).flops) == (V_F, 15_087_796_224)
    layout = GateLayout(wrn)
    assert layout.size == 12_112
    # one stem map and one in each 1x1 shortcut: 1024 + 1024 + 256 + 64
    assert smallest_cost(layout, "volume") == 2368


def test_sparsity_loss_of_wrn_28_12_at_the_start(wrn: Network) -> None:
    layout = GateLayout(wrn)
    cost = GateCost(layout, "volume")
    assert cost.full == V_F
    sparsity = cost.expected(hc.probability_open(torch.full((layout.size,), 0.005, dtype=torch.float64))).item()
    assert sparsity == pytest.approx(2.5916e6, rel=5e-6)
    assert 1e-5 * sparsity == pytest.approx(25.9, abs=0.05)
    assert 1e-5 * cost.full == pytest.approx(31.13, abs=0.005)
    # lambda_F = lambda V_F / F keeps the term comparable
    assert 31.13 / GateCost(layout, "flops").full == pytest.approx(2.06e-9, abs=0.005e-9)


def test_push_per_gate(wrn: Network) -> None:
    """1.9: lambda f A p (1 - p) at p = .83 is 1.4e-3, 3.6e-4 and 9.0e-5 for A = 1024, 256 and 64."""
    layout = GateLayout(wrn)
    a = torch.zeros(layout.size, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(1e-5 * GateCost(layout, "volume").expected(hc.probability_open(a)), a)
    p = 0.831822
    for name, area in (("conv1", 1024), ("stages.1.0.conv1", 256), ("stages.2.3.conv2", 64)):
        first, n = layout.offsets[name]
        # p is printed with six decimals
        torch.testing.assert_close(
            gradient[first : first + n], torch.full((n,), 1e-5 * area * p * (1 - p)).double(), rtol=1e-5, atol=0
        )


def test_resnet50_at_128(resnet50: Network) -> None:
    assert count(resnet50).volume == 3_629_056
    assert count(resnet50).flops == pytest.approx(2.66915e9, rel=2e-6)
    assert GateLayout(resnet50).size == 26_560
    assert 1e-5 * GateCost(GateLayout(resnet50), "volume").full == pytest.approx(36.29, abs=0.005)


@pytest.mark.parametrize(
    ("name", "shape", "volume", "flops"),
    [
        ("wrn-16-12", CIFAR, 1_736_704, 6.934e9),
        ("wrn-22-12", CIFAR, 2_424_832, 1.1011e10),
        ("wrn-28-12", CIFAR, 3_112_960, 1.50878e10),
        ("wrn-34-12", CIFAR, 3_801_088, 1.9165e10),
        ("wrn-40-12", CIFAR, 4_489_216, 2.3242e10),
        ("wrn-28-10", CIFAR, 2_596_864, 1.0487e10),
        ("resnet50", (3, 224, 224), 11_113_984, 8.17427e9),
    ],
)
def test_other_rows(name: str, shape: tuple[int, int, int], volume: int, flops: float) -> None:
    measured = hooked(name, shape)
    assert measured[0] == volume
    assert measured[1] == pytest.approx(flops, rel=1e-4)  # printed with four or more digits


@pytest.mark.parametrize("name", ["resnet20", "wrn-16-12"])
def test_counts_are_those_of_the_modules_hooks(name: str) -> None:
    counts = count(traced(name, CIFAR))
    assert (counts.volume, counts.flops, counts.params) == hooked(name, CIFAR)
    assert name != "resnet20" or counts.volume == 200_704


@pytest.mark.parametrize(("halvings", "factor"), [(1, "3.9998"), (2, "15.997"), (3, "63.974"), (4, "255.775")])
def test_uniform_scaling(halvings: int, factor: str) -> None:
    volume, flops, _ = hooked("wrn-28-12", CIFAR, f"width={0.5**halvings}")
    assert volume * 2**halvings == V_F
    digits = len(factor.partition(".")[2])
    assert f"{15_087_796_224 / flops:.{digits}f}" == factor


def test_lambda_is_the_share_of_the_full_cost() -> None:
    """31.13 of the full cost for any network and metric, or lambda as printed."""
    small = build("wrn-10-1", input_shape=(3, 8, 8), classes=10)
    for budget, metric in (("4x", "volume"), ("4x:flops", "flops"), ("50%:params", "params")):
        config = BarConfig(gate_optimizer="adam")
        pruner = BAR(small, torch.zeros(1, 3, 8, 8), budget=budget, steps=10, config=config)
        outputs = pruner.network(torch.zeros(2, 3, 8, 8))
        zero = outputs.sum() * 0
        loss = pruner.loss(zero, torch.zeros(2, 3, 8, 8), outputs)
        stats = pruner.stats()
        full = count(pruner.dense).of(metric)
        assert stats["volume"] == full and stats["barrier"] > 0
        assert loss.item() == pytest.approx(31.13 / full * stats["barrier"] * stats["sparsity"], rel=1e-5)
