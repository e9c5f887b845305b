"""The passes over memory around an integer product, apart from the product itself.

"Dense" means without gaps or overlaps in memory, in any order of the axes (channels_last
included); results have the strides of the input. Bits are packed eight to a byte in the order of
the elements in memory: bit i % 8, least significant first, of byte i // 8 belongs to element i.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from compression_manager.quantization.integer.geometry import Geometry
from compression_manager.quantization.integer.gradients import ConvolutionGradients
from compression_manager.quantization.scheme import QuantizationScheme

# What `quantize_rows` quantizes to: -127 to 127, with one scale for each row.
ROWS = QuantizationScheme(bits=8, symmetric=True, granularity="channel", axis=0)


# 32-bit sums hold this many products of a code up to 255 and a weight down to -128.
MAX_SUMMED = (2**31 - 1) // (255 * 128)

Ends = tuple[float, float]
"""The smallest and the largest value of a tensor."""


class Passes(ConvolutionGradients):
    """One implementation of the passes.

    Implementations give the same numbers to the last bit, except for `multiply`,
    `multiply_transposed` and the gradients of convolutions, whose sums may be taken in another
    order.

    Attributes:
        name: what reports call it: "torch" or "native".
    """

    name: ClassVar[str]

    @abstractmethod
    def ends(self, input: Tensor) -> Ends:
        """Return the ends of a dense float32 tensor on the CPU, not empty; both NaN if one is."""

    @abstractmethod
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
        """Return the integers of `input` and which elements were clipped.

        clamp(round_half_even(input * inverse_scale) + zero_point, quant_min, quant_max) in float32,
        the formula of `compression_manager.quantization.quantize`, whose integers these are.

        Args:
            input: float32, dense, any shape; without NaN, whose integer is undefined.
            inverse_scale: 1 / scale, rounded to float32; a tensor on an accelerator, which then
                need not be waited for.
            zero_point: integer of real zero, inside of the range.
            quant_min: smallest integer, from -128.
            quant_max: largest integer; to 255, or to 127 where quant_min is negative.
            below: False if the caller knows that no element lies below the range, so that none is
                looked for.
            above: likewise for above the range.

        Returns:
            codes: uint8 (int8 if quant_min is negative), shape and strides of `input`.
            clipped: uint8 (ceil(n / 8),), bits that are 1 where the rounded value lay outside of
                the range; None if `below` and `above` are False.
        """

    @abstractmethod
    def quantize_finite(
        self, input: Tensor, inverse_scale: float, zero_point: int, quant_min: int, quant_max: int
    ) -> Tensor | None:
        """Return the integers of `quantize` alone, or None if an element is not finite.

        Args:
            input: as for `quantize`, on the CPU, of at least one element.
            inverse_scale: as for `quantize`, and the other arguments too.
        """

    @abstractmethod
    def quantize_rows(self, weight: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the 8-bit integers of each row and their scales: symmetric, narrow range.

        scale = max(max|row| / 127, float32's epsilon), cut and made NaN as in `compute_qparams`;
        codes = clamp(round_half_even(weight * (1 / scale)), -127, 127). No element is clipped.

        Args:
            weight: float32 (rows, *), contiguous or channels_last, of at least one element.
            values: float32, shape and strides of `weight`, to which codes * scale is written as by
                `dequantize_rows`; None if that is not needed yet.

        Returns:
            codes: int8, shape and strides of `weight`; 0 in a row that is not finite.
            scale: float32 (rows,); NaN for a row that is not finite.
        """

    @abstractmethod
    def dequantize(
        self,
        codes: Tensor,
        scale: float | Tensor,
        zero_point: int | Tensor,
        out: Tensor,
    ) -> Tensor:
        """Write (codes - zero_point) * scale, a float32 product, to `out`, and return it.

        Args:
            codes: uint8 or int8, dense, any shape.
            scale: a float32 number; a tensor on an accelerator.
            zero_point: integer of real zero.
            out: float32, or bfloat16, to which the product is then rounded, half to even; shape
                and strides of `codes`.
        """

    @abstractmethod
    def add_dequantized(
        self, addend: Tensor, codes: Tensor, scale: float, zero_point: int
    ) -> Tensor:
        """Return addend + (codes - zero_point) * scale, the product rounded before the sum is.

        Args:
            addend: float32, shape and strides of `codes`.
            codes: uint8 or int8, dense, any shape, on the CPU.
            scale: a float32 number.
            zero_point: integer of real zero.

        Returns:
            float32, shape and strides of `codes`.
        """

    @abstractmethod
    def dequantize_rows(self, codes: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        """Write codes * scale, with one scale for each index of the first axis, and return `out`.

        Args:
            codes: int8 (rows, *), dense.
            scale: float32 (rows,).
            out: as for `dequantize`.
        """

    @abstractmethod
    def clear_clipped(self, gradient: Tensor, clipped: Tensor) -> Tensor:
        """Set the gradient to zero where an element was clipped, in place.

        Set, not multiplied by zero: NaN and infinities go as well.

        Args:
            gradient: float32, dense, strides of the input of `quantize`.
            clipped: the bits from `quantize`.

        Returns:
            `gradient` itself.
        """

    @abstractmethod
    def relu(self, input: Tensor) -> tuple[Tensor, Tensor, Ends | None]:
        """Return max(input, 0) and where its gradient passes.

        Args:
            input: float32, dense, any shape, of at least one element.

        Returns:
            output: float32, shape and strides of `input`; NaN stays NaN.
            positive: uint8 (ceil(n / 8),), bits that are 1 unless input <= 0; so for NaN.
            ends: the smallest and the largest element of the output, both NaN if one is; None
                where finding them would take a pass of its own.
        """

    @abstractmethod
    def relu_gradient(self, gradient: Tensor, positive: Tensor) -> Tensor:
        """Return the gradient of `relu`'s input: that of the output or exactly zero.

        Args:
            gradient: float32, dense, strides of the input of `relu`.
            positive: the bits from `relu`.

        Returns:
            float32, shape and strides of `gradient`.
        """

    @abstractmethod
    def supports_pieces(self, pieces: int) -> bool:
        """Return whether `multiply` computes with so many pieces here."""

    @abstractmethod
    def multiply(
        self,
        left: Tensor,
        right: Tensor,
        zero_point: int,
        pieces: int,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Return (left * scale) @ (right - zero_point) by products of bfloat16 summed in float32.

        The integers are exact in bfloat16. In one piece, the left factor is rounded to bfloat16;
        split into three, whose sum it is, the result has the error of a float32 product.

        Args:
            left: float32 (M, K).
            right: int8 or uint8 (K, N).
            zero_point: integer of real zero in `right`.
            pieces: 1 or 3.
            scale: float32 (K,) of the columns of `left`, a product in float32; None for ones.

        Returns:
            float32 (M, N), contiguous.
        """

    @abstractmethod
    def multiply_transposed(
        self, left: Tensor, right: Tensor, zero_point: int, pieces: int, factor: float = 1.0
    ) -> Tensor:
        """Return left.T @ (right - zero_point) * factor, computed as in `multiply`.

        Args:
            left: float32 (K, M).
            right: int8 or uint8 (K, N).
            zero_point: integer of real zero in `right`.
            pieces: 1 or 3.
            factor: a float32 number by which the result is multiplied when it is final.

        Returns:
            float32 (M, N), contiguous.
        """

    @abstractmethod
    def supports_integers(self) -> bool:
        """Return whether this has the fastest products of integers on this CPU, and fast ones."""

    @abstractmethod
    def integer_kernel(self, device: torch.device) -> str:
        """Return what multiplies integers on `device`, for the user to read."""

    @abstractmethod
    def multiply_integers(
        self,
        codes: Tensor,
        weight: Tensor,
        zero_point: int | Tensor,
        scale: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Return (codes - zero_point) @ weight.T * scale + bias, the product being exact.

        Rounded to float32 three times: the product, its product with the scale, and the sum with
        the bias.

        Args:
            codes: uint8 (*, K), contiguous.
            weight: int8 (N, K).
            zero_point: integer of real zero in `codes`, from 0 to 255; a tensor on an accelerator.
            scale: float32 (N,), the scale of the codes times those of the weight's rows.
            bias: float32 (N,), or None.

        Returns:
            float32 (*, N), contiguous.
        """

    @abstractmethod
    def convolve_integers(
        self,
        codes: Tensor,
        weight: Tensor,
        zero_point: int,
        scale: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        """Return the convolution of codes - zero_point and weight, rounded as a product is.

        Args:
            codes: uint8 (N, C, *spatial), contiguous or with the channels last, of one to three
                spatial dimensions.
            weight: int8 (out channels, C / groups, *kernel).
            zero_point: integer of real zero in `codes`, from 0 to 255; padding is of real zeros.
            scale: float32 (out channels,), as for `multiply_integers`.
            bias: float32 (out channels,), or None.
            geometry: of one group, unless these are plain torch operations.

        Returns:
            float32 (N, out channels, *spatial'), in the memory format of `codes`.

        Raises:
            QuantizationError: the operands do not fit together, or there are several groups.
        """
