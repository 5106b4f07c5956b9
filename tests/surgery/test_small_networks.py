"""Networks whose slices once came out wrong: found by reading and by random networks, shrunken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bar_edge.methods import GateLayout
from bar_edge.network import MixedAdd, Network, count, trace
from bar_edge.network.leaves import PartialNorm
from bar_edge.records import ChannelPlan
from bar_edge.surgery import masked_outputs, relative_difference, slice_network
from tests.meaning import masked_answer
from tests.reference import contrasting, randomise
from tests.small import Net, check, conv, traced


def test_a_factor_without_channels_is_needed() -> None:
    body = lambda s, x: s.h(s.a(x) * torch.softmax(s.k(x), 1))  # noqa: E731
    for kept in ({}, {"a": (1, 3)}):
        check(Net(body, a=conv(3, 6), k=conv(3, 6), h=conv(6, 2)), kept)


def test_one_module_in_two_streams_has_one_order() -> None:
    body = lambda s, x: torch.cat([s.h(s.s(x)), s.h2(s.o(x) + s.s(2 * x))], 1)  # noqa: E731
    module = Net(body, s=conv(3, 8), o=conv(3, 8), h=conv(8, 2), h2=conv(8, 2))
    check(module, {"o": (5, 6), "s": (1, 5)})


def test_a_branch_that_ends_with_a_sigmoid_is_not_filled_with_zeros() -> None:
    def body(s: Any, x: Tensor) -> Tensor:
        y = F.relu(s.c(x))
        return s.h(y + torch.sigmoid(s.e(y)))

    check(Net(body, c=conv(3, 8), e=conv(8, 8), h=conv(8, 2)), {"c": (0, 1, 2, 5), "e": (2, 3)})


def test_a_stream_times_a_parameter() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.e, self.h = conv(3, 8), conv(8, 8), conv(8, 2)
            self.g = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.c(x))
            return self.h((y + self.e(y)) * self.g)

    check(Scaled(), {"c": (0, 1, 5), "e": (2, 3, 5)})


def test_a_tensor_added_to_itself_in_another_order() -> None:
    def body(s: Any, x: Tensor) -> Tensor:
        p, q = s.p(x), s.q(x)
        return s.h(torch.cat([p, q], 1) + torch.cat([q, p], 1))

    sliced = check(Net(body, p=conv(3, 4), q=conv(3, 4), h=conv(8, 2)), {"q": ()})
    assert count(sliced).volume == 64 * (4 + 2)


def test_mixed_dtypes_add_as_torch_adds_them() -> None:
    a, b = torch.rand(1, 2, 2, 2).bfloat16(), torch.rand(1, 2, 2, 2)
    assert MixedAdd(3, (0, 1), (1, 2))(a, b).dtype == torch.float32


@pytest.mark.parametrize(
    "function",
    [
        lambda y: F.adaptive_max_pool2d(y, 1),
        lambda y: F.adaptive_max_pool2d(y, 3),
        lambda y: F.max_pool2d(y, 2, return_indices=True)[0],
        lambda y: y.max(-1)[0].max(dim=2, keepdim=True).values.unsqueeze(3),
        lambda y: y.min(dim=-1, keepdim=True).values,
    ],
)
def test_largest_values_with_their_indices(function: Callable[[Tensor], Tensor]) -> None:
    body = lambda s, x: s.h(torch.cos(function(s.a(x))))  # noqa: E731
    sliced = check(Net(body, a=conv(3, 6), h=conv(6, 2, 1)), {"a": (0, 3)})
    layer = sliced.body.get_submodule("h")
    assert isinstance(layer, nn.Conv2d) and layer.in_channels == 2


def test_indices_that_are_read_need_the_whole_map() -> None:
    def body(s: Any, x: Tensor) -> Tensor:
        values, indices = F.max_pool2d(s.a(x), 2, return_indices=True)
        return s.h(F.max_unpool2d(values, indices, 2))

    check(Net(body, a=conv(3, 6), h=conv(6, 2, 1)), {"a": (0, 3)})


def test_zeros_behind_a_merged_batch_have_its_length() -> None:
    class Video(nn.Module):
        """Frames of a video as images: the first axis is batch * frames."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.h = conv(3, 4), conv(3, 4), conv(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            frames = x.flatten(0, 1)
            joined = torch.cat([self.a(frames), self.b(frames).softmax(1)], 1)
            return self.h(joined).unflatten(0, (x.shape[0], 3)).mean(1)

    torch.manual_seed(0)
    module, images = randomise(Video().double().eval(), seed=1), contrasting(4, 3, 3, 6, 6)
    network = trace(module, images)
    sliced = slice_network(network, ChannelPlan(network=network.fingerprint, kept={"b": ()}))
    expected = masked_answer(module, {"b": ()}, images)
    for n in (1, 4):
        assert relative_difference(expected[:n], sliced(images[:n])) < 1e-9


