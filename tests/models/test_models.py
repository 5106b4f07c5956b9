"""The zoo against the counts of the paper, and every form of a model SPEC."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from bar_edge.errors import EnvironmentLacks, InputError
from bar_edge.models import ZOO, build

Shape = tuple[int, int, int]
CIFAR: Shape = (3, 32, 32)
DIGITS: Shape = (1, 8, 8)


def counted(network: nn.Module, input_shape: Shape) -> tuple[int, int]:
    """Return activations and FLOPs of all convolutions for one image, measured by hooks."""
    volume = flops = 0

    def hook(module: nn.Conv2d, _inputs: object, output: torch.Tensor) -> None:
        nonlocal volume, flops
        maps = output[0].numel()
        volume += maps
        flops += 2 * maps * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(hook)
    with torch.no_grad():
        network.eval()(torch.zeros(1, *input_shape))
    return volume, flops


@pytest.mark.parametrize(
    ("name", "shape", "volume"),
    [
        ("resnet20", CIFAR, 200_704),
        ("resnet50", (3, 128, 128), 3_629_056),
        # methods.md 1.11: V = 16 384 + 688 128 n + 344 064 for wrn-(6n+4)-12
        ("wrn-10-12", CIFAR, 16_384 + 688_128 + 344_064),
        ("wrn-28-12", CIFAR, 3_112_960),
    ],
)
def test_volume_is_the_papers(name: str, shape: Shape, volume: int) -> None:
    assert counted(build(name, input_shape=shape, classes=10), shape)[0] == volume


def test_wrn_28_12_flops_and_uniform_width() -> None:
    full = counted(build("wrn-28-12", input_shape=CIFAR, classes=10), CIFAR)
    small = counted(build("wrn-28-12", input_shape=CIFAR, classes=10, model_args=("width=0.0625",)), CIFAR)
    assert full[1] == 15_087_796_224
    assert full[0] == 16 * small[0]
    # printed with three decimals
    assert full[1] / small[1] == pytest.approx(255.775, abs=5e-4)


@pytest.mark.parametrize("shape", [CIFAR, DIGITS])
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("resnet110", "wrn-28-12")] + ["wrn-10-2", "wrn-16-1"])
def test_forward_and_backward(name: str, shape: Shape) -> None:
    network = build(name, input_shape=shape, classes=7, model_args=("width=0.25",))
    outputs = network(torch.randn(2, *shape))
    outputs.square().sum().backward()
    assert outputs.shape == (2, 7)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    # the totals that torchvision documents for 1000 classes
    [("resnet18", 11_689_512), ("resnet50", 25_557_032), ("mobilenetv2", 3_504_872), ("vgg16", 138_365_992)],
)
def test_imagenet_form_has_torchvisions_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        network = build(name, input_shape=(3, 224, 224), classes=1000)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_resnet_names_are_torchvisions() -> None:
    names = set(build("resnet50", input_shape=(3, 224, 224), classes=10).state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.0.weight", "layer1.0.downsample.1.bias",
            "layer4.2.conv3.weight", "layer4.2.bn3.weight", "fc.bias"} <= names  # fmt: skip
    # 53 convolutions, as many BatchNorms with 5 tensors each, one linear layer
    assert len(names) == 53 + 5 * 53 + 2


def test_wrn_shares_the_first_activation_with_the_shortcut() -> None:
    block = build("wrn-10-1", input_shape=DIGITS, classes=10).get_submodule("stages.1.0").eval()
    x = torch.randn(2, 16, 8, 8)
    seen = {}
    for name in ("conv1", "shortcut"):
        block.get_submodule(name).register_forward_hook(
            lambda _m, inputs, _o, name=name: seen.update({name: inputs[0]})
        )
    block(x)
    assert torch.equal(seen["conv1"], seen["shortcut"])
    assert torch.equal(seen["conv1"], torch.relu(block.get_submodule("bn1")(x)))


def test_width_rounds_and_never_reaches_zero() -> None:
    network = build("resnet20", input_shape=CIFAR, classes=10, model_args=("width=0.01",))
    assert {m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)} == {1}
    network = build("resnet20", input_shape=CIFAR, classes=10, model_args=("width=0.35",))
    assert network.get_parameter("conv1.weight").shape[0] == 6


def test_initialisation_is_he_fan_out() -> None:
    torch.manual_seed(0)
    weight = build("wrn-10-4", input_shape=CIFAR, classes=10).get_parameter("stages.2.0.conv2.weight")
    # 590,000 normal samples: the relative error of their deviation is about 1e-3
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("spec", ["resnet21", "wrn-28", "", "vgg"])
def test_unknown_name_lists_what_is_known(spec: str) -> None:
    with pytest.raises(InputError, match="wrn-D-K") as caught:
        build(spec, input_shape=CIFAR, classes=10)
    assert "vgg16" in caught.value.required
    assert caught.value.remedy.split()[-1] in ZOO


def test_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(InputError, match="closest name: mobilenetv2"):
        build("mobilnet_v2", input_shape=CIFAR, classes=10)


@pytest.mark.parametrize("argument", ["width=0", "width=-1", "width=true", "width=wide", "depth=3", "width", "=3"])
def test_bad_zoo_arguments(argument: str) -> None:
    with pytest.raises(InputError, match="width"):
        build("resnet20", input_shape=CIFAR, classes=10, model_args=(argument,))


@pytest.mark.parametrize("name", ["wrn-11-2", "wrn-4-2", "wrn-10-0"])
def test_impossible_wrn(name: str) -> None:
    with pytest.raises(InputError, match=r"6n\+4"):
        build(name, input_shape=CIFAR, classes=10)


FACTORIES = """
    from torch import nn
    received = {}
    def plain(hidden=3, **rest):
        received.update(hidden=hidden, **rest)
        return nn.Linear(1, hidden)
    def offered(num_classes, input_shape, hidden=3):
        received.update(num_classes=num_classes, input_shape=input_shape, hidden=hidden)
        return nn.Linear(1, num_classes)
    def needs(missing):
        return nn.Linear(1, 1)
    def broken():
        raise RuntimeError("out of weights")
    def nothing():
        return 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factories_of_a_user.py").write_text(textwrap.dedent(FACTORIES), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("module", ["factories_of_a_user", "factories_of_a_user.py"])
