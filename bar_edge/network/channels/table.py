"""The rule of every operator and module."""

from __future__ import annotations

import operator

import torch
from torch import nn

from bar_edge.network.channels import arithmetic, elementwise, layers, moves
from bar_edge.network.channels.passage import CONVOLUTIONS, TRANSPOSED, Rule, operators
from bar_edge.network.leaves import Expand, MixedAdd, PartialNorm
from bar_edge.network.movement import COPIES, MOVEMENTS

aten = torch.ops.aten
PER_CHANNEL = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d]
PER_ELEMENT_ZERO = (
    "relu relu6 leaky_relu elu selu celu silu gelu mish tanh hardswish softsign abs neg square sqrt sin asin "
    "atan sinh asinh erf expm1 log1p sign round floor ceil trunc hardshrink softshrink tanhshrink rrelu "
    "_to_copy to.dtype type_as prelu"
)
PER_ELEMENT = "sigmoid hardsigmoid softplus exp cos cosh log_sigmoid rsub.Scalar rsqrt reciprocal log log2 log10"
POOLS = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d.fixed upsample_nearest1d.vec "
    "upsample_nearest2d.vec upsample_nearest3d.vec _upsample_nearest_exact1d.vec "
    "_upsample_nearest_exact2d.vec upsample_linear1d.vec upsample_bilinear2d.vec upsample_trilinear3d.vec "
    "upsample_bicubic2d.vec upsample_nearest1d upsample_nearest2d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d _upsample_bilinear2d_aa.vec reflection_pad1d reflection_pad2d reflection_pad3d "
    "replication_pad1d replication_pad2d replication_pad3d"
)
LARGER = "maximum minimum fmax fmin max.other min.other clamp_min.Tensor clamp_max.Tensor"
CHOICES = "where.self where.ScalarSelf where.ScalarOther where.Scalar masked_fill.Scalar masked_fill.Tensor"
PAIRED_POOLS = (
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
    "max_pool3d_with_indices"
)

#: functions of each element alone
ELEMENTWISE = {*operators(f"{PER_ELEMENT_ZERO} {PER_ELEMENT} hardtanh clamp"), *COPIES}
RULES: dict[object, Rule] = {
    **dict.fromkeys([*CONVOLUTIONS, *TRANSPOSED], layers.conv_rule),
    nn.Linear: layers.linear_rule,
    **dict.fromkeys([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d], elementwise.first_axis(False)),
    **dict.fromkeys([nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d], layers.instance_norm),
    **dict.fromkeys([nn.GroupNorm, nn.LayerNorm, PartialNorm], layers.channel_norm),
    **dict.fromkeys(PER_CHANNEL, elementwise.same_axis(True)),
    nn.PReLU: layers.prelu_rule,
    MixedAdd: layers.mixed_add_rule,
    Expand: layers.expand_rule,
    **dict.fromkeys(operators(PER_ELEMENT_ZERO), elementwise.same_axis(True)),
    **dict.fromkeys(operators(PER_ELEMENT), elementwise.same_axis(False)),
    **dict.fromkeys(operators(POOLS), elementwise.first_axis(True)),
    **dict.fromkeys(elementwise.REDUCTIONS, elementwise.reduce),
    **dict.fromkeys(operators("softmax.int _softmax cumsum log_softmax.int"), elementwise.over_positions),
    aten.pow.Tensor_Scalar: elementwise.power,
    aten.pow.Tensor_Tensor: arithmetic.power_of_parameter,
    aten.clamp_min.default: elementwise.bounded(low=True),
    aten.clamp_max.default: elementwise.bounded(low=False),
    aten.threshold.default: elementwise.threshold,
    aten.glu.default: arithmetic.halves,
    **dict.fromkeys(arithmetic.COMPARISONS, arithmetic.comparison),
    **dict.fromkeys(operators(LARGER), arithmetic.elementwise("any")),
    **dict.fromkeys(operators(CHOICES), arithmetic.choice),
    **dict.fromkeys(operators("zeros_like ones_like full_like"), elementwise.filled),
    aten.constant_pad_nd.default: elementwise.pad,
    aten.pad.default: elementwise.pad,
    **dict.fromkeys(operators("hardtanh clamp"), elementwise.hardtanh),
    **dict.fromkeys(MOVEMENTS, moves.movement_rule),
    **dict.fromkeys(COPIES, moves.copied_rule),
    aten.cat.default: moves.cat_rule,
    **dict.fromkeys([aten.add.Tensor, aten.sub.Tensor], arithmetic.elementwise("add")),
    **dict.fromkeys([aten.mul.Tensor, aten.div.Tensor], arithmetic.elementwise("mul")),
    **dict.fromkeys(operators(PAIRED_POOLS), elementwise.first_of_two(elementwise.first_axis(True))),
    **dict.fromkeys(operators("max.dim min.dim"), elementwise.first_of_two(elementwise.reduce)),
    operator.getitem: elementwise.same_axis(True),
}

#: leaves that surgery makes; they are not the user's operators
LEAVES = (MixedAdd, Expand, PartialNorm)
