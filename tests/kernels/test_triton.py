"""The Triton kernels: equal to the definition under the interpreter, without spills on every architecture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bar_edge_kernels import mixed_convolution
from bar_edge_kernels.operator import How, MixedConvolution

triton = pytest.importorskip("triton", reason="the extra [kernels] is not installed")

from bar_edge_kernels.ahead import ARCHITECTURES, compile_convolution, compile_stage  # noqa: E402
from bar_edge_kernels.convolution import DEFAULTS, candidate_blocks, default_blocks  # noqa: E402
from bar_edge_kernels.stage import Stage, Step  # noqa: E402
from bar_edge_kernels.tile import ELEMENTS  # noqa: E402

#: type -> largest difference allowed, of the largest value: a rounding of inputs, sum and output each
ALLOWED = {"torch.float32": 2e-6, "torch.float16": 3e-3, "torch.bfloat16": 2e-2, "stage": 2e-6}


def interpreted(number: int, seed: int) -> dict[str, float]:
    """The largest difference of each kind, from a process in which Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).with_name("interpreted.py")), str(number), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout)
    return found


def check_equal(found: dict[str, float]) -> None:
    assert found.keys() == ALLOWED.keys()
    assert all(difference <= ALLOWED[kind] for kind, difference in found.items()), found


def test_kernels_equal_the_definition() -> None:
    check_equal(interpreted(40, 0))


@pytest.mark.slow
def test_kernels_equal_the_definition_on_500_shapes() -> None:
    check_equal(interpreted(500, 1))


@pytest.mark.parametrize("element", ELEMENTS)
def test_narrow_layers_compile_for_orin_without_spills(element: str) -> None:
    made = compile_convolution(87, element, DEFAULTS[0])
    assert made.spill_bytes == 0 and 0 < made.registers <= 255 and "sm_87" in made.ptx


@pytest.mark.slow
def test_every_default_compiles_without_spills() -> None:
    for architecture in ARCHITECTURES:
        for element in ELEMENTS:
            made = [compile_convolution(architecture, element, blocks) for blocks in DEFAULTS]
            made.append(compile_stage(architecture, element, DEFAULTS[0]))
            assert [one.spill_bytes for one in made] == [0] * len(made), made


def test_the_search_is_bounded() -> None:
    for n_in, n_out in ((1, 1), (12, 40), (300, 500)):
        candidates = candidate_blocks(n_in, n_out)
        assert candidates[0] == default_blocks(n_out) and len(set(candidates)) == len(candidates) <= 13


def module(**how: object) -> MixedConvolution:
    torch.manual_seed(0)
    made = How(bias=torch.randn(3), affine=torch.randn(2, 2), padding=1, relu_in=True, **how)  # type: ignore[arg-type]
    return MixedConvolution(torch.randn(3, 2, 3, 3), torch.tensor([4, 0]), torch.tensor([1, 2, 3]), made)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = module(relu_out=True)

    def forward(self, stream: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.convolution(stream.clone(), x)
        return out * 2


def test_the_operator_is_the_definition_and_can_be_exported() -> None:
    block, stream, x = Block(), torch.randn(2, 5, 4, 4), torch.randn(2, 6, 4, 4)
    c = block.convolution
    weight = c.weight.permute(3, 2, 0, 1)
    wanted = 2 * mixed_convolution(
        stream,
        x,
        weight,
        c.bias,
        c.index_in,
        c.index_out,
        padding=1,
        affine=c.affine,
        relu_in=True,
        relu_out=True,
    )
    with torch.inference_mode():
        torch.testing.assert_close(block(stream, x), wanted)
    with torch.no_grad():
        exported = torch.export.export(block, (stream, x))
        torch.testing.assert_close(exported.module()(stream, x), wanted)
    assert "mixed_convolution_" in str(exported.graph)


def test_what_the_operator_refuses() -> None:
    with pytest.raises(ValueError, match="inference only"):
        module()(torch.randn(1, 5, 4, 4), torch.randn(1, 6, 4, 4, requires_grad=True))
    with pytest.raises(ValueError, match="a channel is written twice"):
        MixedConvolution(torch.randn(2, 1, 1, 1), torch.tensor([0]), torch.tensor([1, 1]), How())
    with pytest.raises(ValueError, match="2 x 2 channels for a weight of"):
        MixedConvolution(torch.randn(2, 1, 1, 1), torch.tensor([0, 1]), torch.tensor([1, 2]), How())
    with pytest.raises(ValueError, match="reads the tensor that it writes"):
        Stage([Step(convolution=module(), source=0, target=0)])
    with pytest.raises(ValueError, match="keeps height and width"):
        Stage([Step(convolution=module(stride=2), source=0, target=1)])
    with pytest.raises(ValueError, match="at least one step"):
        Stage([])
