"""What the native passes take: addresses say nothing of types and sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.integer.bits import mask_bytes
from compression_manager.quantization.integer.geometry import Geometry
from compression_manager.quantization.integer.passes import MAX_SUMMED
from compression_manager.quantization.tensors.memory_format import has_gaps, is_dense

CODES = (torch.uint8, torch.int8)


def check(what: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raise QuantizationError unless `tensor` is dense, on the CPU and of one of these dtypes."""
    strided = tensor.is_cpu and tensor.layout == torch.strided
    # The last question takes four times as long as the one before.
    if tensor.dtype in dtypes and strided and (is_dense(tensor) or not has_gaps(tensor)):
        return
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise QuantizationError(
        f"{what} is a dense {names} tensor on the CPU, got {described(tensor)}."
    )


def check_range(zero_point: int, quant_min: int, quant_max: int) -> None:
    """Raise QuantizationError unless 8 bits hold the range, and the range the zero point."""
    largest = 127 if quant_min < 0 else 255
    if not -128 <= quant_min <= zero_point <= quant_max <= largest:
        raise QuantizationError(
            "8 bits hold integers from 0 to 255 or from -128 to 127, with the zero point inside of "
            f"the range; got the range {quant_min} to {quant_max} and the zero point {zero_point}."
        )


def check_values(values: Tensor, codes: Tensor) -> None:
    """Raise QuantizationError unless `values` lie in memory as the codes that they stand for."""
    if values.dtype not in (torch.float32, torch.bfloat16) or not values.is_cpu:
        raise QuantizationError(
            f"values are float32 or bfloat16 on the CPU, got {described(values)}."
        )
    if values.shape != codes.shape or values.stride() != codes.stride():
        raise QuantizationError(
            f"values have the shape and strides of their codes, got {described(values)} for "
            f"{described(codes)}."
        )


def check_mask(mask: Tensor, elements: Tensor) -> None:
    """Raise QuantizationError unless `mask` has a bit for each of the elements."""
    check("the mask", mask, torch.uint8)
    if mask.shape != (mask_bytes(elements),):
        raise QuantizationError(
            f"the mask of {elements.numel()} elements has {mask_bytes(elements)} bytes, got "
            f"{described(mask)}."
        )


def check_factors(
    left: Tensor, right: Tensor, zero_point: int, pieces: int, *, transposed: bool
) -> None:
    """Raise QuantizationError unless the factors of a bfloat16 product fit together."""
    if left.dtype != torch.float32 or right.dtype not in CODES or {left.dim(), right.dim()} != {2}:
        raise QuantizationError(
            "left is a float32 matrix and right one of int8 or uint8, got "
            f"{described(left)} and {described(right)}."
        )
    if left.device.type != "cpu" or right.device.type != "cpu":
        raise QuantizationError(
            f"native products are computed on the CPU, got {left.device} and {right.device}."
        )
    if left.shape[0 if transposed else 1] != right.shape[0]:
        which = "rows" if transposed else "columns"
        raise QuantizationError(
            f"left has as many {which} as right has rows, got {described(left)} and "
            f"{described(right)}."
        )
    check_zero_point(zero_point, right.dtype)
    if pieces not in (1, 3):
        raise QuantizationError(f"pieces is 1 or 3, got {pieces}.")


def check_integers(codes: Tensor, weight: Tensor, zero_point: int) -> None:
    """Raise QuantizationError unless the factors of an integer product fit together."""
    check("codes", codes, torch.uint8)
    check("weight", weight, torch.int8)
    if codes.dim() == 0 or weight.dim() != 2 or codes.shape[-1] != weight.shape[1]:
        raise QuantizationError(
            "the weight is a matrix and the codes end in its number of columns, got "
            f"{described(codes)} and {described(weight)}."
        )
    if not codes.is_contiguous() or not weight.is_contiguous():
        raise QuantizationError(
            f"codes and weight are contiguous, got {described(codes)} and {described(weight)}; "
            "use .contiguous()."
        )
    if weight.shape[1] > MAX_SUMMED:
        raise QuantizationError(
            f"sums of up to {MAX_SUMMED} products fit into 32 bits, got {weight.shape[1]} columns."
        )
    check_zero_point(zero_point, codes.dtype)


