"""Narrow layers made wide: blocks of neighbouring pixels become channels, which runtimes compute together."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from bar_edge.network import Network
from bar_edge.network.channels import ELEMENTWISE, called_again
from bar_edge.network.rewriter import Rewriter
from bar_edge.records.lowering import PLAIN, Packing

aten = torch.ops.aten
#: operators whose third argument says which channels they mean
_INDEXED = {aten.index_select.default, aten.index_add.default}
#: operators of two tensors, element by element
_BINARY = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


def pack(network: Network, packings: Mapping[tuple[int, ...], Packing]) -> Network:
    """Return an equal network whose tensors of the given sizes of image (H, W) hold blocks of pixels as channels.

    With a packing of (h, w) a tensor (N, C, H, W) becomes (N, C * h * w, H / h, W / w), as by pixel_unshuffle: one of
    few channels then fills a vector, for h * w times as many multiplications per convolution, most of them by zero.
    Only between convolutions that can: nothing is moved for it. The others stay as they are. The network is used up.
    """
    found = packable(network, packings)
    return _Packer(network, found).run() if found else network


def packable(network: Network, packings: Mapping[tuple[int, ...], Packing]) -> dict[fx.Node, Packing]:
    """Return the packings of as many tensors as possible, such that whatever makes or reads one can."""
    found: dict[fx.Node, Packing] = {}
    for node in network.nodes:
        *_, height, width = (1, 1, *network.shapes.get(node.name, ()))
        h, w = packings.get((height, width), PLAIN)
        if node.op in ("call_function", "call_module") and height % h == width % w == 0 and (h, w) != PLAIN:
            found[node] = (h, w)
    again, done = called_again(network), False
    while not done:
        done = True
        for node in network.nodes:
            around = [n for n in (node, *_tensors(node)) if n in found]
            if around and not _can(network, node, found, again):
                done = False
                for n in around:
                    del found[n]
    return found


def _can(network: Network, node: fx.Node, found: Mapping[fx.Node, Packing], again: set[str]) -> bool:
    """Tell whether a node has a form for the packings of what it reads and makes, one of which is packed."""
    module, sources, target = network.module_of(node), _tensors(node), node.target
    out, into = found.get(node, PLAIN), [found.get(source, PLAIN) for source in sources]
    if isinstance(module, nn.Conv2d):
        steps = [stride * o % i for stride, o, i in zip(module.stride, out, into[0], strict=True)]
        plain = module.padding_mode == "zeros" and isinstance(module.padding, tuple) and str(target) not in again
        return plain and not any(steps)
    if {*into} != {out}:
        return False
    if module is not None:
        return isinstance(module, nn.BatchNorm2d | nn.Dropout) and str(target) not in again
    if target in ELEMENTWISE or target in _BINARY:
        return len({network.shapes[source.name] for source in sources}) == 1
    if target is aten.constant_pad_nd.default:
        pads = node.args[1]
        return isinstance(pads, list | tuple) and len(pads) == 6 and not any(pads[:4])
    along = node.args[1:2] == (1,) and not node.kwargs  # the second axis
    if target is aten.slice.Tensor:
        return along and len(node.args) == 4 and all(isinstance(i, int) and i >= 0 for i in node.args[2:])
    return along and (target is aten.cat.default or target in _INDEXED)


def _tensors(node: fx.Node) -> list[fx.Node]:
    """Return what a node computes with, without the constant that says which channels are meant."""
    index = node.args[2] if node.target in _INDEXED else None
    return [n for n in node.all_input_nodes if n is not index or n.op != "get_attr"]


class _Packer(Rewriter):
    def __init__(self, network: Network, found: Mapping[fx.Node, Packing]) -> None:
        super().__init__(network, use_up=True)
        self.found = found

    def run(self) -> Network:
        for node in self.network.nodes:
            module = self.network.module_of(node)
            packed = node in self.found or any(source in self.found for source in node.all_input_nodes)
            if packed and isinstance(module, nn.Conv2d):
                self.made[node] = self._convolution(node, module)
            elif packed and isinstance(module, nn.BatchNorm2d):
                self.attach(str(node.target), _norm(module, math.prod(self.found[node])))
                self.copy(node)
            elif packed and node.op == "call_function":
                self.made[node] = self._function(node, math.prod(self.found[node]))
            else:
                self.copy(node)
        return self.finish()

    def _convolution(self, node: fx.Node, module: nn.Conv2d) -> fx.Node:
        (source,) = node.all_input_nodes
        into, out = self.found.get(source, PLAIN), self.found.get(node, PLAIN)
        pixels = [self.network.shapes[n.name][2:] for n in (source, node)]
        new, (top, bottom, left, right) = _packed(module, into, out, *pixels)
        x = self.made[source]
        if (top, left) == (bottom, right):
            new.padding = (top, left)
        else:
            x = self.graph.call_function(aten.constant_pad_nd.default, (x, [left, right, top, bottom]))
        return self.apply(str(node.target), new, x)

    def _function(self, node: fx.Node, k: int) -> fx.Node:
        """Copy a function; channel i has become the channels i * k to i * k + k - 1."""
        assert callable(node.target)
        args, made = list[Any](node.args), dict(self.made)
        if node.target is aten.slice.Tensor:
            args[2:] = [k * min(i, self.network.shapes[args[0].name][1]) for i in args[2:]]
        elif node.target is aten.constant_pad_nd.default:
            args[1] = [k * n for n in args[1]]
        elif node.target in _INDEXED:
            index = self.root.get_buffer(args[2].target)
            blocks = (k * index.reshape(-1, 1) + torch.arange(k, device=index.device)).flatten()
            self.attach(f"{node.name}_packed", blocks)
            made[args[2]] = self.graph.get_attr(f"{node.name}_packed")
        args, kwargs = fx.map_arg((args, node.kwargs), made.__getitem__)
        return self.graph.call_function(node.target, tuple(args), kwargs)


def _packed(
    module: nn.Conv2d, into: Packing, out: Packing, pixels_in: tuple[int, ...], pixels_out: tuple[int, ...]
) -> tuple[nn.Conv2d, list[int]]:
    """Return the convolution between packed tensors, without padding, and the rows above and below, and the columns.

    Row h * Y + y of the output reads row `stride * (h * Y + y) + offset` of the input: in block b of its packed rows,
    counted from that which the first row of block Y begins in, row q of it.
    """
    strides, kernel, pads, rows = [], [], [], []
    for axis in range(2):
        h, g = out[axis], into[axis]
        offsets = itertools.product(range(h), range(module.kernel_size[axis]))
        taps = [
            (y, tap, *divmod(module.stride[axis] * y + module.dilation[axis] * tap - int(module.padding[axis]), g))
            for y, tap in offsets
        ]
        first, last = (pick(b for _, _, b, _ in taps) for pick in (min, max))
        strides.append(module.stride[axis] * h // g)
        kernel.append(last - first + 1)
        over = strides[axis] * (pixels_out[axis] // h - 1) + last - (pixels_in[axis] // g - 1)
        pads += [-first, max(0, over)]
        rows.append([(y, tap, b - first, q) for y, tap, b, q in taps])
    outputs, inputs = module.weight.shape[:2]
    weight = module.weight.new_zeros(outputs, *out, inputs, *into, *kernel)
    for (y, tap_y, block_y, row), (x, tap_x, block_x, column) in itertools.product(*rows):
        weight[:, y, x, :, row, column, block_y, block_x] = module.weight.detach()[:, :, tap_y, tap_x]
    new = copy.deepcopy(module)
    new.weight = nn.Parameter(weight.reshape(outputs * math.prod(out), inputs * math.prod(into), *kernel))
    if module.bias is not None:
        new.bias = nn.Parameter(module.bias.detach().repeat_interleave(math.prod(out)))
    new.in_channels, new.out_channels = module.in_channels * math.prod(into), len(new.weight)
    new.kernel_size, new.stride, new.padding, new.dilation = (*kernel,), (*strides,), (0, 0), (1, 1)
    return new, pads


def _norm(module: nn.BatchNorm2d, k: int) -> nn.BatchNorm2d:
    new = copy.deepcopy(module)
    tensors: list[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if tensor.ndim:
            values = tensor.detach().repeat_interleave(k)
            setattr(new, name, nn.Parameter(values) if isinstance(tensor, nn.Parameter) else values)
    new.num_features *= k
    return new
