"""Products of integers by the C++ functions."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.integer.geometry import Geometry
from compression_manager.quantization.integer.native.checks import (
    check_convolution,
    check_integers,
    check_vector,
)
from compression_manager.quantization.integer.passes import Passes

# The C++ functions know this many spatial dimensions.
_AXES = 3


class NativeIntegers(Passes):
    """The products of integers among the passes.

    Args:
        functions: the declared C++ functions.
    """

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions
        found: bytes | None = functions.integer_instructions()
        self._instructions = None if found is None else found.decode()

    def supports_integers(self) -> bool:
        """Return whether there are instructions by which these products are the fastest."""
        return self._instructions is not None

    def integer_kernel(self, device: torch.device) -> str:
        """See `Passes.integer_kernel`."""
        return (
            f"the native {self._instructions or 'plain'} product "
            "(scales, zero point and bias fused)"
        )

    def multiply_integers(
        self,
        codes: Tensor,
        weight: Tensor,
        zero_point: int | Tensor,
        scale: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """See `Passes.multiply_integers`; codes and weight are contiguous."""
        zero_point = int(zero_point)
        check_integers(codes, weight, zero_point)
        columns, depth = weight.shape
        _check_addends(scale, bias, columns)
        output = scale.new_empty((*codes.shape[:-1], columns))
        if depth == 0 or output.numel() == 0:
            nothing = output.zero_().mul_(scale)
            return nothing if bias is None else nothing.add_(bias)
        problem = self._functions.multiply_integers(
            codes.data_ptr(),
            weight.data_ptr(),
            zero_point,
            scale.data_ptr(),
            address(bias),
            codes.numel() // depth,
            columns,
            depth,
            output.data_ptr(),
        )
        require_none(problem)
        return output

    def convolve_integers(
        self,
        codes: Tensor,
        weight: Tensor,
        zero_point: int,
        scale: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        """See `Passes.convolve_integers`."""
        check_convolution(codes, weight, zero_point, geometry)
        (count, channels), size = codes.shape[:2], codes.shape[2:]
        columns, kernel = weight.shape[0], weight.shape[2:]
        _check_addends(scale, bias, columns)
        places = geometry.places(size, kernel)
        channels_last = not codes.is_contiguous()
        order = tuple(range(2 + len(size)))
        if channels_last:
            order = (0, *order[2:], 1)
        output = torch.empty_permuted(
            (count, columns, *places), order, dtype=torch.float32, device=codes.device
        )
        matrix = _in_units(weight, self._functions.channels_unit())
        problem = self._functions.convolve_integers(
            codes.data_ptr(),
            channels_last,
            matrix.data_ptr(),
            zero_point,
            scale.data_ptr(),
            address(bias),
            count,
            channels,
            columns,
            numbers_of(size, kernel, geometry),
            output.data_ptr(),
        )
        require_none(problem)
        return output


def _in_units(weight: Tensor, unit: int) -> Tensor:
    """Return (out channels, *kernel, C), with C rounded up to a multiple of `unit`."""
    matrix = weight.movedim(1, -1)
    missing = -matrix.shape[-1] % unit
    return (F.pad(matrix, (0, missing)) if missing else matrix).contiguous()


def numbers_of(
    size: torch.Size, kernel: torch.Size, geometry: Geometry
) -> ctypes.Array[ctypes.c_int64]:
    """Return the C++ struct of a geometry, with ones on the axes that there are not."""
    missing = _AXES - len(size)
    rows = [
        [*[nothing] * missing, *numbers]
        for nothing, numbers in (
            (1, size),
            (1, kernel),
            (1, geometry.stride),
            (0, geometry.padding),
            (1, geometry.dilation),
        )
    ]
    flat = [number for row in rows for number in row]
    return (ctypes.c_int64 * len(flat))(*flat)


def _check_addends(scale: Tensor, bias: Tensor | None, columns: int) -> None:
    check_vector("scale", scale, columns)
    if bias is not None:
        check_vector("bias", bias, columns)


def require_none(problem: bytes | None) -> None:
    """Raise QuantizationError if a product says what went wrong."""
    if problem is not None:
        raise QuantizationError(f"a native product failed: {problem.decode()}")


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor lies, for C++; None for none."""
    return None if tensor is None else tensor.data_ptr()
