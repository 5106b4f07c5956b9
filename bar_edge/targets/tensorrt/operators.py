"""Which ONNX operators TensorRT's parser has, from onnx-tensorrt's published tables (docs/operators.md).

10.16 and 11: the table of 10.15 ("opset 9 to opset 24"), the newest that could be had; 11.1 states the same range.
10.3 (JetPack 6): the table of 9.2 ("up to Opset 19") with what the changelog adds up to 10.3, so what 10.3 may have
beyond that counts as missing. Types that only quantisation makes (INT8, FP8, INT4, FP4) are not listed: the checker
treats Q/DQ by themselves.
"""

from __future__ import annotations

VERSIONS = ("10.3", "10.16", "11")
#: version -> smallest and largest opset of the tables
OPSETS = {"10.3": (9, 19), "10.16": (9, 24), "11": (9, 24)}
#: version -> largest IR version: that of the ONNX release it was built with (1.16, 1.19, 1.20)
IR_VERSIONS = {"10.3": 10, "10.16": 12, "11": 13}

_FLOATS = "FLOAT FLOAT16 BFLOAT16"
_INTS = "INT32 INT64"
_TYPES = {
    "FLOAT": "STFT",
    "FLOAT FLOAT16": "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero "
    "RoiAlign",
    _FLOATS: "Acos Acosh Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Ceil Celu Clip Conv "
    "ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool "
    "GlobalMaxPool GroupNormalization HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LRN LSTM "
    "LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization "
    "PRelu ParametricSoftplus RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike "
    "Reciprocal Resize RotaryEmbedding Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan "
    "Tanh ThresholdedRelu Upsample",
    f"{_FLOATS} INT32": "TensorScatter",
    f"{_FLOATS} {_INTS}": "Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less "
    "LessOrEqual Max Mean Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax "
    "ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign "
    "SpaceToDepth Sub Sum TopK",
    f"{_FLOATS} {_INTS} BOOL": "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND "
    "Identity If Loop OneHot Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze "
    "Where",
    f"{_FLOATS} {_INTS} UINT8 BOOL": "Cast CastLike",
    f"{_FLOATS} INT8": "QuantizeLinear DequantizeLinear",
    "BOOL": "And Not Or Xor",
}
#: operator -> data types (names of onnx.TensorProto)
OPERATORS = {operator: frozenset(types.split()) for types, names in _TYPES.items() for operator in names.split()}
#: not in the table of 9.2, nor in the changelog up to 10.3
_NEW = "Attention BlackmanWindow Gelu HammingWindow HannWindow Mish RMSNormalization RotaryEmbedding STFT TensorScatter"
AFTER_10_3 = frozenset(_NEW.split())
#: fewer types in the table of 9.2
TYPES_10_3 = {"Pow": frozenset(_FLOATS.split()), "ConstantOfShape": frozenset({"FLOAT"})}
_REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"
#: operator -> inputs that must be known when the engine is built
CONSTANT_INPUTS = {
    **{f"Reduce{kind}": (1,) for kind in _REDUCTIONS.split()},
    "CumSum": (1,),
    "DequantizeLinear": (1, 2),
    "Dropout": (2,),
    "OneHot": (1,),
    "Pad": (1,),
    "QuantizeLinear": (1, 2),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}


def types_of(operator: str, version: str) -> frozenset[str]:
    """Return the data types of an operator; none if the version has not got it."""
    if version == "10.3":
        if operator in AFTER_10_3:
            return frozenset()
        return TYPES_10_3.get(operator, OPERATORS.get(operator, frozenset()))
    return OPERATORS.get(operator, frozenset())
