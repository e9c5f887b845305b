"""The passes as C++ functions, called through their addresses in memory."""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.integer.bits import mask_bytes
from compression_manager.quantization.integer.native.checks import (
    CODES,
    check,
    check_factors,
    check_mask,
    check_range,
    check_values,
    check_vector,
    described,
)
from compression_manager.quantization.integer.native.gradients import NativeGradients
from compression_manager.quantization.integer.native.integers import address, require_none
from compression_manager.quantization.integer.native.loader import load_library
from compression_manager.quantization.integer.native.signatures import declared
from compression_manager.quantization.integer.passes import Ends
from compression_manager.quantization.tensors.memory_format import is_dense


class NativePasses(NativeGradients):
    """C++ kernels, each one pass over memory, on torch's own threads.

    Raises:
        QuantizationError: when it is created where they cannot be loaded; the text says why.
    """

    name: ClassVar[str] = "native"

    def __init__(self) -> None:
        library = load_library()
        if library.functions is None:
            raise QuantizationError(f"no native passes: {library.reason}.")
        super().__init__(declared(library.functions))

    def __reduce__(self) -> tuple[type[NativePasses], tuple[()]]:
        """Have a copy load the library again: addresses mean nothing in another process."""
        return NativePasses, ()

    def supports_pieces(self, pieces: int) -> bool:
        """Return whether `multiply` is faster than float32: any with AMX, one with AVX-512 BF16."""
        return pieces <= int(self._functions.most_pieces())

    def ends(self, input: Tensor) -> Ends:
        """See `Passes.ends`."""
        check("input", input, torch.float32)
        found = (ctypes.c_float * 2)()
        self._functions.find_ends(input.data_ptr(), input.numel(), found)
        return found[0], found[1]

    def quantize(
        self,
        input: Tensor,
        inverse_scale: float | Tensor,
        zero_point: int | Tensor,
        quant_min: int,
        quant_max: int,
        *,
        below: bool,
        above: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Passes.quantize`."""
        zero_point = int(zero_point)
        check("input", input, torch.float32)
        check_range(zero_point, quant_min, quant_max)
        has_sign = quant_min < 0
        codes = torch.empty_like(input, dtype=torch.int8 if has_sign else torch.uint8)
        clipped = _empty_mask(input) if below or above else None
        self._functions.quantize_elements(
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
        return codes, clipped

    def quantize_finite(
        self, input: Tensor, inverse_scale: float, zero_point: int, quant_min: int, quant_max: int
    ) -> Tensor | None:
        """See `Passes.quantize_finite`."""
        check("input", input, torch.float32)
        check_range(zero_point, quant_min, quant_max)
        has_sign = quant_min < 0
        codes = torch.empty_like(input, dtype=torch.int8 if has_sign else torch.uint8)
        is_finite = self._functions.quantize_finite_elements(
            input.data_ptr(),
            input.numel(),
            inverse_scale,
            zero_point,
            quant_min,
            quant_max,
            has_sign,
            codes.data_ptr(),
        )
        return codes if is_finite else None

    def quantize_rows(self, weight: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Passes.quantize_rows`."""
        check("weight", weight, torch.float32)
        if weight.dim() == 0 or weight.numel() == 0 or not is_dense(weight):
            raise QuantizationError(
                "weight has rows of at least one element, contiguous or channels_last, got "
                f"{described(weight)}."
            )
        codes, rows = torch.empty_like(weight, dtype=torch.int8), weight.shape[0]
        scale = weight.new_empty(rows)
        if values is not None:
            check("values", values, torch.float32)
            check_values(values, codes)
        self._functions.quantize_rows(
            weight.data_ptr(),
            rows,
            weight.numel() // rows,
            codes.data_ptr(),
            scale.data_ptr(),
            address(values),
        )
        return codes, scale

    def dequantize(
        self,
        codes: Tensor,
        scale: float | Tensor,
        zero_point: int | Tensor,
        out: Tensor,
    ) -> Tensor:
        """See `Passes.dequantize`."""
        check("codes", codes, *CODES)
        check_values(out, codes)
        self._functions.dequantize_elements(
            codes.data_ptr(),
            codes.numel(),
            codes.dtype == torch.int8,
            float(scale),
            int(zero_point),
            out.dtype == torch.bfloat16,
            out.data_ptr(),
        )
        return out

    def add_dequantized(
        self, addend: Tensor, codes: Tensor, scale: float, zero_point: int
    ) -> Tensor:
        """See `Passes.add_dequantized`."""
        check("codes", codes, *CODES)
        check("addend", addend, torch.float32)
        check_values(addend, codes)
        output = torch.empty_like(addend)
        self._functions.add_dequantized_elements(
            addend.data_ptr(),
            codes.data_ptr(),
            codes.numel(),
            codes.dtype == torch.int8,
            scale,
            zero_point,
            output.data_ptr(),
        )
        return output

    def dequantize_rows(self, codes: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        """See `Passes.dequantize_rows`."""
        check("codes", codes, torch.int8)
        check("scale", scale, torch.float32)
        if codes.dim() == 0 or scale.shape != codes.shape[:1]:
            raise QuantizationError(
                f"scale has one element for each row of codes, got {described(scale)} for "
                f"{described(codes)}."
            )
        check_values(out, codes)
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
                out.dtype == torch.bfloat16,
                out.data_ptr(),
            )
        return out

    def clear_clipped(self, gradient: Tensor, clipped: Tensor) -> Tensor:
        """See `Passes.clear_clipped`."""
        check("gradient", gradient, torch.float32)
        check_mask(clipped, gradient)
        self._functions.clear_marked(gradient.data_ptr(), gradient.numel(), clipped.data_ptr())
        # What autograd does not see, it has to be told, so that it can refuse a stale tensor.
        torch.autograd.graph.increment_version(gradient)
        return gradient

    def relu(self, input: Tensor) -> tuple[Tensor, Tensor, Ends]:
        """See `Passes.relu`."""
        check("input", input, torch.float32)
        output, positive = torch.empty_like(input), _empty_mask(input)
        ends = (ctypes.c_float * 2)()
        self._functions.relu_elements(
            input.data_ptr(), input.numel(), output.data_ptr(), positive.data_ptr(), ends
        )
        return output, positive, (ends[0], ends[1])

    def relu_gradient(self, gradient: Tensor, positive: Tensor) -> Tensor:
        """See `Passes.relu_gradient`."""
        check("gradient", gradient, torch.float32)
        check_mask(positive, gradient)
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
        """See `Passes.multiply`; what `supports_pieces` denies is computed, too, slowly."""
        check_factors(left, right, zero_point, pieces, transposed=False)
        if scale is not None:
            check_vector("scale", scale, left.shape[1])
        return self._multiply(left, right, zero_point, pieces, scale=scale)

    def multiply_transposed(
        self, left: Tensor, right: Tensor, zero_point: int, pieces: int, factor: float = 1.0
    ) -> Tensor:
        """See `Passes.multiply_transposed`; slow where `supports_pieces` denies it."""
        check_factors(left, right, zero_point, pieces, transposed=True)
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
            address(scale),
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
        require_none(problem)
        return output


def _empty_mask(elements: Tensor) -> Tensor:
    return torch.empty(mask_bytes(elements), dtype=torch.uint8, device=elements.device)
