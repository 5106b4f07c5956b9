"""aten operator -> Python that computes exactly the same; arguments have the schema's order and names there."""

from __future__ import annotations

import operator

INFIX = {
    "add.Tensor": "+", "sub.Tensor": "-", "mul.Tensor": "*", "div.Tensor": "/", "add.Scalar": "+", "sub.Scalar": "-",
    "mul.Scalar": "*", "div.Scalar": "/", "pow.Tensor_Scalar": "**", "matmul.default": "@", "gt.Scalar": ">",
    "ge.Scalar": ">=", "lt.Scalar": "<", "le.Scalar": "<=", "gt.Tensor": ">", "ge.Tensor": ">=", "lt.Tensor": "<",
    "le.Tensor": "<=",
}  # fmt: skip
PYTHON = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//"}
#: x.mean((2, 3), keepdim=True)
METHODS = {
    "all", "amax", "amin", "any", "argmax", "argmin", "chunk", "clamp", "clone", "contiguous", "cumsum", "detach",
    "expand_as", "flatten", "flip", "index_select", "masked_fill", "mean", "narrow", "new_ones", "new_zeros", "prod",
    "repeat_interleave", "roll", "split", "split_with_sizes", "squeeze", "std", "sum", "transpose", "unbind",
    "unflatten", "unsqueeze", "var",
}  # fmt: skip
#: x.view(batch, -1): the one list is written without parentheses
SPREAD = {"expand", "permute", "repeat", "reshape", "view"}
#: torch.cat([a, b], 1)
TORCH = {
    "abs", "add", "addmm", "arange", "baddbmm", "batch_norm", "bmm", "cat", "channel_shuffle", "clamp_max", "clamp_min",
    "cos", "div", "dropout", "embedding", "erf", "exp", "floor", "full", "full_like", "gather", "group_norm",
    "index_add", "instance_norm", "layer_norm", "log", "log1p", "log_softmax", "matmul", "max", "maximum", "min",
    "minimum", "mul", "ones", "ones_like", "pow", "prelu", "reciprocal", "round", "rsqrt", "rsub", "sigmoid", "sign",
    "sin", "softmax", "sqrt", "square", "stack", "sub", "tanh", "topk", "tril", "triu", "where", "zeros", "zeros_like",
}  # fmt: skip
#: F.max_pool2d(x, 2): one number for several equal ones
FUNCTIONAL = {
    name: name
    for name in (
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
        "celu", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "gelu", "glu",
        "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "linear", "max_pool1d", "max_pool2d", "max_pool3d",
        "mish", "pad", "pixel_shuffle", "pixel_unshuffle", "relu", "relu6", "scaled_dot_product_attention", "selu",
        "silu", "softplus",
    )
} | {"log_sigmoid": "logsigmoid"}  # fmt: skip
#: settings of one number for several equal ones
PER_AXIS = {"kernel_size", "stride", "padding", "output_padding", "dilation", "output_size"}
