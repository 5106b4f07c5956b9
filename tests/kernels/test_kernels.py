"""gather_conv_scatter_add against its definition written out, channel by channel."""

import pytest
import torch
from torch import Tensor

from bar_edge_kernels import gather, gather_conv_scatter_add, scatter_add


def by_hand(
    stream: Tensor, weight: Tensor, bias: Tensor | None, index_in: Tensor, index_out: Tensor, padding: int
) -> Tensor:
    """Return stream + P_out^T (W * P_in stream + b), as one matrix product over unfolded patches.

    P_in and P_out are 0/1 selection matrices: no gather, no convolution, no scatter.
    """
    n, c, h, w = stream.shape
    k = weight.shape[-1]
    select_in = torch.eye(c, dtype=stream.dtype)[index_in]
    select_out = torch.eye(c, dtype=stream.dtype)[index_out]
    wide = torch.einsum("oikl,ic,os->sckl", weight, select_in, select_out)
    padded = torch.zeros(n, c, h + 2 * padding, w + 2 * padding, dtype=stream.dtype)
    padded[:, :, padding : padding + h, padding : padding + w] = stream
    patches = padded.unfold(2, k, 1).unfold(3, k, 1)  # n, c, h, w, k, k
    delta = torch.einsum("nchwkl,sckl->nshw", patches, wide)
    if bias is not None:
        delta = delta + (bias @ select_out).view(1, c, 1, 1)
    return stream + delta


CASES = {
    "some of each": ([4, 0, 5], [2, 6], 3),
    "all": (list(range(7)), list(range(7)), 1),
    "disjoint, in another order": ([6, 1], [5, 0, 3], 3),
    "one": ([3], [3], 5),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_against_the_matrix_form(name: str, with_bias: bool) -> None:
    index_in, index_out, k = CASES[name]
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(2, 7, 5, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(len(index_out), len(index_in), k, k, generator=generator, dtype=torch.float64)
    bias = torch.randn(len(index_out), generator=generator, dtype=torch.float64) if with_bias else None
    before = stream.clone()
    ids_in, ids_out = torch.tensor(index_in), torch.tensor(index_out)
    answer = gather_conv_scatter_add(stream, weight, bias, ids_in, ids_out, padding=k // 2)
    # float64 sums in another order
    torch.testing.assert_close(answer, by_hand(stream, weight, bias, ids_in, ids_out, k // 2), rtol=1e-12, atol=1e-12)
    untouched = [i for i in range(7) if i not in index_out]
    assert torch.equal(answer[:, untouched], before[:, untouched])
    assert torch.equal(stream, before), "the stream is not written to"


def test_gradients() -> None:
    stream = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    ids_in, ids_out = torch.tensor([0, 3, 1]), torch.tensor([3, 2])
    assert torch.autograd.gradcheck(
        lambda s, w, b: gather_conv_scatter_add(s, w, b, ids_in, ids_out, padding=1), (stream, weight, bias)
    )


def test_gather_and_scatter_add() -> None:
    stream = torch.arange(12.0).view(1, 4, 3)
    assert gather(stream, torch.tensor([3, 1])).tolist() == [[[9, 10, 11], [3, 4, 5]]]
    total = scatter_add(stream, torch.tensor([2, 0]), torch.ones(1, 2, 3))
    assert total.tolist() == [[[1, 2, 3], [3, 4, 5], [7, 8, 9], [9, 10, 11]]]
