"""The passes as C++ functions, called through their addresses in memory."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.integer.native.loader import load_library
from compression_manager.quantization.integer.passes import Passes

_pointer, _integer, _size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_float, _bool = ctypes.c_float, ctypes.c_bool

# Function -> the type of its result and those of its arguments; see the C++ files.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "quantize_elements": (
        _bool,
        [_pointer, _size, _float, _float, _float, _float, _bool, _pointer, _pointer],
    ),
    "dequantize_elements": (None, [_pointer, _size, _bool, _float, _integer, _bool, _pointer]),
    "clear_marked": (None, [_pointer, _size, _pointer]),
    "relu_elements": (None, [_pointer, _size, _pointer, _pointer]),
    "keep_marked": (None, [_pointer, _size, _pointer, _pointer]),
    "quantize_rows": (None, [_pointer, _size, _size, _pointer, _pointer]),
    "dequantize_rows": (None, [_pointer, _size, _size, _size, _pointer, _bool, _pointer]),
    "supports_bfloat16": (_bool, []),
    "multiply_codes": (
        ctypes.c_char_p,
        [
            *[_pointer, _bool, _pointer, _float, _pointer, _bool, _integer],
            *[_size, _size, _size, _integer, _pointer],
        ],
    ),
    "supports_integers": (_bool, []),
    "multiply_integers": (
        ctypes.c_char_p,
        [_pointer, _pointer, _integer, _pointer, _pointer, _size, _size, _size, _pointer],
    ),
}
_CODES = (torch.uint8, torch.int8)
# More terms of 255 * -128 would not fit into 32 bits.
_MOST_TERMS = 2**31 // (255 * 128)


class NativePasses(Passes):
    """C++ kernels, each one pass over memory, on torch's own threads.

    Raises:
        QuantizationError: when it is created where they cannot be loaded; the text says why.
    """

    name: ClassVar[str] = "native"

    def __init__(self) -> None:
        library = load_library()
        if library.functions is None:
            raise QuantizationError(f"no native passes: {library.reason}.")
        self._functions = _declared(library.functions)

    def __reduce__(self) -> tuple[type[NativePasses], tuple[()]]:
        """Have a copy load the library again: addresses mean nothing in another process."""
        return NativePasses, ()

    def supports_pieces(self, pieces: int) -> bool:
        """Return whether `multiply` uses AMX; without it any number of pieces is very slow."""
        return bool(self._functions.supports_bfloat16())

    def quantize(
        self,
        input: Tensor,
        inverse_scale: float | Tensor,
        zero_point: int | Tensor,
        quant_min: int,
        quant_max: int,
        clips: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Passes.quantize`."""
        zero_point = int(zero_point)
        _check("input", input, torch.float32)
        _check_range(zero_point, quant_min, quant_max)
        has_sign = quant_min < 0
        codes = torch.empty_like(input, dtype=torch.int8 if has_sign else torch.uint8)
        clipped = _empty_mask(input) if clips else None
        any_clipped = self._functions.quantize_elements(
            input.data_ptr(),
            input.numel(),
            float(inverse_scale),
            zero_point,
            quant_min,
            quant_max,
            has_sign,
            codes.data_ptr(),
            None if clipped is None else clipped.data_ptr(),
        )
        return codes, clipped if any_clipped else None

    def quantize_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Passes.quantize_rows`."""
        _check("weight", weight, torch.float32)
        if weight.dim() != 2 or not weight.is_contiguous():
            raise QuantizationError(
                f"weight is a contiguous matrix, got {_described(weight)}; use .contiguous()."
            )
        codes = torch.empty_like(weight, dtype=torch.int8)
        scale = weight.new_empty(weight.shape[0])
        self._functions.quantize_rows(
            weight.data_ptr(), *weight.shape, codes.data_ptr(), scale.data_ptr()
        )
        return codes, scale

    def dequantize(
        self,
        codes: Tensor,
        scale: float | Tensor,
        zero_point: int | Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """See `Passes.dequantize`."""
        _check("codes", codes, *_CODES)
        output = _empty_values(codes, dtype)
        self._functions.dequantize_elements(
            codes.data_ptr(),
            codes.numel(),
            codes.dtype == torch.int8,
            float(scale),
            int(zero_point),
            dtype == torch.bfloat16,
            output.data_ptr(),
        )
        return output

    def dequantize_rows(
        self, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """See `Passes.dequantize_rows`."""
        _check("codes", codes, torch.int8)
        _check("scale", scale, torch.float32)
        if codes.dim() == 0 or scale.shape != codes.shape[:1]:
            raise QuantizationError(
                f"scale has one element for each row of codes, got {_described(scale)} for "
                f"{_described(codes)}."
            )
        output = _empty_values(codes, dtype)
        if codes.numel() > 0:
            rows = codes.shape[0]
            # A row's neighbors in memory are its own elements up to the stride of the rows.
            run = codes.stride(0) if rows > 1 else codes.numel()
            self._functions.dequantize_rows(
                codes.data_ptr(),
                codes.numel() // run,
                run,
                rows,
                scale.data_ptr(),
                dtype == torch.bfloat16,
                output.data_ptr(),
            )
        return output

    def clear_clipped(self, gradient: Tensor, clipped: Tensor) -> Tensor:
        """See `Passes.clear_clipped`."""
        _check("gradient", gradient, torch.float32)
        _check_mask(clipped, gradient)
        self._functions.clear_marked(gradient.data_ptr(), gradient.numel(), clipped.data_ptr())
        # What autograd does not see, it has to be told, so that it can refuse a stale tensor.
        torch.autograd.graph.increment_version(gradient)
        return gradient

    def relu(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """See `Passes.relu`."""
        _check("input", input, torch.float32)
        output, positive = torch.empty_like(input), _empty_mask(input)
        self._functions.relu_elements(
            input.data_ptr(), input.numel(), output.data_ptr(), positive.data_ptr()
        )
        return output, positive

    def relu_gradient(self, gradient: Tensor, positive: Tensor) -> Tensor:
        """See `Passes.relu_gradient`."""
        _check("gradient", gradient, torch.float32)
        _check_mask(positive, gradient)
        output = torch.empty_like(gradient)
        self._functions.keep_marked(
            gradient.data_ptr(), gradient.numel(), positive.data_ptr(), output.data_ptr()
        )
        return output

    def multiply(
        self,
        left: Tensor,
        right: Tensor,
        zero_point: int,
        pieces: int,
        scale: Tensor | None = None,
    ) -> Tensor:
        """See `Passes.multiply`; without AMX plain loops compute it, slowly."""
        _check_factors(left, right, zero_point, pieces, transposed=False)
        if scale is not None:
            _check_vector("scale", scale, left.shape[1])
        return self._multiply(left, right, zero_point, pieces, scale=scale)

    def multiply_transposed(
        self, left: Tensor, right: Tensor, zero_point: int, pieces: int, factor: float = 1.0
    ) -> Tensor:
        """See `Passes.multiply_transposed`; without AMX plain loops compute it, slowly."""
        _check_factors(left, right, zero_point, pieces, transposed=True)
        return self._multiply(left, right, zero_point, pieces, transposed=True, factor=factor)

    def _multiply(
        self,
        left: Tensor,
        right: Tensor,
        zero_point: int,
        pieces: int,
        *,
        transposed: bool = False,
        scale: Tensor | None = None,
        factor: float = 1.0,
    ) -> Tensor:
        left, right = left.contiguous(), right.contiguous()
        rows = left.shape[1 if transposed else 0]
        depth, columns = right.shape
        if 0 in (rows, columns, depth):
            return left.new_zeros(rows, columns).mul_(factor)
        output = left.new_empty(rows, columns)
        problem = self._functions.multiply_codes(
            left.data_ptr(),
            transposed,
            _address(scale),
            factor,
            right.data_ptr(),
            right.dtype == torch.int8,
            zero_point,
            rows,
            columns,
            depth,
            pieces,
            output.data_ptr(),
        )
        if problem is not None:
            raise QuantizationError(f"the bfloat16 product failed: {problem.decode()}")
        return output

    def supports_integers(self) -> bool:
        """Return whether `multiply_integers` uses AMX; without it plain loops are very slow."""
        return bool(self._functions.supports_integers())

    def multiply_integers(
        self, codes: Tensor, weight: Tensor, zero_point: int, scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        """See `Passes.multiply_integers`; codes and weight are contiguous."""
        _check_integers(codes, weight, zero_point)
        rows, depth = codes.shape
        columns = weight.shape[0]
        _check_vector("scale", scale, columns)
        if bias is not None:
            _check_vector("bias", bias, columns)
        if 0 in (rows, columns, depth):
            nothing = scale.new_zeros(rows, columns).mul_(scale)
            return nothing if bias is None else nothing.add_(bias)
        output = scale.new_empty(rows, columns)
        problem = self._functions.multiply_integers(
            codes.data_ptr(),
            weight.data_ptr(),
            zero_point,
            scale.data_ptr(),
            _address(bias),
            rows,
            columns,
            depth,
            output.data_ptr(),
        )
        if problem is not None:
            raise QuantizationError(f"the integer product failed: {problem.decode()}")
        return output


@functools.cache
def _declared(functions: ctypes.CDLL) -> ctypes.CDLL:
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(functions, name)
        function.restype = result
        function.argtypes = arguments
    return functions


def _check(what: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes or tensor.device.type != "cpu" or not _is_dense(tensor):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise QuantizationError(
            f"{what} is a dense {names} tensor on the CPU, got {_described(tensor)}."
        )


def _is_dense(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided:
        return False
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _check_range(zero_point: int, quant_min: int, quant_max: int) -> None:
    largest = 127 if quant_min < 0 else 255
    if not -128 <= quant_min <= zero_point <= quant_max <= largest:
        raise QuantizationError(
            "8 bits hold integers from 0 to 255 or from -128 to 127, with the zero point inside of "
            f"the range; got the range {quant_min} to {quant_max} and the zero point {zero_point}."
        )


def _check_mask(mask: Tensor, elements: Tensor) -> None:
    _check("the mask", mask, torch.uint8)
    if mask.shape != (_mask_bytes(elements),):
        raise QuantizationError(
            f"the mask of {elements.numel()} elements has {_mask_bytes(elements)} bytes, got "
            f"{_described(mask)}."
        )


def _check_factors(
    left: Tensor, right: Tensor, zero_point: int, pieces: int, *, transposed: bool
) -> None:
    if left.dtype != torch.float32 or right.dtype not in _CODES or {left.dim(), right.dim()} != {2}:
        raise QuantizationError(
            "left is a float32 matrix and right one of int8 or uint8, got "
            f"{_described(left)} and {_described(right)}."
        )
    if left.device.type != "cpu" or right.device.type != "cpu":
        raise QuantizationError(
            f"native products are computed on the CPU, got {left.device} and {right.device}."
        )
    if left.shape[0 if transposed else 1] != right.shape[0]:
        which = "rows" if transposed else "columns"
        raise QuantizationError(
            f"left has as many {which} as right has rows, got {_described(left)} and "
            f"{_described(right)}."
        )
    _check_zero_point(zero_point, right.dtype)
    if pieces not in (1, 3):
        raise QuantizationError(f"pieces is 1 or 3, got {pieces}.")


def _check_integers(codes: Tensor, weight: Tensor, zero_point: int) -> None:
    _check("codes", codes, torch.uint8)
    _check("weight", weight, torch.int8)
    if (codes.dim(), weight.dim()) != (2, 2) or codes.shape[1] != weight.shape[1]:
        raise QuantizationError(
            "codes and weight are matrices with the same number of columns, got "
            f"{_described(codes)} and {_described(weight)}."
        )
    if not codes.is_contiguous() or not weight.is_contiguous():
        raise QuantizationError(
            f"codes and weight are contiguous, got {_described(codes)} and {_described(weight)}; "
            "use .contiguous()."
        )
    if codes.shape[1] > _MOST_TERMS:
        raise QuantizationError(
            f"sums of up to {_MOST_TERMS} products fit into 32 bits, got {codes.shape[1]} columns."
        )
    _check_zero_point(zero_point, codes.dtype)


def _check_zero_point(zero_point: int, dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    if not limits.min <= zero_point <= limits.max:
        raise QuantizationError(
            f"the zero point of {dtype} lies between {limits.min} and {limits.max}, got "
            f"{zero_point}."
        )


def _check_vector(what: str, vector: Tensor, size: int) -> None:
    _check(what, vector, torch.float32)
    if vector.shape != (size,):
        raise QuantizationError(f"{what} has {size} elements, got {_described(vector)}.")


def _empty_values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype not in (torch.float32, torch.bfloat16):
        raise QuantizationError(f"values are float32 or bfloat16, got {dtype}.")
    return torch.empty_like(codes, dtype=dtype)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _described(tensor: Tensor) -> str:
    strides = f" with strides {tensor.stride()}" if tensor.layout == torch.strided else ""
    return f"{tensor.dtype} {tuple(tensor.shape)}{strides} on {tensor.device}"


def _mask_bytes(elements: Tensor) -> int:
    return (elements.numel() + 7) // 8


def _empty_mask(elements: Tensor) -> Tensor:
    return torch.empty(_mask_bytes(elements), dtype=torch.uint8)
