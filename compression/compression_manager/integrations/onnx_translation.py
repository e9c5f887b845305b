"""The quantization operators in ONNX, for `torch.onnx.export`; needs the extra `onnx`.

    program = torch.onnx.export(model, (inputs,), dynamo=True,
                                custom_translation_table=onnx_translation_table())

Ranges of 8 bits, with one scale per tensor or per channel, become QuantizeLinear and
DequantizeLinear, which runtimes turn into integer kernels. ONNX divides by the
scale where torch multiplies by its reciprocal, so that values in the middle between two integers
may fall on the other one. All other schemes become the formula itself, whose results are equal.

Packed integers stay packed; but the exporter computes what follows from constants of a few kB, and
with them unpacks small weights. `optimize=False` keeps it from that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18

from compression_manager.quantization.arithmetic import operators
from compression_manager.quantization.scheme import (
    MAX_FLOAT32_BITS,
    kernel_range,
    storage_dtype,
)
from compression_manager.quantization.storage.packing import packing_period

# Its declared types are those of ONNX tensors, not of what the exporter hands over.
op: Any = opset18
OPSET = 18

# onnx.TensorProto.DataType
_ONNX_TYPES: dict[torch.dtype, int] = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.float16: 10,
    torch.float64: 11,
    torch.uint32: 12,
    torch.bfloat16: 16,
}
_FLOAT, _DOUBLE = _ONNX_TYPES[torch.float32], _ONNX_TYPES[torch.float64]
_INT64 = _ONNX_TYPES[torch.int64]
_WIDE_INTEGERS = (_ONNX_TYPES[torch.int32], _ONNX_TYPES[torch.int64])
_UINT8, _UINT32 = _ONNX_TYPES[torch.uint8], _ONNX_TYPES[torch.uint32]
# 16-bit types would need opset 21; torch exports to 18 unless told otherwise.
_LINEAR_TYPES = {-128: 3, 0: 2}


def onnx_translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return operator -> its translation, as `torch.onnx.export` takes it."""
    namespace = torch.ops.compression_manager
    assert operators.fake_quantize is not None  # the import registers the operators
    return {
        namespace.fake_quantize.default: _fake_quantize,
        namespace.quantize.default: _quantize,
        namespace.dequantize.default: _dequantize,
        namespace.unpack_bits.default: _unpack_bits,
    }


# The exporter hands over ONNX values for tensors and plain Python values for all else.


def _fake_quantize(
    input: Any,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
    pass_clipped_gradient: bool = False,
) -> Any:
    zero_point = _one_per_scale(zero_point, scale)
    whole = kernel_range(quant_min, quant_max)
    if whole is not None and _fits_linear(input, scale, axis, group_size):
        low, _ = whole
        if quant_min > low:
            # QuantizeLinear clips to the lowest integer, which a narrow range lacks.
            least, most = (_level(value, scale, zero_point) for value in (quant_min, quant_max))
            # Runtimes merge a Clip between numbers with what is before it.
            input = (
                op.Clip(input, least, most)
                if len(scale.shape) == 0
                else op.Max(input, _over_axis(least, input, axis))
            )
        zero = op.Cast(zero_point, to=_LINEAR_TYPES[low])
        integers = op.QuantizeLinear(input, scale, zero, axis=axis or 0)
        return op.DequantizeLinear(integers, scale, zero, axis=axis or 0)
    compute = _compute_type(input, quant_min, quant_max)
    scale, zero_point = _shaped(input, scale, zero_point, axis, group_size, compute)
    code = _clipped(input, scale, zero_point, quant_min, quant_max, compute)
    values = op.Mul(op.Sub(code, zero_point), _cast(scale, _FLOAT, compute))
    return _cast(values, compute, int(input.dtype))