def test_factory_gets_only_what_it_names(factories: Path, module: str) -> None:
    arguments = ("hidden=5", "rate=.5", "deep=True", "kind=a=b")
    network = build(f"{module}:plain", input_shape=CIFAR, classes=10, model_args=arguments)
    name = "bar_edge_user_factories_of_a_user" if module.endswith(".py") else module
    received = vars(sys.modules[name])["received"]
    assert isinstance(network, nn.Linear)
    assert received == {"hidden": 5, "rate": 0.5, "deep": True, "kind": "a=b"}
    received.clear()
    build(f"{module}:offered", input_shape=CIFAR, classes=10, model_args=("num_classes=4",))
    assert received == {"num_classes": 4, "input_shape": CIFAR, "hidden": 3}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("factories_of_a_user:needs", "missing"),
        ("factories_of_a_user:broken", "out of weights"),
        ("factories_of_a_user:nothing", "a int"),
        ("factories_of_a_user:absent", "plain"),
        ("no_such_module:factory", "no_such_module"),
        ("no_such_file.py:factory", "no_such_file"),
    ],
)
def test_bad_factories(factories: Path, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(spec, input_shape=CIFAR, classes=10)


def test_absent_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, extra in (("transformers", "hf"), ("timm", "timm")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(EnvironmentLacks, match=rf'pip install "bar-edge\[{extra}\]"'):
            build(f"{extra}:anything", input_shape=CIFAR, classes=10)


def test_hugging_face_folder_gives_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    saved = transformers.ResNetForImageClassification(config)
    saved.save_pretrained(tmp_path)
    network = build(f"hf:{tmp_path}", input_shape=CIFAR, classes=5).eval()
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    name = "model.resnet.embedder.embedder.convolution.weight"
    assert torch.equal(network.state_dict()[name], saved.state_dict()[name.removeprefix("model.")])
    with pytest.raises(InputError, match="hf:"):
        build(f"hf:{tmp_path / 'absent'}", input_shape=CIFAR, classes=5)
