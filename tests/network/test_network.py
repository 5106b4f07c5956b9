"""Tracing, saving and loading: equal bit for bit, trainable, and nothing runs that a file says."""

import copy
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bar_edge.errors import InputError
from bar_edge.methods import GateLayout
from bar_edge.models import build
from bar_edge.network import Network, count, layers, prunable, trace
from bar_edge.records import ChannelPlan
from bar_edge.surgery import slice_network
from tests.reference import hooked_counts, randomise


class Net(nn.Module):
    """A function of one tensor and the parts given by name."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(inputs: int = 3, outputs: int = 4, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, k, padding=k // 2, **options)


def images(n: int = 3, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def leaves(value: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


def same(module: nn.Module, x: Tensor | None = None) -> Network:
    """Trace in eval mode and require the same answers, bit for bit, at two batch sizes."""
    x = images() if x is None else x
    randomise(module).eval()
    network = trace(module, x)
    with torch.no_grad():
        for batch in (x, x[:1]):
            wanted, got = module(batch.clone()), network(batch.clone())
            assert torch.utils._pytree.tree_structure(wanted) == torch.utils._pytree.tree_structure(got)
            assert all(torch.equal(a, b) for a, b in zip(leaves(wanted), leaves(got), strict=True))
    return network


# ---------------------------------------------------------------------------------------- tracing


def test_the_users_module_is_untouched() -> None:
    module = build("resnet20", input_shape=(3, 8, 8), classes=10, model_args=("width=0.25",)).train()
    module.layer1.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    network = trace(module, images())
    with torch.no_grad():
        for value in network.parameters():
            value.add_(1)
    network.train()(images())
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_parameters_have_the_users_names() -> None:
    module = build("wrn-10-1", input_shape=(3, 8, 8), classes=10)
    network = trace(module, images())
    assert network.body.state_dict().keys() == module.state_dict().keys()
    assert network.training and not trace(module.eval(), images()).training


def test_training_is_the_same_training() -> None:
    module = nn.Sequential(
        conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 3)
    )
    randomise(module).train()
    network = trace(module, images())
    for batch in (images(4), images(2)):
        for net in (module, network):
            net(batch).square().sum().backward()
    theirs, ours = dict(module.named_parameters()), dict(network.body.named_parameters())
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert value.grad is not None and torch.equal(value.grad, ours[name].grad), name
    for name, value in module.named_buffers():
        assert torch.equal(value, network.body.get_buffer(name)), name


def test_statistics_go_on_where_they_were() -> None:
    """momentum=None is a plain mean over all batches so far: their number belongs to the statistics."""
    module = nn.Sequential(conv(), nn.BatchNorm2d(4, momentum=None)).train()
    for seed in range(5):
        module(torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
    network = trace(module, images())
    module(images())
    network(images())
    assert torch.equal(module[1].running_mean, network.body.get_buffer("1.running_mean"))
    assert torch.equal(module[1].running_var, network.body.get_buffer("1.running_var"))


def test_norm_without_affine_or_statistics() -> None:
    same(nn.Sequential(conv(), nn.BatchNorm2d(4, affine=False), nn.ReLU()))
    with pytest.raises(InputError, match="aten.batch_norm.default over the batch at '1'"):
        trace(nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)), images())


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_dropout_drops_in_training_only(kind: type[nn.Module]) -> None:
    module = nn.Sequential(conv(), kind(0.5))
    network = same(module)
    assert (network(images()) == 0).sum() == 0
    torch.manual_seed(0)
    dropped = (network.train()(images()) == 0).float().mean()
    assert 0.1 < dropped < 0.9


def test_functional_dropout_follows_the_mode() -> None:
    network = same(Net(lambda s, x: F.dropout(s.c(x), 0.5, s.training), c=conv()))
    assert 0.1 < (network.train()(images()) == 0).float().mean() < 0.9


IN_PLACE: dict[str, Callable[[Any, Tensor], Any]] = {
    "relu": lambda s, x: F.relu_(s.c(x)),
    "returned and kept": lambda s, x: (lambda h: (lambda y: h + y)(h.relu_()))(s.c(x)),
    "a chain on one tensor": lambda s, x: (lambda h: (F.relu_(h).add_(1), h * 2)[1])(s.c(x)),
    "add to a name": lambda s, x: (lambda h, y: (h.add_(y), h * y)[1])(s.c(x), s.d(x)),
    "hardtanh, dropout": lambda s, x: F.dropout(F.hardtanh_(s.c(x), 0, 6), 0.1, s.training, True),
    "on a slice": lambda s, x: (lambda h: (h[:, :2].relu_(), h)[1])(s.c(x)),
    "seen through a view": lambda s, x: (lambda h: (lambda v: (h.relu_(), v)[1])(h.flatten(1)))(s.c(x)),
    "a view written to": lambda s, x: (lambda h: (h.flatten(1).mul_(2), h)[1])(s.c(x)),
    "an item set": lambda s, x: (lambda h: (h.__setitem__((slice(None), 0), 0), h)[1])(s.c(x)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operators(name: str) -> None:
    """The same answers; or a refusal: never another answer in silence."""
    try:
        same(Net(IN_PLACE[name], c=conv(), d=conv()))
    except InputError:
        assert name in ("on a slice", "seen through a view", "a view written to", "an item set")


def test_the_input_is_not_written_to() -> None:
    network = trace(Net(lambda s, x: s.c(x.relu_()), c=conv()).eval(), images())
    x = images()
    network(x)
    assert torch.equal(x, images())


SHARED: dict[str, Callable[[], nn.Module]] = {
    "one module twice": lambda: Net(lambda s, x: s.c(F.relu(s.c(x))), c=conv(3, 3)),
    "one module under two names": lambda: (lambda c: Net(lambda s, x: s.e(F.relu(s.c(x))), c=c, e=c))(conv(3, 3)),
    "one weight, two biases": lambda: tie(Net(lambda s, x: s.e(F.relu(s.c(x))), c=conv(3, 3), e=conv(3, 3))),
    "one weight, two strides": lambda: Net(
        lambda s, x: F.conv2d(F.conv2d(x, s.w, stride=2), s.w), w=nn.Parameter(torch.randn(3, 3, 2, 2))
    ),
    "one matrix, two functions": lambda: Net(
        lambda s, x: F.linear(x.mean((2, 3)), s.w, s.b) + F.linear(x.amax((2, 3)), s.w, s.d),
        w=nn.Parameter(torch.randn(4, 3)), b=nn.Parameter(torch.randn(4)), d=nn.Parameter(torch.randn(4)),
    ),
    "a weight that is also read": lambda: Net(
        lambda s, x: F.linear(x.mean((2, 3)), s.weight) * s.weight.sum(), weight=nn.Parameter(torch.randn(4, 3))
    ),
    "a module's weight that is also read": lambda: Net(lambda s, x: s.c(x) * s.c.weight.mean(), c=conv()),
}  # fmt: skip


def tie(net: Any) -> nn.Module:
    net.e.weight = net.c.weight
    return net


@pytest.mark.parametrize("name", SHARED)
def test_shared_weights(name: str, tmp_path: Path) -> None:
    module = SHARED[name]()
    network = same(module)
    computed = "also read" in name  # its mean is a parameter of its own from the trace on
    assert len(list(network.parameters())) == len(list(module.parameters())) + computed
    assert bool(network.notes) == computed
    network.save(tmp_path / "n")
    loaded = Network.load(tmp_path / "n")
    # still shared after loading: it trains alike
    assert len(list(loaded.parameters())) == len(list(network.parameters()))
    assert torch.equal(network(images()), loaded.eval()(images()))


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = conv(3, 4), conv(1, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        z = self.c(x) + self.d(y)
        return {"sum": z, "both": (z.relu(), [z.mean((2, 3))])}


def test_several_inputs_and_structured_outputs(tmp_path: Path) -> None:
    module = randomise(Several()).eval()
    x, y = images(), images(channels=1)
    network = trace(module, (x, y))
    assert network.input_shapes == ((3, 8, 8), (1, 8, 8))
    network.save(tmp_path / "n")
    for net in (network, Network.load(tmp_path / "n").eval(), slice_network(network, plan(network, {}))):
        wanted, got = module(x, y), net(x, y)
        assert set(got) == {"sum", "both"} and isinstance(got["both"], tuple) and isinstance(got["both"][1], list)
        assert all(torch.equal(a, b) for a, b in zip(leaves(wanted), leaves(got), strict=True))


OPERATORS: dict[str, Callable[[], nn.Module]] = {
    "transposed": lambda: nn.Sequential(conv(), nn.ConvTranspose2d(4, 6, 2, 2), conv(6, 2)),
    "computed weight": lambda: Net(
        lambda s, x: F.conv2d(s.c(x), s.w / s.w.norm()), c=conv(), w=nn.Parameter(torch.randn(5, 4, 3, 3))
    ),
    "raw parameter": lambda: Net(lambda s, x: s.c(x) * s.g, c=conv(), g=nn.Parameter(torch.randn(1, 4, 1, 1))),
    "reflect": lambda: nn.Sequential(conv(padding_mode="reflect"), conv(4, 4)),
    "same, even kernel": lambda: nn.Sequential(nn.Conv2d(3, 4, 2, padding="same"), nn.ReLU()),
    "grouped, dilated": lambda: nn.Sequential(conv(3, 8), nn.Conv2d(8, 8, 3, groups=4, dilation=2, padding=2)),
    "prelu, group norm": lambda: nn.Sequential(conv(), nn.PReLU(4), nn.GroupNorm(2, 4)),
    "layer norm": lambda: Net(lambda s, x: s.n(s.c(x).permute(0, 2, 3, 1)), c=conv(), n=nn.LayerNorm(4)),
    "attention": lambda: Net(
        lambda s, x: torch.softmax(s.c(x).flatten(2), -1) @ s.d(x).flatten(2).transpose(1, 2), c=conv(), d=conv()
    ),
    "casts": lambda: Net(lambda s, x: s.c(x).float().to(torch.float32), c=conv()),
    "zeros made inside": lambda: Net(lambda s, x: torch.cat([s.c(x), torch.zeros(x.shape[0], 2, 8, 8)], 1), c=conv()),
    "padded channels": lambda: Net(lambda s, x: F.pad(s.c(x), (0, 0, 0, 0, 1, 3)), c=conv()),
    "view by size": lambda: Net(lambda s, x: s.c(x).view(x.size(0), -1, x.size(2) // 2, 16), c=conv()),
    "chunks": lambda: Net(lambda s, x: torch.cat(s.c(x).chunk(2, 1)[::-1], 1), c=conv()),
    "interpolate": lambda: Net(lambda s, x: F.interpolate(s.c(x), scale_factor=2.0, mode="bilinear"), c=conv()),
    "names of our own": lambda: Net(lambda s, x: s.add_tensor(x) + s.relu(x), add_tensor=conv(), relu=conv()),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_trace_save_load_and_slice(name: str, tmp_path: Path) -> None:
    module = OPERATORS[name]()
    network = same(module)
    network.save(tmp_path / "n")
    loaded = Network.load(tmp_path / "n").eval()
    assert torch.equal(loaded(images()), network(images()))
    assert loaded.fingerprint == network.fingerprint
    assert torch.equal(slice_network(network, plan(network, {}))(images()), network(images()))
    assert count(network).params == sum(p.numel() for p in module.parameters())


def plan(network: Network, kept: dict[str, tuple[int, ...]]) -> ChannelPlan:
    return ChannelPlan(network=network.fingerprint, kept=kept)


def test_control_flow_on_data_is_refused() -> None:
    module = Net(lambda s, x: s.c(x) if x.sum() > 0 else x, c=conv(3, 3))
    with pytest.raises(InputError, match="control flow"):
        trace(module, images())
    assert module.training


def test_a_fixed_batch_is_refused() -> None:
    with pytest.raises(InputError, match="batch"):
        trace(Net(lambda s, x: s.c(x).view(2, 256), c=conv()), images(2))


MIXING: dict[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    "a mean over the batch": ("mean.dim", lambda s, x: s.c(x) - s.c(x).mean(0, keepdim=True)),
    "every image with every other": ("matmul", lambda s, x: s.c(x).flatten(1) @ s.c(x).flatten(1).t()),
    "images weighted by each other": ("matmul", lambda s, x: (x.flatten(1) @ x.flatten(1).t()) @ s.c(x).flatten(1)),
    "the batch among the features": ("reshape", lambda s, x: s.c(x).mean((2, 3)).t().reshape(-1, 4)),
    "a batch's own statistics": ("batch_norm", lambda s, x: F.batch_norm(s.c(x), None, None, training=True)),
    "against the first image": ("sub", lambda s, x: s.c(x) - s.c(x)[:1]),
    "of the input": ("add", lambda s, x: s.c(x + x[:1])),
}


@pytest.mark.parametrize("name", MIXING)
def test_an_answer_that_depends_on_other_images_is_refused(name: str) -> None:
    operator_name, forward = MIXING[name]
    with pytest.raises(InputError, match=rf"aten\.{operator_name}.* over the batch at test_network\.py:\d+: "):
        trace(Net(forward, c=conv(3, 4)), images())


def test_noise_and_attention_leave_the_images_of_a_batch_alone() -> None:
    module = Net(
        lambda s, x: s.m(*3 * [F.dropout(s.c(x)).flatten(2).mT])[0],
        c=conv(3, 4),
        m=nn.MultiheadAttention(4, 2, batch_first=True),
    )
    assert trace(module.eval(), images()).shapes


def test_a_forward_with_any_number_of_inputs() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = conv()

        def forward(self, *xs: Tensor) -> Tensor:
            return self.c(xs[0])

    module = Many().eval()
    assert torch.equal(trace(module, images())(images()), module(images()))


def test_a_forward_with_inputs_that_nobody_gives() -> None:
    class More(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = conv()

        def forward(self, x: Tensor, y: Tensor | None = None, *others: Tensor, scale: float = 2.0) -> Tensor:
            return self.c(x if y is None else x + y) * scale

    module = More().eval()
    assert torch.equal(trace(module, images())(images()), module(images()))
    assert torch.equal(trace(module, (images(), images()))(images(), images()), module(images(), images()))


def test_a_network_is_a_module_like_any_other() -> None:
    network = trace(nn.Sequential(conv(), nn.ReLU()).eval(), images())
    again = copy.deepcopy(network)
    assert again.fingerprint == network.fingerprint
    assert torch.equal(again(images()), network(images()))
    assert not set(map(id, again.parameters())) & set(map(id, network.parameters()))
    torch.testing.assert_close(again.double()(images().double()).float(), network(images()))


def test_fingerprint_is_of_the_graph_not_of_the_weights() -> None:
    first, second, third = (trace(nn.Sequential(conv(3, n), nn.ReLU()), images()) for n in (4, 4, 5))
    assert not torch.equal(first.body.get_parameter("0.weight"), second.body.get_parameter("0.weight"))
    assert first.fingerprint == second.fingerprint != third.fingerprint
    assert first.fingerprint != trace(nn.Sequential(conv(3, 4), nn.ReLU()), images(size=10)).fingerprint


# --------------------------------------------------------------------------- what can be pruned


def test_the_networks_output_is_never_pruned() -> None:
    ends: dict[str, Callable[[Any, Tensor], Any]] = {
        "itself": lambda s, x: s.b(F.relu(s.a(x))),
        "pooled": lambda s, x: s.b(F.relu(s.a(x))).mean((2, 3)),
        "log-softmax": lambda s, x: torch.log_softmax(s.b(F.relu(s.a(x))).mean((2, 3)), 1),
        "upsampled": lambda s, x: F.interpolate(s.b(F.relu(s.a(x))), scale_factor=2),
        "scaled": lambda s, x: s.b(F.relu(s.a(x))) / 2,
    }
    for name, end in ends.items():
        reasons = prunable(trace(Net(end, a=conv(3, 8), b=conv(8, 5)), images()))
        assert reasons["a"] == "", name
        assert reasons["b"] != "", f"{name}: the classes themselves would be pruned"


def test_reasons_are_given() -> None:
    module = nn.Sequential(conv(3, 8), conv(8, 8, groups=8), conv(8, 8, groups=2), conv(8, 4))
    listed = {row.name: row for row in layers(trace(module, images()))}
    assert "depthwise" in listed["1"].reason and "output" in listed["3"].reason
    assert [listed[n].reason == "" for n in "0123"] == [listed[n].gated for n in "0123"] == [True, False, True, False]


def test_transposed_convolutions_are_counted() -> None:
    module = OPERATORS["transposed"]()
    counts = count(trace(module, images()))
    # 4 -> 6 channels, 2x2 kernel, stride 2: each of 8x8 inputs meets 4 taps; 16x16 outputs
    transposed_volume, transposed_flops = 6 * 256, 2 * 4 * 6 * 4 * 64
    volume, flops, _ = hooked_counts(module, images(1))
    assert counts.volume == volume + transposed_volume
    assert counts.flops == flops + transposed_flops


# ---------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_saved_and_loaded_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    module = randomise(build("wrn-10-1", input_shape=(3, 8, 8), classes=4).to(dtype).eval())
    with torch.no_grad():
        for value in module.parameters():
            value.mul_(1 + 1e-9)  # float64 has digits that float32 lacks
    network = trace(module, images().to(dtype))
    network.save(tmp_path / "n")
    loaded = Network.load(tmp_path / "n")
    mine, theirs = network.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
    loaded.train()(images().to(dtype)).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_a_sliced_network_is_saved_and_loaded(tmp_path: Path) -> None:
    module = randomise(build("wrn-10-1", input_shape=(3, 8, 8), classes=4).eval())
    network = trace(module, images())
    kept = {name: tuple(range(1, n, 2)) for name, (_, n) in GateLayout(network).offsets.items()}
    kept["stages.0.0.conv2"] = (0, 2, 3)
    sliced = slice_network(network, plan(network, kept))
    sliced.save(tmp_path / "n")
    loaded = Network.load(tmp_path / "n").eval()
    assert torch.equal(loaded(images()), sliced(images())) and loaded.fingerprint == sliced.fingerprint


def test_no_pickle_and_no_leftovers(tmp_path: Path) -> None:
    folder = tmp_path / "n"
    saved(folder)
    saved(folder)  # over an earlier one
    assert sorted(p.name for p in folder.iterdir()) == ["network.json", "weights.safetensors"]
    assert not any(zipfile.is_zipfile(p) for p in folder.iterdir())
    json.loads((folder / "network.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def saved(folder: Path) -> dict[str, Any]:
    module = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    trace(module.eval(), images()).save(folder)
    data: dict[str, Any] = json.loads((folder / "network.json").read_text())
    return data


def function(data: dict[str, Any], part: str = "relu") -> dict[str, Any]:
    return next(n for n in data["nodes"] if n["op"] == "call_function" and part in n["target"])


EVIL = "__import__('os').environ.__setitem__('BAR_EDGE_PWNED','1')"


def rename_module(data: dict[str, Any], name: str) -> None:
    next(n for n in data["nodes"] if n["target"] == "0")["target"] = name
    data["modules"][name] = data["modules"].pop("0")


def default_dict(module: str) -> str:
    leaf = {"type": None, "context": None, "children_spec": []}
    context = json.dumps({"default_factory_module": module, "default_factory_name": "path", "dict_context": ["a"]})
    return json.dumps([1, {"type": "collections.defaultdict", "context": context, "children_spec": [leaf]}])


def deep(n: int) -> list[Any]:
    return [] if n == 0 else [deep(n - 1)]


FOREIGN: dict[str, Callable[[dict[str, Any]], object]] = {
    "a placeholder that is code": lambda d: d["nodes"][0].update(target=f"x_={EVIL}"),
    "a placeholder that is two lines": lambda d: d["nodes"][0].update(target=f"x):\n    {EVIL}\ndef f(self, x"),
    "a module name that is code": lambda d: rename_module(d, f'0", None) or {EVIL} or getattr(self, "0'),
    "a keyword that is code": lambda d: function(d).update(kwargs={"dict": {f"a={EVIL}, b": 1}}),
    "a node name that is code": lambda d: d["nodes"][1].update(name=f"a; {EVIL}"),
    "an output structure that imports": lambda d: d.update(out_spec=default_dict("os")),
    "an output structure that is none": lambda d: d.update(out_spec="garbage"),
    "an output structure of two": lambda d: d.update(out_spec=torch.utils._pytree.treespec_dumps(
        torch.utils._pytree.tree_structure((0, 0)))),
    "an operator that writes": lambda d: function(d).update(target="aten.relu_.default"),
    "an operator that writes into out": lambda d: function(d).update(target="aten.add.out"),
    "an operator that opens files": lambda d: function(d).update(target="aten.from_file.default"),
    "another namespace": lambda d: function(d).update(target="prims.add.default"),
    "a Python function": lambda d: function(d).update(target="operator.attrgetter"),
    "a builtin": lambda d: function(d).update(target="builtins.eval.default"),
    "an unknown operator": lambda d: function(d).update(target="aten.nope.default"),
    "an attribute of the namespace": lambda d: function(d).update(target="aten.__class__.mro"),
    "no operator": lambda d: function(d).update(target="x"),
    "a method call": lambda d: d["nodes"][1].update(op="call_method", target="relu"),
    "an unknown module": lambda d: d["modules"]["0"].update(type="Sequential"),
    "a module with foreign settings": lambda d: d["modules"]["0"].update(device="meta"),
    "no groups": lambda d: d["modules"]["0"].update(groups=0),
    "an impossible addition": lambda d: d["modules"].update({"0": {
        "type": "MixedAdd", "width": 3, "positions_a": [0], "positions_b": [1]}}),
    "a dtype that is a module": lambda d: d["tensors"].update(
        x={"shape": [1], "dtype": "torch.ops", "parameter": False}),
    "a constant that is a module": lambda d: function(d).update(args=[{"torch": "ops"}]),
    "an unknown constant": lambda d: function(d).update(args=[{"code": "1"}]),
    "an axis out of range": lambda d: function(d, "flatten")["args"].__setitem__(1, 9),
    "no output": lambda d: d["nodes"].pop(),
    "no nodes": lambda d: d.update(nodes=None),
    "an output of nothing": lambda d: d["nodes"][-1].update(args=[[{"node": "nope"}]]),
    "a node before its input": lambda d: d["nodes"].insert(0, d["nodes"].pop(3)),
    "another format": lambda d: d.update(format=2),
    "no input shapes": lambda d: d.pop("input_shapes"),
    "a wrong input shape": lambda d: d.update(input_shapes=[[3, 8]]),
    "no arguments": lambda d: d["nodes"][1].pop("args"),
    "a deep list": lambda d: d["nodes"][-1].update(args=deep(500)),
    "other widths": lambda d: d["modules"]["0"].update(out_channels=5),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_data_is_refused_and_never_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(tmp_path / "n")
    FOREIGN[name](data)
    (tmp_path / "n" / "network.json").write_text(json.dumps(data))
    monkeypatch.delenv("BAR_EDGE_PWNED", raising=False)
    try:
        with pytest.raises(InputError):
            Network.load(tmp_path / "n")
    finally:
        ran = os.environ.pop("BAR_EDGE_PWNED", None)
    assert ran is None, "the file's text was executed"


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_output_structure_cannot_import(wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own reader of structures imports the module that a defaultdict names."""
    data = saved(tmp_path / "n")
    leaf = {"type": None, "context": None, "children_spec": []}
    context = {"default_factory_module": "bar_edge_evil", "default_factory_name": "f", "dict_context": '["a"]'}
    spec = {"type": "collections.defaultdict", "context": json.dumps(context) if wrapped else context}
    data["out_spec"] = json.dumps([1, spec | {"children_spec": [leaf]}])
    (tmp_path / "n" / "network.json").write_text(json.dumps(data))
    (tmp_path / "bar_edge_evil.py").write_text("import os\nos.environ['BAR_EDGE_PWNED'] = '1'\nf = dict\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("BAR_EDGE_PWNED", raising=False)
    try:
        with pytest.raises(InputError):
            Network.load(tmp_path / "n")(images())
    finally:
        ran = os.environ.pop("BAR_EDGE_PWNED", None)
    assert ran is None, "the file made us import a module"


@pytest.mark.parametrize("damage", ["absent", "cut", "text", "lacks", "more", "shape"])
def test_damaged_weights_are_refused(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path / "n")
    file = tmp_path / "n" / "weights.safetensors"
    tensors = load_file(file)
    if damage == "absent":
        file.unlink()
    elif damage in ("cut", "text"):
        file.write_bytes(file.read_bytes()[:-7] if damage == "cut" else b"weights")
    else:
        name = next(iter(tensors))
        tensors |= {"extra": torch.zeros(1)} if damage == "more" else {name: torch.zeros(1, 2, 3)}
        save_file({n: t for n, t in tensors.items() if damage != "lacks" or n != name}, file)
    with pytest.raises(InputError):
        Network.load(tmp_path / "n")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="network.json"):
        Network.load(tmp_path / "nowhere")