def _quantize(
    input: Any,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Any:
    zero_point = _one_per_scale(zero_point, scale)
    target = _ONNX_TYPES[storage_dtype(quant_min, quant_max)]
    is_whole = kernel_range(quant_min, quant_max) is not None and quant_min in _LINEAR_TYPES
    if is_whole and _fits_linear(input, scale, axis, group_size):
        return op.QuantizeLinear(input, scale, op.Cast(zero_point, to=target), axis=axis or 0)
    compute = _compute_type(input, quant_min, quant_max)
    scale, zero_point = _shaped(input, scale, zero_point, axis, group_size, compute)
    return op.Cast(_clipped(input, scale, zero_point, quant_min, quant_max, compute), to=target)


def _dequantize(
    quantized: Any,
    scale: Any,
    zero_point: Any,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: int = _FLOAT,
) -> Any:
    zero_point = _one_per_scale(zero_point, scale)
    is_linear = int(quantized.dtype) in _LINEAR_TYPES.values() and dtype == _FLOAT
    if is_linear and _has_linear_shape(scale, axis, group_size):
        zero = op.CastLike(zero_point, quantized)
        return op.DequantizeLinear(quantized, scale, zero, axis=axis or 0)
    is_wide = dtype == _DOUBLE or int(quantized.dtype) in _WIDE_INTEGERS
    compute = _DOUBLE if is_wide else _FLOAT
    scale, zero_point = _shaped(quantized, scale, zero_point, axis, group_size, compute)
    steps = op.Sub(op.Cast(quantized, to=compute), zero_point)
    return _cast(op.Mul(steps, _cast(scale, _FLOAT, compute)), compute, dtype)


def _unpack_bits(packed: Any, bits: int, count: int) -> Any:
    period, width = packing_period(bits)
    *streams, length = packed.shape
    groups = -(-int(length) // width)
    kept = [0] * len(streams)  # 0 leaves a dimension as it is
    missing = op.Constant(value_ints=[*kept, 0, *kept, groups * width - int(length)])
    words = op.Cast(op.Pad(packed, missing), to=_UINT32)
    words = op.Reshape(words, op.Constant(value_ints=[*kept, groups, width]))
    places = [divmod(index * bits, 8) for index in range(period)]
    low = op.Gather(words, op.Constant(value_ints=[byte for byte, _ in places]), axis=-1)
    # The last value of a period ends with a byte, so that it needs nothing from the next one.
    following = [min(byte + 1, width - 1) for byte, _ in places]
    high = op.Gather(words, op.Constant(value_ints=following), axis=-1)
    word = op.BitwiseOr(low, op.BitShift(high, _uint32([8]), direction="LEFT"))
    shifted = op.BitShift(word, _uint32([shift for _, shift in places]), direction="RIGHT")
    codes = op.Cast(op.BitwiseAnd(shifted, _uint32([(1 << bits) - 1])), to=_UINT8)
    flat = op.Reshape(codes, op.Constant(value_ints=[*kept, groups * period]))
    first, last, axis = (op.Constant(value_ints=[value]) for value in (0, count, -1))
    return op.Slice(flat, first, last, axis)


def _uint32(values: list[int]) -> Any:
    return op.Cast(op.Constant(value_ints=values), to=_UINT32)


def _one_per_scale(zero_point: Any, scale: Any) -> Any:
    """Return the zero point in the shape of the scale, as ONNX demands it."""
    if len(zero_point.shape) == len(scale.shape):
        return zero_point
    return op.Expand(zero_point, op.Shape(scale))


def _fits_linear(input: Any, scale: Any, axis: int | None, group_size: int | None) -> bool:
    return int(input.dtype) == _FLOAT and _has_linear_shape(scale, axis, group_size)


def _has_linear_shape(scale: Any, axis: int | None, group_size: int | None) -> bool:
    return group_size is None and (axis is not None or len(scale.shape) == 0)


def _compute_type(input: Any, quant_min: int, quant_max: int) -> int:
    """Return the type in which the formula is computed: that of `grid.compute_dtype`."""
    is_wide = quant_max - quant_min >= 2**MAX_FLOAT32_BITS
    return _DOUBLE if is_wide or int(input.dtype) == _DOUBLE else _FLOAT


def _cast(value: Any, source: int, target: int) -> Any:
    return value if source == target else op.Cast(value, to=target)


def _clipped(
    input: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, compute: int
) -> Any:
    """Return the integers of `input` in the type `compute`, which `zero_point` has."""
    inverse = _cast(op.Reciprocal(scale), _FLOAT, compute)
    steps = op.Round(op.Mul(_cast(input, int(input.dtype), compute), inverse))
    shifted = op.Add(steps, zero_point)
    low, high = (
        op.Cast(op.Constant(value_int=value), to=compute) for value in (quant_min, quant_max)
    )
    return op.Clip(shifted, low, high)


def _shaped(
    input: Any,
    scale: Any,
    zero_point: Any,
    axis: int | None,
    group_size: int | None,
    compute: int,
) -> tuple[Any, Any]:
    """Return scale (float) and zero point (of the type `compute`) to broadcast against `input`."""
    zero_point = op.Cast(zero_point, to=compute)
    if group_size is not None:
        groups = int(scale.shape[1])
        return (
            _spread(scale, input, groups, group_size),
            _spread(zero_point, input, groups, group_size),
        )
    if len(scale.shape) == 0:
        return scale, zero_point
    return _over_axis(scale, input, axis), _over_axis(zero_point, input, axis)


def _level(integer: int, scale: Any, zero_point: Any) -> Any:
    """Return the number that an integer stands for, in the shape of the scale."""
    steps = op.Sub(op.Constant(value_int=integer), op.Cast(zero_point, to=_INT64))
    return op.Mul(op.Cast(steps, to=_FLOAT), scale)


def _over_axis(value: Any, input: Any, axis: int | None) -> Any:
    """Return one number for all of `input`, or one per channel, to broadcast against it."""
    if axis is None:
        return value
    shape = [1] * len(input.shape)
    shape[axis] = -1
    return op.Reshape(value, op.Constant(value_ints=shape))


def _spread(value: Any, input: Any, groups: int, group_size: int) -> Any:
    """Repeat (rows, groups) so that each value stands at every element of its group.

    The number of rows may be open, as where they are looked up in a table.
    """
    length = math.prod(int(size) for size in list(input.shape)[1:])
    column = op.Unsqueeze(value, op.Constant(value_ints=[2]))
    wide = op.Expand(column, op.Constant(value_ints=[1, 1, group_size]))
    flat = op.Reshape(wide, op.Constant(value_ints=[0, groups * group_size]))
    first, last, axis = (op.Constant(value_ints=[value]) for value in (0, length, 1))
    return op.Reshape(op.Slice(flat, first, last, axis), op.Shape(input))