def check_convolution(codes: Tensor, weight: Tensor, zero_point: int, geometry: Geometry) -> None:
    """Raise QuantizationError unless the operands of a convolution of integers fit together."""
    check("codes", codes, torch.uint8)
    _check_windows(codes, weight, geometry)
    summed = weight[0].numel()
    if summed > MAX_SUMMED:
        raise QuantizationError(
            f"sums of up to {MAX_SUMMED} products fit into 32 bits, got {summed}."
        )
    check_zero_point(zero_point, codes.dtype)


def check_gradient(gradient: Tensor, codes: Tensor, weight: Tensor, geometry: Geometry) -> None:
    """Raise QuantizationError unless a gradient is that of a convolution of these integers."""
    check("codes", codes, *CODES)
    _check_windows(codes, weight, geometry)
    places = geometry.places(codes.shape[2:], weight.shape[2:])
    shape = (codes.shape[0], weight.shape[0], *places)
    if gradient.dtype != torch.float32 or not gradient.is_cpu or gradient.shape != shape:
        raise QuantizationError(
            f"the output's gradient is a float32 tensor {shape} on the CPU, got "
            f"{described(gradient)}."
        )


def _check_windows(codes: Tensor, weight: Tensor, geometry: Geometry) -> None:
    check("weight", weight, torch.int8)
    axes = len(geometry.stride)
    if {codes.dim(), weight.dim()} != {2 + axes} or axes > 3 or geometry.groups != 1:
        raise QuantizationError(
            "codes and weight have one to three spatial dimensions, as many as the geometry, and "
            f"one group; got {described(codes)}, {described(weight)} and {geometry}."
        )
    if codes.shape[1] != weight.shape[1]:
        raise QuantizationError(
            f"codes and weight have as many channels, got {described(codes)} and "
            f"{described(weight)}."
        )
    if not (codes.is_contiguous() or codes.movedim(1, -1).is_contiguous()):
        raise QuantizationError(
            f"codes are contiguous or have the channels last, got {described(codes)}."
        )
    steps = min(*geometry.stride, *geometry.dilation)
    if 0 in (*codes.shape, *weight.shape) or steps < 1 or min(geometry.padding) < 0:
        raise QuantizationError(
            "no size, stride and dilation is 0 and no padding negative, got "
            f"{described(codes)}, {described(weight)} and {geometry}."
        )
    if min(geometry.places(codes.shape[2:], weight.shape[2:])) < 1:
        raise QuantizationError(
            f"the kernel is larger than the padded input: {described(codes)}, {described(weight)} "
            f"and {geometry}."
        )


def check_zero_point(zero_point: int, dtype: torch.dtype) -> None:
    """Raise QuantizationError unless `zero_point` is an integer of the dtype."""
    least, most = (0, 255) if dtype == torch.uint8 else (-128, 127)
    if not least <= zero_point <= most:
        raise QuantizationError(
            f"the zero point of {dtype} lies between {least} and {most}, got {zero_point}."
        )


def check_vector(what: str, vector: Tensor, size: int) -> None:
    """Raise QuantizationError unless `vector` has `size` elements of float32."""
    check(what, vector, torch.float32)
    if vector.shape != (size,):
        raise QuantizationError(f"{what} has {size} elements, got {described(vector)}.")


def described(tensor: Tensor) -> str:
    """Return type, shape, strides and device of a tensor, for messages."""
    strides = f" with strides {tensor.stride()}" if tensor.layout == torch.strided else ""
    return f"{tensor.dtype} {tuple(tensor.shape)}{strides} on {tensor.device}"