def test_names_of_new_parts_are_free() -> None:
    class Named(nn.Module):
        """A user who calls things as surgery does, for the sliced network and for one that is sliced again."""

        channels: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.c, self.e, self.h, self.add = conv(3, 8), conv(8, 8), conv(8, 2), conv(3, 2)
            self.register_buffer("channels", torch.rand(2, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.c(x)
            z = F.relu(y + self.e(y))
            return self.h(z[:, [7, 1, 3, 0, 2, 4, 6, 5]].softmax(1)) * self.channels + self.add(x)

    module, network, images = traced(Named())
    kept = {"c": (0, 1, 5, 6), "e": (2, 5, 7)}
    sliced = slice_network(network, ChannelPlan(network=network.fingerprint, kept=kept))
    assert relative_difference(masked_answer(module, kept, images), sliced(images)) < 1e-9
    again = ChannelPlan(network=sliced.fingerprint, kept={"c": (0, 3), "e": (1,)})
    twice = slice_network(sliced, again)
    assert relative_difference(masked_outputs(sliced, again, images), twice(images)) < 1e-9
    assert torch.equal(twice.body.get_buffer("channels"), module.channels)


@pytest.mark.parametrize("kind", ["groups", "last"])
def test_norms_of_what_is_left_do_not_overflow_in_half_precision(kind: str) -> None:
    x = torch.full((2, 4, 64, 64), 300.0) * torch.rand(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    axis, membership = (1, (0, 0, 1, 1)) if kind == "groups" else (-1, (0, 0, 0, 0))
    norm = PartialNorm(axis, 3 if kind == "groups" else 64, membership, 1e-5, True)
    x = x if kind == "groups" else x.movedim(1, -1).repeat_interleave(4, -1)[..., :4] * 100
    expected = norm(x)
    for got in (norm.half()(x.half()), norm.bfloat16()(x.bfloat16())):
        assert got.dtype == x.to(got.dtype).dtype and got.isfinite().all()
        torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(norm.float()(x.half()).float(), expected, rtol=0.01, atol=0.01)


def test_a_layer_norm_without_bias_gets_none(tmp_path: Path) -> None:
    body = lambda s, x: s.h(s.n(s.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))  # noqa: E731
    sliced = check(Net(body, a=conv(3, 6), n=nn.LayerNorm(6, bias=False), h=conv(6, 2)), {"a": (1, 2, 5)})
    assert "body.n.bias" not in dict(sliced.named_parameters())
    assert sum(p.numel() for p in sliced.parameters()) == count(sliced).params
    sliced.save(tmp_path / "n")
    images = contrasting(2, 3, 8, 8)
    assert torch.equal(Network.load(tmp_path / "n").eval()(images), sliced(images))


def up_by_views(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return y.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


def down_by_views(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return y.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


@pytest.mark.parametrize(("function", "width"), [(up_by_views, 2), (down_by_views, 32)])
def test_a_pixel_shuffle_of_views_has_its_rule(function: Callable[[Tensor], Tensor], width: int) -> None:
    body = lambda s, x: s.h(torch.cos(function(s.a(x))))  # noqa: E731
    sliced = check(Net(body, a=conv(3, 8), h=conv(width, 2)), {"a": (1, 4, 6)})
    assert not any(passage.kind == "opaque" for passage in GateLayout(sliced).found.values())
    assert sum("pixel" in str(node.target) for node in sliced.nodes) == 1


def test_views_in_another_order_are_no_pixel_shuffle() -> None:
    """Depth to space with the block first, as TensorFlow has it: filled up with zeros, still exact."""

    def blocks_first(y: Tensor) -> Tensor:
        n, c, h, w = y.shape
        return y.view(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * h, 2 * w)

    sliced = check(Net(lambda s, x: s.h(blocks_first(s.a(x))), a=conv(3, 8), h=conv(2, 2)), {"a": (1, 4, 6)})
    assert not any("pixel" in str(node.target) for node in sliced.nodes)


def test_a_pixel_shuffle_into_one_channel() -> None:
    body = lambda s, x: s.h(torch.cos(up_by_views(s.a(x))))  # noqa: E731
    check(Net(body, a=conv(3, 4), h=conv(1, 2)), {"a": (0, 3)})
    check(Net(body, a=conv(3, 4), h=conv(1, 2)), {"a": ()})


def test_a_layer_that_is_called_twice_keeps_what_either_call_needs() -> None:
    body = lambda s, x: s.h(s.a(torch.sigmoid(s.a(x))[:, 1:4])[:, 2:])  # noqa: E731
    sliced = check(Net(body, a=conv(3, 6), h=conv(4, 2)), {"a": (0, 1, 3, 5)})
    layer = sliced.body.get_submodule("a")
    assert isinstance(layer, nn.Conv2d) and layer.out_channels == 3  # 1 and 3 first, 3 and 5 then


def test_a_view_of_a_norm_of_an_expanded_tensor() -> None:
    """Seed 1183 of the random networks, shrunken."""
    body = lambda s, x: s.h(s.n(s.a(x).mean(-1, keepdim=True).expand(-1, -1, -1, 8)).view(-1, 4, 64).mean(-1))  # noqa: E731
    check(Net(body, a=conv(3, 4), n=nn.BatchNorm2d(4), h=nn.Linear(4, 2)), {"a": (0, 2)})


def test_a_pixel_shuffle_there_and_back() -> None:
    """Seed 1650 of the random networks, shrunken: each channel comes back as itself, a group without any is dead."""
    body = lambda s, x: s.h(s.g(F.pixel_unshuffle(F.pixel_shuffle(s.a(x), 2), 2)))  # noqa: E731
    check(Net(body, a=conv(3, 4), g=conv(4, 6, groups=2), h=conv(6, 2)), {"a": (0,), "g": (1, 4)})
